"""Tokens against transformers, row by row, on the same pixels.

In fp32 every row must equal the reference. Where one does not, the margin between the reference's two best scores at
the first differing position is shown, and the row is a tie if our token's score is below the best by no more than twice
what the reference itself moves by when the row is decoded in a batch of 8 instead of alone: then it does not decide
either.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trocr_fast.config import NEUTRAL_GENERATION
from trocr_fast.engine import decode_batch
from trocr_fast.errors import CheckpointError, PictureError
from trocr_fast.images import Picture
from trocr_fast.search import SearchSettings
from trocr_fast.trocr import TrOCR

JUDGING_BATCH = 8


@dataclass(frozen=True)
class Difference:
    """Where a row first differs from the reference, and how sure the reference was there."""

    position: int  # in the sequence; 0 is the start token
    our_token: int | None  # None: ours had ended
    reference_token: int | None
    margin: float  # best score less second best, of the reference
    gap: float  # its best score less its score of our token: the margin, if ours is its second choice
    noise: float  # how far the reference's scores of the two tokens move between batch 1 and batch 8

    @property
    def is_tie(self) -> bool:
        """The reference's own rounding could have turned the choice."""
        return math.isinf(self.noise) or self.gap <= 2 * self.noise


@dataclass(frozen=True)
class RowCheck:
    """One picture: equal to the reference, different, or unreadable."""

    path: str | None
    difference: Difference | None = None
    texts_differ: bool = False  # although the tokens are equal
    error: str | None = None

    @property
    def equal(self) -> bool:
        """Same tokens and same text."""
        return self.difference is None and not self.texts_differ and self.error is None


class Reference:
    """transformers' own model of a checkpoint, in fp32.

    Args:
        folder: the checkpoint.
        device: where it runs.
        settings: generation settings of the checkpoint to be put back to plain greedy search.

    Raises:
        CheckpointError: transformers can't load the model or its tokenizer.
    """

    def __init__(self, folder: Path, device: torch.device, settings: Iterable[str] = ()) -> None:
        from transformers import VisionEncoderDecoderModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            self.model: Any = VisionEncoderDecoderModel.from_pretrained(folder, dtype=torch.float32)
            self.tokenizer = load_tokenizer(folder)
        except Exception as error:
            raise CheckpointError(
                f"{folder}: expected a checkpoint that transformers loads too, to compare with; it raised "
                f"{type(error).__name__}: {error}"
            ) from error
        repair_sinusoidal_positions(self.model)
        self.model.eval().to(device)
        positions = self.model.decoder.model.decoder.embed_positions
        if hasattr(positions, "weights"):  # no buffer, so `.to` leaves it where it was
            positions.weights = positions.weights.to(device)
        self._neutral = {name: (NEUTRAL_GENERATION[name] or (None,))[0] for name in settings}

    @torch.inference_mode()
    def generate(self, pixel_values: Tensor, max_length: int, **more: Any) -> Any:
        """Greedy search with the checkpoint's own `use_cache`."""
        length = {"max_new_tokens": max_length - 1}
        return self.model.generate(pixel_values.to(self.model.dtype), **length, **self._neutral, **more)

    def tokens(self, pixel_values: Tensor, max_length: int, **more: Any) -> list[list[int]]:
        """Token ids of each row, from the start token to its end token; what fills the row up is cut off."""
        return [self._cut(row) for row in self.generate(pixel_values, max_length, **more).tolist()]

    def texts(self, rows: list[list[int]]) -> list[str]:
        """As the checkpoint's processor decodes them."""
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def scores(self, pixel_values: Tensor, prefix: list[int]) -> Tensor | None:
        """Scores [vocab_size] from which the first picture's next token after `prefix` is chosen; None if greedy
        search does not come by this prefix."""
        out = self.generate(pixel_values, len(prefix) + 1, return_dict_in_generate=True, output_logits=True)
        if out.sequences[0, : len(prefix)].tolist() != prefix:
            return None
        return out.logits[len(prefix) - 1][0]

    def _cut(self, row: list[int]) -> list[int]:
        end = self.model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        for index, token in enumerate(row[1:], start=1):  # the start token may be an end token
            if token in ends:
                return row[: index + 1]
        return row


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer as transformers has it.

    Where there is no tokenizer.json (all published TrOCR checkpoints), it is made by the class that its settings
    name: `AutoTokenizer` of transformers 5.17 cannot make one in a folder with a config.json of this architecture.
    """
    import transformers

    if not (folder / "tokenizer_config.json").exists() and (folder / "processor").is_dir():
        folder = folder / "processor"
    if (folder / "tokenizer.json").exists():
        return transformers.AutoTokenizer.from_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return getattr(transformers, settings["tokenizer_class"]).from_pretrained(folder)


def repair_sinusoidal_positions(model: Any) -> None:
    """Fill the table that transformers 5 leaves empty when it loads a decoder with sinusoidal positions."""
    positions = model.decoder.model.decoder.embed_positions
    if hasattr(positions, "weights"):
        num_rows = positions.weights.shape[0]
        table = positions.get_embedding(num_rows, positions.embedding_dim, positions.padding_idx)
        positions.weights = table.to(model.device, model.dtype)


def verify(
    ocr: TrOCR, reference: Reference, pictures: Iterable[Picture], batch_size: int, max_new_tokens: int | None = None
) -> Iterator[RowCheck]:
    """Read each picture with both and compare; one result a picture, in order.

    Args:
        ocr: the checkpoint as loaded here.
        reference: the same checkpoint in transformers.
        pictures: as for `TrOCR.read`.
        batch_size: pictures that both decode together.
        max_new_tokens: as for `TrOCR.read`.
    """
    max_length = ocr.read_max_length(max_new_tokens)
    paths: list[str | None] = []
    batch: list[np.ndarray] = []

    def compare() -> Iterator[RowCheck]:
        yield from _verify_batch(ocr, reference, paths, batch, max_length)
        paths.clear()
        batch.clear()

    for path, pixels in ocr.load_pictures(pictures):
        if isinstance(pixels, PictureError):
            yield from compare()
            yield RowCheck(path, error=str(pixels))
            continue
        paths.append(path)
        batch.append(pixels)
        if len(batch) == batch_size:
            yield from compare()
    yield from compare()


def _verify_batch(
    ocr: TrOCR, reference: Reference, paths: list[str | None], batch: list[np.ndarray], max_length: int
) -> Iterator[RowCheck]:
    if not batch:
        return
    pixel_values = ocr.pixel_values(batch)
    settings = SearchSettings.greedy(ocr.model.config.generation, max_length)
    ours = [hypothesis.tokens for hypothesis in decode_batch(ocr.model, pixel_values, settings)]
    theirs = reference.tokens(pixel_values, max_length)
    our_texts, their_texts = ocr.text.batch_decode(ours), reference.texts(theirs)
    for row, path in enumerate(paths):
        if ours[row] == theirs[row]:
            yield RowCheck(path, texts_differ=our_texts[row] != their_texts[row])
        else:
            yield RowCheck(path, difference=compare_row(reference, pixel_values[row], ours[row], theirs[row]))


def compare_row(reference: Reference, pixel_values: Tensor, ours: list[int], theirs: list[int]) -> Difference:
    """Judge a row whose tokens differ.

    Args:
        pixel_values: of this row, [3, H, W].
    """
    shorter = min(len(ours), len(theirs))
    position = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
    our_token = ours[position] if position < len(ours) else None
    reference_token = theirs[position] if position < len(theirs) else None
    prefix = theirs[:position]
    alone = reference.scores(pixel_values.unsqueeze(0), prefix)
    among = reference.scores(pixel_values.expand(JUDGING_BATCH, -1, -1, -1), prefix)
    if alone is None or among is None:  # the reference's own tokens depend on the batch, even before this position
        return Difference(position, our_token, reference_token, math.nan, math.nan, math.inf)
    best, second = alone.topk(2).values.tolist()
    gap = math.inf if our_token is None else best - alone[our_token].item()
    rivals = [token for token in (our_token, reference_token) if token is not None]
    noise = (alone - among)[rivals].abs().max().item()
    return Difference(position, our_token, reference_token, best - second, gap, noise)
