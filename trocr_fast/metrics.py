"""How many characters and words were read wrong: CER and WER of result rows against the truth.

Corpus level: all edits over all characters (words) of the truth, as jiwer counts them: white space around a
line is dropped, and for words repeated spaces are one. Truth and text are compared as they are, after NFC of
both, so that é in one code point equals é in two. A picture that could not be read counts as having all its
characters deleted, and is counted apart. Where the whole truth is empty (jiwer then gives the number of
insertions for a rate), the rates are 0 if nothing was read, else 1.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trocr_fast.errors import TrocrFastError
from trocr_fast.line import Line

LABEL_SUFFIXES = (".csv", ".tsv", ".jsonl")
PATH_COLUMNS = ("path", "file_name", "image")
TEXT_COLUMNS = ("text", "label")


class TruthError(TrocrFastError, ValueError):
    """The truth of some pictures is missing or cannot be read."""


class MissingExtraError(TrocrFastError, ImportError):
    """An optional dependency is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Truth:
    """A picture and the text that is on it."""

    path: Path
    text: str


@dataclass(frozen=True)
class Score:
    """num_equal: lines without one wrong character; num_errors: pictures that were not read."""

    cer: float
    wer: float
    num_lines: int
    num_equal: int
    num_errors: int
    num_characters: int


@dataclass(frozen=True)
class LineScore:
    """The wrong characters of one line; where it was not read, `text` is None and `error` says why."""

    path: str | None
    num_edits: int
    truth: str
    text: str | None
    error: str | None


@dataclass(frozen=True)
class Report:
    """The score of all lines, and the lines with the most wrong characters, worst first."""

    score: Score
    worst: tuple[LineScore, ...]


def require_jiwer() -> Any:
    """jiwer, imported late: only this needs it.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import jiwer
    except ImportError as error:
        raise MissingExtraError("CER and WER need jiwer: pip install 'trocr_fast[eval]'", name="jiwer") from error
    return jiwer


def evaluate(truths: Sequence[str], lines: Sequence[Line], num_worst: int = 10) -> Report:
    """Compares each line with the truth at its place.

    Raises ValueError where the two differ in length, MissingExtraError without jiwer.
    """
    if len(truths) != len(lines):
        raise ValueError(f"Invalid lines: expected {len(truths)}, one for each truth, got {len(lines)}")
    jiwer = require_jiwer()
    wanted = [unicodedata.normalize("NFC", truth) for truth in truths]
    read = [unicodedata.normalize("NFC", line.text or "") if line.error is None else "" for line in lines]
    characters = jiwer.process_characters(wanted, read)
    words = jiwer.process_words(wanted, read)
    # jiwer makes one empty line of no lines at all
    edits = [_num_edits(alignment) for alignment in characters.alignments[: len(lines)]]
    score = Score(
        cer=_rate(characters),
        wer=_rate(words),
        num_lines=len(lines),
        num_equal=sum(n == 0 and line.error is None for n, line in zip(edits, lines, strict=True)),
        num_errors=sum(line.error is not None for line in lines),
        num_characters=sum(len(reference) for reference in characters.references),
    )
    order = sorted((i for i, n in enumerate(edits) if n), key=lambda i: (-edits[i], i))
    worst = tuple(
        LineScore(lines[i].path, edits[i], truths[i], lines[i].text, lines[i].error) for i in order[:num_worst]
    )
    return Report(score, worst)


def _rate(output: Any) -> float:
    num_edits = output.substitutions + output.deletions + output.insertions
    total = output.hits + output.substitutions + output.deletions
    return num_edits / total if total else float(num_edits > 0)


def _num_edits(alignment: Iterable[Any]) -> int:
    return sum(
        max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        for chunk in alignment
        if chunk.type != "equal"
    )


def find_truths(paths: Iterable[Path]) -> list[Truth]:
    """The pictures and their truths, in order: NAME.gt.txt beside NAME.ext, or the rows of a labels file.

    Raises TruthError if a truth is missing or unreadable, naming the files.
    """
    truths: list[Truth] = []
    missing: list[Path] = []
    for path in map(Path, paths):
        if path.suffix.lower() in LABEL_SUFFIXES:
            truths.extend(_read_labels(path))
        elif (beside := path.parent / f"{path.stem}.gt.txt").is_file():
            truths.append(Truth(path, _read_truth(beside)))
        else:
            missing.append(beside)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        beside_them = f"{', '.join(map(str, missing[:3]))}{more} beside the pictures"
        raise TruthError(f"no truth: expected {beside_them}, or a labels.csv, .tsv or .jsonl by its name")
    return truths


def _read_truth(path: Path) -> str:
    text = _read(path).rstrip("\r\n")
    if "\n" in text:
        raise TruthError(f"{path}: expected one line of text, found {text.count(chr(10)) + 1}")
    return text


def _read(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark, its newlines as they are."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TruthError(f"{path}: expected a text file in UTF-8, found: {error}") from error


def _read_labels(path: Path) -> Iterator[Truth]:
    """Rows of a csv, tsv or jsonl file with a picture, relative to the file's folder, and its text."""
    for number, row in _rows(path):
        name, text = _one_of(row, PATH_COLUMNS), _one_of(row, TEXT_COLUMNS)
        if not isinstance(name, str) or not name or not isinstance(text, str):
            wanted = f"{' or '.join(PATH_COLUMNS)}, and {' or '.join(TEXT_COLUMNS)}"
            raise TruthError(f"{path}: row {number}: expected {wanted}, found {row}")
        yield Truth(path.parent / name, text)


def _one_of(row: dict[str, Any], columns: Sequence[str]) -> Any:
    return next((row[column] for column in columns if column in row), None)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = _read(path)
    try:
        if path.suffix.lower() == ".csv":
            yield from enumerate(csv.DictReader(io.StringIO(text, newline=""), strict=True), 1)
        elif path.suffix.lower() == ".tsv":
            # No quotes and no escapes: the \tau of a formula stays what it is.
            header, *rows = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
            yield from enumerate((dict(zip(header, row, strict=False)) for row in rows if row != [""]), 1)
        else:
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    row = json.loads(line)
                    yield number, row if isinstance(row, dict) else {"": row}
    except (ValueError, csv.Error) as error:
        raise TruthError(f"{path}: broken labels file: {error}") from error
