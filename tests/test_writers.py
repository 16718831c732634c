"""Each format read back by the reader it is meant for: nothing lost, one row a line, streams kept apart."""

import csv
import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trocr_fast.line import Line
from trocr_fast.writers import COLUMNS, FORMATS, escape, open_writer, unescape

BYTES_NAME = os.fsdecode(b"caf\xe9\xff.png")
LINES = [
    Line("b.png", "plain", 0.987654321, [2, 5, 7, 2], False),
    Line("a\tb\\n.png", 'tab\tnewline\nreturn\r"quotes", back\\slash', 1.0, [2], True),
    Line("bad\n.png", error="not a picture\tof text"),
    Line(BYTES_NAME, "é 漢 \u2028 \x85 \x0b", 0.5, [], False),
    Line(None, "", None, None, False),
    Line("nan.png", "x", float("nan"), None, False),
]


def _written(format: str, lines: list[Line], **options: bool) -> tuple[str, str]:
    """Output and errors, both through a strict UTF-8 stream, as the command has them."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    writer = open_writer(format, out, errors=err, **options)
    for line in lines:
        writer.write(line)
    writer.close()
    err.flush()
    return out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


def test_text() -> None:
    out, err = _written("text", LINES)
    rows = [row.split("\t") for row in out.removesuffix("\n").split("\n")]
    good = [line for line in LINES if line.error is None]
    assert [(unescape(path), unescape(text)) for path, text in rows] == [(g.path or "", g.text) for g in good]
    assert rows[1] == ["a\\tb\\\\n.png", 'tab\\tnewline\\nreturn\\r"quotes", back\\\\slash']
    assert rows[2][0] == "caf\\xe9\\xff.png"
    assert err == "bad\\n.png\terror: not a picture\\tof text\n"


def test_jsonl() -> None:
    out, err = _written("jsonl", LINES)
    rows = [json.loads(row) for row in out.removesuffix("\n").split("\n")]
    assert [list(row) for row in rows[:3]] == [
        ["path", "text", "confidence", "token_ids", "truncated"],
        ["path", "text", "confidence", "token_ids", "truncated"],
        ["path", "error"],
    ]
    for row, line in zip(rows, LINES, strict=True):
        assert (row["path"], row.get("text"), row.get("error")) == (line.path, line.text, line.error)
        assert row.get("token_ids") == line.token_ids and row.get("truncated", False) == line.truncated
    assert os.fsencode(rows[3]["path"]) == b"caf\xe9\xff.png"
    assert [row.get("confidence") for row in rows] == [0.987654, 1.0, None, 0.5, None, None]
    assert "漢" in out and "NaN" not in out and err == ""


def test_log_probabilities_of_tokens_are_written_where_there_are_some() -> None:
    line = Line("a.png", "a", 0.5, [2, 5, 2], token_log_probs=[-0.12345678, float("-inf")])
    assert json.loads(_written("jsonl", [line])[0])["token_log_probs"] == [-0.123457, None]
    for format in ("text", "csv", "tsv"):
        assert "0.123457" not in _written(format, [line])[0]


def _expected_cells(line: Line) -> list[str]:
    if line.error is not None:
        return [line.path or "", "", "", "", line.error]
    number = {0.987654321: "0.987654", 1.0: "1.0", 0.5: "0.5"}.get(line.confidence or 0, "")
    return [line.path or "", line.text or "", number, "true" if line.truncated else "false", ""]


def test_csv() -> None:
    out, err = _written("csv", LINES)
    header, *rows = csv.reader(io.StringIO(out, newline=""), strict=True)
    assert header == list(COLUMNS)
    expected = [_expected_cells(line) for line in LINES]
    expected[3][0] = "caf\\xe9\\xff.png"
    assert rows == expected
    assert out.endswith("\r\n") and err == ""


def test_tsv() -> None:
    out, err = _written("tsv", LINES)
    header, *rows = out.removesuffix("\n").split("\n")
    assert header == "path\ttext\tconfidence\ttruncated\terror"
    cells = [[unescape(cell) for cell in row.split("\t")] for row in rows]
    assert cells == [_expected_cells(line) for line in LINES]
    assert err == ""


@pytest.mark.parametrize("format", ["csv", "tsv"])
def test_header_once(format: str) -> None:
    whole, rest = _written(format, LINES[:2])[0], _written(format, LINES[1:2], header=False)[0]
    assert whole.endswith(rest) and "confidence" not in rest
    assert _written(format, [])[0].strip().split("\t" if format == "tsv" else ",") == list(COLUMNS)


anything = st.text(st.characters(exclude_categories=[]) | st.sampled_from("\t\n\r\\xudtn"))


@given(anything)
@example("\\t\t\\\\t")
@example("\\xe9" + os.fsdecode(b"\xe9") + "\ud800")
def test_escape_is_reversible(field: str) -> None:
    row = escape(field)
    assert unescape(row) == field
    assert not set(row) & set("\t\n\r")
    row.encode("utf-8")


encodable = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.tuples(st.binary(max_size=8), encodable, st.booleans())))
def test_every_row_comes_back(rows: list[tuple[bytes, str, bool]]) -> None:
    lines = [
        Line(os.fsdecode(path), **{"error" if bad else "text": text})  # type: ignore[arg-type]
        for path, text, bad in rows
    ]
    loaded = [json.loads(row) for row in _written("jsonl", lines)[0].split("\n")[:-1]]
    assert [(os.fsencode(x["path"]), x.get("text"), x.get("error")) for x in loaded] == [
        (path, None if bad else text, text if bad else None) for path, text, bad in rows
    ]
    cells = [row.split("\t") for row in _written("tsv", lines)[0].split("\n")[1:-1]]
    assert [(os.fsencode(unescape(c[0])), unescape(c[4 if bad else 1])) for c, (_, _, bad) in
            zip(cells, rows, strict=True)] == [(path, text) for path, text, _ in rows]  # fmt: skip
    table = list(csv.reader(io.StringIO(_written("csv", lines)[0], newline=""), strict=True))[1:]
    assert [c[4 if bad else 1] for c, (_, _, bad) in zip(table, rows, strict=True)] == [t for _, t, _ in rows]


@pytest.mark.parametrize("format", list(FORMATS))
def test_a_pipe_gets_each_row_at_once_and_a_file_does_not(format: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as reader, open(writing, "w", encoding="utf-8", newline="") as pipe:
        writer = open_writer(format, pipe)
        for line in LINES[:2]:
            writer.write(line)
            os.set_blocking(reading, False)
            assert b".png" in (reader.read(10_000) or b"")
    with open(tmp_path / "rows", "w", encoding="utf-8", newline="") as file:
        writer = open_writer(format, file)
        writer.write(LINES[0])
        assert (tmp_path / "rows").stat().st_size == 0
        writer.close()
        assert (tmp_path / "rows").stat().st_size > 0 and not file.closed


def test_a_closed_pipe_and_a_full_disk_are_the_callers_business() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    pipe = open(writing, "w", encoding="utf-8", newline="")  # noqa: SIM115 - its close fails too
    with pytest.raises(BrokenPipeError):
        open_writer("jsonl", pipe).write(LINES[0])
    with pytest.raises(BrokenPipeError):
        pipe.close()
    if os.path.exists("/dev/full") and stat.S_ISCHR(os.stat("/dev/full").st_mode):
        full = open("/dev/full", "w", encoding="utf-8", newline="")  # noqa: SIM115 - likewise
        with pytest.raises(OSError, match="No space left"):
            open_writer("text", full).write(LINES[0])
        with pytest.raises(OSError, match="No space left"):
            full.close()


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match="expected one of text, jsonl, csv, tsv, got 'xml'"):
        open_writer("xml", io.StringIO())


def test_errors_of_text_go_to_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    open_writer("text", out).write(LINES[2])
    assert (out.getvalue(), capsys.readouterr().err.startswith("bad\\n.png\terror: ")) == ("", True)


def test_imports_nothing_heavy() -> None:
    code = "import sys, trocr_fast.writers; print([n for n in ('torch', 'numpy') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
