"""Writes a checkpoint as a standard folder: config, processor, tokenizer, generation defaults, fp16 weights.

    python examples/train_builtin/export.py .train/run trocr_fast/builtin

What was written is loaded again and compared: weights bit by bit with their fp16 rounding, and the text of
sample lines with what the unrounded weights read.
"""

import argparse
import json
from pathlib import Path

import model as shape
import render
import torch
from transformers import TrOCRProcessor, VisionEncoderDecoderModel

SAMPLE_LINES = 64


def trained(work: Path) -> VisionEncoderDecoderModel:
    """The checkpoint's model in fp32, without the CTC head."""
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    sizes = (int(state["config"][key]) for key in ("width", "encoder_layers", "decoder_layers", "heads"))
    model = shape.build(*sizes)
    model.load_state_dict(state["model"])
    return model.eval()


@torch.inference_mode()
def read(model: VisionEncoderDecoderModel, processor: TrOCRProcessor) -> list[str]:
    """What a model reads on sample lines in held-out fonts."""
    lines = render.Lines("held-out", seed=3, degrade=0.5)
    images = [lines.draw()[0] for _ in range(SAMPLE_LINES)]
    ids = model.generate(processor(images=images, return_tensors="pt").pixel_values)
    return processor.batch_decode(ids, skip_special_tokens=True)


def export(work: Path, out: Path) -> None:
    """Write the folder, then check it."""
    model, processor = trained(work), shape.processor()
    check_tokens(processor)
    expected = read(model, processor)
    halved = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    update_json(out / "config.json", {"dtype": "float32"})  # fp16 is for the size of the file, not to compute in
    write_processor(processor, out)

    again = VisionEncoderDecoderModel.from_pretrained(out).eval()
    for name, tensor in again.state_dict().items():
        if tensor.dtype != torch.float32 or not torch.equal(tensor, halved[name].float()):
            raise ValueError(f"{out}: {name} is not what was written")
    reloaded = TrOCRProcessor.from_pretrained(out)
    check_tokens(reloaded)
    got = read(again, reloaded)
    differing = [(a, b) for a, b in zip(expected, got, strict=True) if a != b]
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size} bytes; fp16 weights read {len(differing)} of {SAMPLE_LINES} sample lines differently")
    for before, after in differing:
        print(f"  {before!r} {after!r}")
    if len(differing) > SAMPLE_LINES // 20:
        raise ValueError(f"{out}: fp16 rounding changes too many lines")


def write_processor(processor: TrOCRProcessor, out: Path) -> None:
    """Tokenizer and image processor, in the files and class names that transformers 4 and 5 both read."""
    processor.save_pretrained(out)
    (out / "processor_config.json").unlink(missing_ok=True)
    processor.image_processor.save_pretrained(out)
    classes = {
        "preprocessor_config.json": {"do_convert_rgb": None, "processor_class": "TrOCRProcessor"},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    for name, values in classes.items():
        update_json(out / name, values)


def update_json(path: Path, values: dict) -> None:
    """Set some values in a JSON file."""
    settings = json.loads(path.read_text()) | values
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def check_tokens(processor: TrOCRProcessor) -> None:
    """Every character is one token and comes back as itself, spaces included."""
    for text in (
        *shape.ALPHABET,
        *(shape.ALPHABET[i : i + 20] for i in range(0, len(shape.ALPHABET), 20)),
        "  a b   c ",
    ):
        ids = processor.tokenizer(text).input_ids
        if ids != [shape.BOS, *shape.encode(text), shape.EOS]:
            raise ValueError(f"tokenizer: {text!r} became {ids}")
        if processor.batch_decode([ids], skip_special_tokens=True) != [text]:
            raise ValueError(f"tokenizer: {text!r} does not come back")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path, help="the folder train.py works in")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    export(arguments.work, arguments.out)
