"""Lines a second of this engine and of transformers, on a user's own checkpoint and pictures.

All begin with the same uint8 pictures in host memory, already resized, and end with token ids in host memory: what
loading files and decoding texts take is in no number. They run in one process with the same weights, dtype and batch
size, and take turns, so that what else the machine does meets all of them. transformers gets its batches in the order
of the pictures. Beside every speed stands how many lines have the tokens of transformers as shipped in float32.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

from trocr_fast import __version__
from trocr_fast.engine import Engine
from trocr_fast.errors import UsageError
from trocr_fast.search import SearchSettings
from trocr_fast.trocr import TrOCR
from trocr_fast.verify import Reference, repair_sinusoidal_positions

OURS = "trocr_fast"

Rows = list[list[int]]  # token ids of each line, from the start token to its end token
Pixels = Sequence[np.ndarray]  # uint8 [3, H, W] each


@dataclass
class Contestant:
    """One way to decode pictures, and what it took."""

    name: str
    decode: Callable[[Pixels], Rows]
    rows: Rows = field(default_factory=list)  # of the last turn
    seconds: list[float] = field(default_factory=list)  # of each turn

    def take_turn(self, pixels: Pixels) -> None:
        start = time.perf_counter()
        self.rows = self.decode(pixels)
        self.seconds.append(time.perf_counter() - start)

    def result(self, expected: Rows) -> dict[str, Any]:
        """Speed by the median of the turns, and the share of lines with the expected tokens."""
        num_equal = sum(found == wanted for found, wanted in zip(self.rows, expected, strict=True))
        return {
            "name": self.name,
            "lines_per_second": len(expected) / statistics.median(self.seconds),
            "seconds": self.seconds,
            "equal_share": num_equal / len(expected),
        }


def measure(
    ocr: TrOCR,
    reference: Reference,
    pixels: Pixels,
    batch_size: int,
    repeats: int,
    max_new_tokens: int | None = None,
    on_turn: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Decode the pictures with each contestant `repeats` times, after a warm-up of one batch.

    Args:
        ocr: the checkpoint as loaded here.
        reference: the same checkpoint in transformers; has the dtype of `ocr` afterwards.
        pixels: as `TrOCR.load_pictures` gives them.
        batch_size: pictures decoded together.
        repeats: turns of each.
        max_new_tokens: as for `TrOCR.read`.
        on_turn: told of each turn.

    Returns:
        What was measured and with what, for JSON or `table`; of its `rows` this engine's is the first.

    Raises:
        UsageError: no pictures; a `batch_size` or `repeats` below 1.
    """
    for name, value in (("pixels", len(pixels)), ("batch_size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise UsageError(f"{name}: expected at least 1, got {value}")
    max_length = ocr.read_max_length(max_new_tokens)
    as_shipped = ocr.model.config.generation.use_cache

    def theirs(use_cache: bool) -> Callable[[Pixels], Rows]:
        def decode(some: Pixels) -> Rows:
            rows: Rows = []
            for start in range(0, len(some), batch_size):
                batch = ocr.pixel_values(list(some[start : start + batch_size]))
                rows += reference.tokens(batch, max_length, use_cache=use_cache)
            return rows

        return decode

    contestants = [Contestant(OURS, _engine(ocr, batch_size, max_length))]
    if not as_shipped:
        contestants.append(Contestant("transformers, use_cache=True", theirs(True)))
    shipped = Contestant(f"transformers as shipped, use_cache={as_shipped}", theirs(as_shipped))
    contestants.append(shipped)

    expected: Rows | None = None
    if ocr.model.dtype != reference.model.dtype:
        expected = shipped.decode(pixels)  # in float32, before the model is no longer
        reference.model.to(ocr.model.dtype)
        repair_sinusoidal_positions(reference.model)
    for contestant in contestants:
        contestant.decode(pixels[:batch_size])
    for turn in range(1, repeats + 1):
        for contestant in contestants:
            contestant.take_turn(pixels)
            on_turn(f"turn {turn} of {repeats}: {contestant.name}: {contestant.seconds[-1]:.3g} s")
    if expected is None:
        expected = shipped.rows
    return {
        "checkpoint": str(ocr.folder),
        "device": str(ocr.model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(ocr.model.dtype).removeprefix("torch."),
        "cross_memory": ocr.model.cross_memory,
        "versions": {"trocr_fast": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "num_lines": len(pixels),
        "batch_size": batch_size,
        "repeats": repeats,
        "rows": [contestant.result(expected) for contestant in contestants],
    }


def _engine(ocr: TrOCR, batch_size: int, max_length: int) -> Callable[[Pixels], Rows]:
    generation = ocr.model.config.generation
    engine = Engine(
        ocr.model,
        SearchSettings.greedy(generation, max_length),
        batch_size,
        count_pads=generation.use_cache,
        table=torch.from_numpy(ocr.images.table),
    )
    return lambda pixels: [found[0].tokens for found in engine.decode(map(torch.from_numpy, pixels))]


def table(report: dict[str, Any]) -> Iterator[str]:
    """What `measure` gives, as lines for people: what was measured, then a row for each contestant."""
    rows = report["rows"]
    yield (
        f"{report['num_lines']} lines, batches of {report['batch_size']}, {report['dtype']}, {report['device']}, "
        f"{report['cross_memory']}, medians of {report['repeats']}"
    )
    width = max(len(row["name"]) for row in rows)
    yield f"{'':<{width}}   lines/s   ours is   equal tokens"
    for row in rows:
        speed = row["lines_per_second"]
        ratio = rows[0]["lines_per_second"] / speed
        yield f"{row['name']:<{width}}{speed:>10.4g}{ratio:>9.2f}x{row['equal_share']:>15.1%}"
