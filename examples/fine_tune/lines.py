"""Line pictures and their texts as transformers trains on them; shared by native.py and trainer.py."""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import TrOCRProcessor, VisionEncoderDecoderModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # needs no torchvision from here

from trocr_fast.checkpoint import resolve_checkpoint
from trocr_fast.image_modes import sane_image
from trocr_fast.metrics import LABEL_SUFFIXES, find_truths
from trocr_fast.sources import find_pictures
from trocr_fast.verify import load_tokenizer, repair_sinusoidal_positions

IGNORED = -100  # what the loss leaves out


def load(checkpoint: str | None) -> tuple[TrOCRProcessor, VisionEncoderDecoderModel]:
    """A folder's, a hub id's or by default the built-in model, in float32, ready for labels."""
    folder = resolve_checkpoint(checkpoint)
    model = VisionEncoderDecoderModel.from_pretrained(folder, dtype=torch.float32)
    repair_sinusoidal_positions(model)
    # With labels, forward() shifts them right by what stands here, which published checkpoints leave open.
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id
    # TrOCRProcessor.from_pretrained of transformers 5 can't make the tokenizers of published checkpoints.
    return TrOCRProcessor(AutoImageProcessor.from_pretrained(folder), load_tokenizer(folder)), model


class Lines(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Pictures and texts of a folder with NAME.gt.txt beside each picture, or of a labels.csv, .tsv or .jsonl.

    An item has `pixel_values`, float32 [3, H, W], and `labels`, int64 [tokens].

    Args:
        source: the folder or labels file.
        max_tokens: that the decoder has positions for.

    Raises:
        UsageError: no pictures.
        TruthError: a picture without its text.
        ValueError: a text of more than `max_tokens` tokens.
    """

    def __init__(self, source: str, processor: TrOCRProcessor, max_tokens: int) -> None:
        found = [source] if source.lower().endswith(LABEL_SUFFIXES) else find_pictures([source])
        truths = find_truths(map(Path, found))
        self.processor = processor
        self.paths = [truth.path for truth in truths]
        self.texts = [truth.text for truth in truths]
        # The model begins with decoder_start_token_id, not with the tokenizer's <s>, and ends with the end token.
        rows = processor.tokenizer(self.texts, add_special_tokens=False).input_ids
        self.labels = [[*row, processor.tokenizer.eos_token_id] for row in rows]
        for path, row in zip(self.paths, self.labels, strict=True):
            if len(row) > max_tokens:
                raise ValueError(f"{path}: expected a text of at most {max_tokens} tokens, got {len(row)}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        with Image.open(self.paths[index]) as image:
            image.load()
            picture = sane_image(image).convert("RGB")  # as the engine will see it: upright, on white, 8 bit
        pixels = self.processor(images=picture, return_tensors="pt").pixel_values
        return {"pixel_values": pixels[0], "labels": torch.tensor(self.labels[index])}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch: pixel_values [batch, 3, H, W]; labels [batch, longest], filled up with what the loss leaves out."""
    labels = [item["labels"] for item in items]
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def arguments(description: str) -> argparse.Namespace:
    """What is typed, of both scripts."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("train", help="a folder of pictures with NAME.gt.txt beside each, or a labels.csv")
    parser.add_argument("held_out", help="the same, of lines that are not trained on")
    parser.add_argument("out", help="the folder for the new checkpoint: a new one, or an empty one")
    parser.add_argument("--model", help="checkpoint folder or hub id; by default the built-in model")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    args = parser.parse_args()
    if Path(args.out).exists() and (not Path(args.out).is_dir() or any(Path(args.out).iterdir())):
        parser.error(f"out: expected a new or an empty folder, got {args.out}, which holds something already")
    return args
