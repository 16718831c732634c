"""CER and WER: known values by hand, an edit distance of our own as oracle, and the ways to find truths."""

import builtins
import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trocr_fast.line import Line
from trocr_fast.metrics import MissingExtraError, Truth, TruthError, evaluate, find_truths


def _lines(*texts: str | None) -> list[Line]:
    return [Line(f"{i}.png", text, error="no" if text is None else None) for i, text in enumerate(texts)]


def test_corpus_level() -> None:
    # Edits: 1 of 3, 0 of 10, 2 of 2; the mean of the three rates would be 0.44.
    report = evaluate(["abc", "ten letter", "xy"], _lines("abd", "ten letter", "zw"))
    score = report.score
    assert (score.cer, score.wer) == pytest.approx((3 / 15, 2 / 4))
    assert (score.num_lines, score.num_equal, score.num_errors, score.num_characters) == (3, 1, 0, 15)
    assert [(w.path, w.num_edits, w.truth, w.text) for w in report.worst] == [
        ("2.png", 2, "xy", "zw"),
        ("0.png", 1, "abc", "abd"),
    ]


def test_unread_picture_is_all_deleted_and_counted_apart() -> None:
    report = evaluate(["two words", "ok", ""], _lines(None, "ok", None))
    score = report.score
    assert (score.cer, score.wer) == pytest.approx((9 / 11, 2 / 3))
    assert (score.num_lines, score.num_equal, score.num_errors, score.num_characters) == (3, 1, 2, 11)
    assert [(w.path, w.num_edits, w.text, w.error) for w in report.worst] == [("0.png", 9, None, "no")]


def test_more_read_than_written_passes_one() -> None:
    assert evaluate(["a"], _lines("abcd")).score.cer == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("truths", "texts", "cer", "num_equal"),
    [([], [], 0, 0), ([""], [""], 0, 1), (["", " "], ["", "xx"], 1, 1), (["", "ab"], ["x", "ab"], 0.5, 1)],
)
def test_empty_truths(truths: list[str], texts: list[str], cer: float, num_equal: int) -> None:
    score = evaluate(truths, _lines(*texts)).score
    assert math.isfinite(score.cer) and math.isfinite(score.wer)
    assert score.cer == pytest.approx(cer)
    assert score.num_equal == num_equal


def test_nfc_of_both_and_nothing_more() -> None:
    composed, decomposed = "é Å", unicodedata.normalize("NFD", "é Å")
    assert evaluate([composed, decomposed], _lines(decomposed, composed)).score.cer == 0
    # Case, punctuation, compatibility forms and inner spaces count; white space around the line does not.
    assert evaluate(["Ab, ﬁ"], _lines(" ab. fi \n")).score.cer == pytest.approx(4 / 5)
    score = evaluate(["a b"], _lines("a  b")).score
    assert (score.cer, score.wer) == pytest.approx((1 / 3, 0))


def test_worst_are_few_and_in_order() -> None:
    report = evaluate(["abcd"] * 6, _lines("abcx", "abxx", "abcd", "abxx", "xxxx", "abc"), num_worst=4)
    assert [(w.path, w.num_edits) for w in report.worst] == [
        ("4.png", 4), ("1.png", 2), ("3.png", 2), ("0.png", 1),
    ]  # fmt: skip


def _distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (x != y))
    return row[-1]


short = st.text("ab é", max_size=8)


@given(st.lists(st.tuples(short, short), min_size=1, max_size=5))
def test_against_an_edit_distance(pairs: list[tuple[str, str]]) -> None:
    truths, texts = [a for a, _ in pairs], [b for _, b in pairs]
    report = evaluate(truths, _lines(*texts))
    edits = [_distance(a.strip(), b.strip()) for a, b in pairs]
    characters = sum(len(a.strip()) for a in truths)
    assert report.score.num_characters == characters
    assert sum(w.num_edits for w in report.worst) == sum(edits)
    if characters:  # or the rate has a definition of its own, tested above
        assert report.score.cer == pytest.approx(sum(edits) / characters)


def test_lengths_must_match() -> None:
    with pytest.raises(ValueError, match="expected 2, one for each truth, got 1"):
        evaluate(["a", "b"], _lines("a"))


def test_without_jiwer(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def blocked(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "jiwer":
            raise ImportError("No module named 'jiwer'", name="jiwer")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(MissingExtraError, match=r"pip install 'trocr_fast\[eval\]'") as caught:
        evaluate(["a"], _lines("a"))
    assert isinstance(caught.value, ImportError)


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_truth_beside_the_picture(tmp_path: Path) -> None:
    _write(tmp_path / "b.gt.txt", "last\r\n")
    _write(tmp_path / "a.v1.gt.txt", "\ufeff with a mark, é \n")
    _write(tmp_path / "sub" / "empty.gt.txt", "")
    pictures = [tmp_path / "b.png", tmp_path / "a.v1.JPG", tmp_path / "sub" / "empty.tif"]
    assert find_truths(pictures) == [
        Truth(pictures[0], "last"),
        Truth(pictures[1], " with a mark, é "),
        Truth(pictures[2], ""),
    ]


def test_missing_truths_are_named(tmp_path: Path) -> None:
    _write(tmp_path / "0.gt.txt", "x")
    with pytest.raises(TruthError, match=r"expected .*1\.gt\.txt, .*2\.gt\.txt, .*3\.gt\.txt and 2 more"):
        find_truths([tmp_path / f"{i}.png" for i in range(6)])


LABELS = [("a.png", 'say "x",\ty'.replace("\t", " ")), ("sub/b c.png", r"\tau \\ é"), ("/abs/c.png", "")]


@pytest.mark.parametrize("columns", [("path", "text"), ("file_name", "text"), ("image", "label")])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "CSV"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_labels(kind: str, columns: tuple[str, str], mark: str, newline: str, tmp_path: Path) -> None:
    if kind == "jsonl":
        rows = [json.dumps({"id": 1, columns[0]: p, columns[1]: t}, ensure_ascii=False) for p, t in LABELS]
    elif kind == "tsv":
        rows = ["\t".join(("id", *columns)), *(f"1\t{p}\t{t}" for p, t in LABELS)]
    else:
        quoted = ['"' + t.replace('"', '""') + '"' for _, t in LABELS]
        rows = [",".join(("id", *columns)), *(f"1,{p},{t}" for (p, _), t in zip(LABELS, quoted, strict=True))]
    path = _write(tmp_path / f"labels.{kind}", mark + newline.join(rows) + newline)
    expected = [Truth(tmp_path / p, t) for p, t in LABELS]
    assert expected[2].path == Path("/abs/c.png")
    assert find_truths([path]) == expected


def test_labels_and_pictures_in_order(tmp_path: Path) -> None:
    _write(tmp_path / "z.gt.txt", "z")
    labels = _write(tmp_path / "labels.csv", "path,text\nb.png,line\u2028separator\na.png,\n")
    assert [t.text for t in find_truths([labels, tmp_path / "z.png", labels])] == [
        "line\u2028separator", "", "z", "line\u2028separator", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gt.txt", "one\ntwo\n", "a.gt.txt: expected one line of text, found 2"),
        ("a.gt.txt", b"\xff\xfea", "a.gt.txt: expected a text file in UTF-8"),
        ("l.csv", "name,text\na,b\n", "row 1: expected path or file_name or image, and text or label, found"),
        ("l.csv", "path,text\na\n", "row 1: expected"),
        ("l.csv", 'path,text\na,"b\n', "l.csv: broken labels file"),
        ("l.tsv", "path\ttext\n\tb\n", "row 1: expected"),
        ("l.tsv", "path\ttext\nb\n", "row 1: expected"),
        ("l.jsonl", '{"path": "a", "text": "b"}\n[1]\n', "row 2: expected"),
        ("l.jsonl", '{"path": "a", "text": 5}\n', "row 1: expected"),
        ("l.jsonl", '{"path": ', "l.jsonl: broken labels file"),
    ],
)
def test_broken_truths(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = _write(tmp_path / name, content)
    with pytest.raises(TruthError, match=message) as caught:
        find_truths([tmp_path / "a.png" if name == "a.gt.txt" else path])
    assert str(path) in str(caught.value)


def test_absent_labels_file(tmp_path: Path) -> None:
    with pytest.raises(TruthError, match=r"labels\.csv: expected a text file"):
        find_truths([tmp_path / "labels.csv"])
