r"""Result rows → text, jsonl, csv and tsv, in input order, each row written by one call.

    text    path<TAB>text, escaped; an error row is no data: path<TAB>error: message goes to the error stream
    jsonl   one object a row: path, text, confidence, token_ids, truncated (and token_log_probs, if the line has them),
            or path, error
    csv     RFC 4180 with a header: path, text, confidence, truncated, error; a newline in a text is quoted
    tsv     the columns of csv, escaped like text

Escaped: tab, newline, carriage return and backslash as \t \n \r \\, and a byte of a path that is not UTF-8 as
\xNN; `unescape` gives back the string. JSON has its own escape for such a byte, \udcNN: `json.loads` gives
back the path, os.fsencode its bytes. CSV has none: there the byte shows as \xNN, and a name that holds these
four characters looks the same. Confidence and log-probabilities are rounded to six decimals.

Streams are text streams in UTF-8, opened with newline="".
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable
from typing import TextIO

from trocr_fast.line import Line

COLUMNS = ("path", "text", "confidence", "truncated", "error")

# os.fsdecode turns a byte b that is not UTF-8 into the surrogate U+DC00 + b; no encoder accepts surrogates.
_SURROGATES = {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}
_BYTES = _SURROGATES | {0xDC00 + byte: f"\\x{byte:02x}" for byte in range(0x80, 0x100)}
_ESCAPES = _BYTES | {ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r", ord("\\"): "\\\\"}
_ESCAPED = re.compile(r"\\(?:([tnr\\])|x([0-9a-f]{2})|u(d[89a-f][0-9a-f]{2}))")
_PLAIN = {"t": "\t", "n": "\n", "r": "\r", "\\": "\\"}


def escape(field: str) -> str:
    """`field` on one line, without a tab, in characters that UTF-8 can encode."""
    return field.translate(_ESCAPES)


def unescape(field: str) -> str:
    """What `escape` was given."""

    def plain(match: re.Match[str]) -> str:
        letter, byte, code = match.groups()
        return _PLAIN[letter] if letter else chr(0xDC00 + int(byte, 16) if byte else int(code, 16))

    return _ESCAPED.sub(plain, field)


class Writer:
    """Writes rows to a stream that stays its caller's; a closed pipe or full disk is its caller's business.

    A terminal or pipe is flushed after each row, so that the reader at its other end waits for nothing.
    """

    def __init__(self, stream: TextIO, errors: TextIO, header: bool) -> None:
        self._stream = stream
        self._errors = errors
        self._live = _is_live(stream)
        if header:
            self._write_header()

    def write(self, line: Line) -> None:
        """Writes one row. Raises OSError where the stream does."""
        self._write_row(line)
        if self._live:
            self._stream.flush()

    def close(self) -> None:
        """Flushes; the stream stays open. Raises OSError where the stream does."""
        self._stream.flush()

    def _write_header(self) -> None:
        """Nothing, but for the formats with named columns."""

    def _write_row(self, line: Line) -> None:
        raise NotImplementedError


class TextWriter(Writer):
    def _write_row(self, line: Line) -> None:
        path = escape(line.path or "")
        if line.error is not None:
            self._errors.write(f"{path}\terror: {escape(line.error)}\n")
        else:
            self._stream.write(f"{path}\t{escape(line.text or '')}\n")


class JsonlWriter(Writer):
    def _write_row(self, line: Line) -> None:
        row: dict[str, object] = {"path": line.path}
        if line.error is not None:
            row["error"] = line.error
        else:
            row |= {
                "text": line.text,
                "confidence": _rounded(line.confidence),
                "token_ids": line.token_ids,
                "truncated": line.truncated,
            }
            if line.token_log_probs is not None:
                row["token_log_probs"] = [_rounded(log_prob) for log_prob in line.token_log_probs]
        # A lone surrogate stands in the JSON as itself; written as its escape it is ASCII and means the same.
        self._stream.write(json.dumps(row, ensure_ascii=False).translate(_SURROGATES) + "\n")


class CsvWriter(Writer):
    def _write_header(self) -> None:
        self._write_cells(COLUMNS)

    def _write_row(self, line: Line) -> None:
        path = line.path or ""
        if line.error is not None:
            self._write_cells((path, "", "", "", line.error))
        else:
            confidence = _rounded(line.confidence)
            number = "" if confidence is None else str(confidence)
            self._write_cells((path, line.text or "", number, str(line.truncated).lower(), ""))

    def _write_cells(self, cells: tuple[str, ...]) -> None:
        csv.writer(self._stream, lineterminator="\r\n").writerow(cell.translate(_BYTES) for cell in cells)


class TsvWriter(CsvWriter):
    def _write_cells(self, cells: tuple[str, ...]) -> None:
        self._stream.write("\t".join(map(escape, cells)) + "\n")


FORMATS: dict[str, Callable[[TextIO, TextIO, bool], Writer]] = {
    "text": TextWriter,
    "jsonl": JsonlWriter,
    "csv": CsvWriter,
    "tsv": TsvWriter,
}


def open_writer(format: str, stream: TextIO, *, errors: TextIO | None = None, header: bool = True) -> Writer:
    """A writer of `format` on `stream`; `errors` (stderr) takes the error rows of text.

    `header=False` leaves out the column names of csv and tsv, for a file that has them already.
    Raises ValueError for an unknown format, OSError where the stream does.
    """
    if format not in FORMATS:
        raise ValueError(f"Invalid format: expected one of {', '.join(FORMATS)}, got {format!r}")
    return FORMATS[format](stream, sys.stderr if errors is None else errors, header)


def _rounded(number: float | None) -> float | None:
    """Six decimals; what is no number (a NaN) is null, since JSON has no word for it."""
    return round(number, 6) if number is not None and math.isfinite(number) else None


def _is_live(stream: TextIO) -> bool:
    """Whether someone may be waiting at the other end: a terminal, pipe or socket, not a file or memory."""
    try:
        return not stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):
        return False
