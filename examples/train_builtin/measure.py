"""CER and WER of a model folder on folders of pictures with NAME.gt.txt, read by transformers itself.

    python examples/train_builtin/measure.py trocr_fast/builtin examples/lines [--show] [--dtype float32]

Every row counts. `exact` is the share of lines without any error.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jiwer
import numpy as np
import torch
from PIL import Image
from transformers import TrOCRProcessor, VisionEncoderDecoderModel


def pictures(folder: Path) -> list[tuple[Path, str]]:
    """Pictures that have a NAME.gt.txt beside them, in sorted order, and their texts."""
    texts = {p.name.removesuffix(".gt.txt"): p for p in folder.glob("*.gt.txt")}
    found = [p for p in sorted(folder.iterdir()) if p.suffix != ".txt" and p.stem in texts]
    return [(p, texts[p.stem].read_text(encoding="utf-8").rstrip("\n")) for p in found]


def open_rgb(path: Path) -> Image.Image:
    """The first frame as RGB: transparency over white, 16-bit greys scaled to 8."""
    picture = Image.open(path)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture)
    return picture.convert("RGB")


class Reader:
    """transformers' own processor and generate(), greedy, as the folder says."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.processor = TrOCRProcessor.from_pretrained(folder)
        self.model = VisionEncoderDecoderModel.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def read(self, paths: list[Path], batch: int = 32) -> Iterator[str]:
        for start in range(0, len(paths), batch):
            images = [open_rgb(path) for path in paths[start : start + batch]]
            pixels = self.processor(images=images, return_tensors="pt").pixel_values  # [B, 3, H, W]
            ids = self.model.generate(pixels.to(self.model.dtype))
            yield from self.processor.batch_decode(ids, skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--show", action="store_true", help="print the lines that are not exact")
    args = parser.parse_args()
    reader = Reader(args.model, getattr(torch, args.dtype))
    for folder in args.folder:
        rows = pictures(folder)
        texts = [text for _, text in rows]
        read = list(reader.read([path for path, _ in rows]))
        wrong = [row for row in zip(rows, read, strict=True) if row[0][1] != row[1]]
        if args.show:
            for (path, text), got in wrong:
                print(f"  {path.name}\t{text}\t{got}")
        cer, wer, exact = jiwer.cer(texts, read), jiwer.wer(texts, read), 1 - len(wrong) / len(rows)
        print(f"{folder}: {len(rows)} lines, CER {cer:.4f}, WER {wer:.4f}, exact {exact:.4f}")


if __name__ == "__main__":
    main()
