"""`trocr-fast bench`: this engine beside transformers, on pictures of the user's own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from trocr_fast import TrOCR
from trocr_fast.benchmark import OURS, measure, table
from trocr_fast.checkpoint import BUILTIN
from trocr_fast.cli import app
from trocr_fast.errors import UsageError
from trocr_fast.verify import Reference

LINES = Path(__file__).parent.parent / "examples" / "lines"
SAMPLES = [LINES / name for name in ("gate.png", "hello.jpg", "sale.webp", "sign.png", "book.jpg")]
SHIPPED = "transformers as shipped, use_cache=True"


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(BUILTIN, torch.device("cpu"))


@pytest.fixture
def ocr() -> TrOCR:
    return TrOCR.from_pretrained(device="cpu")


@pytest.fixture
def pixels(ocr: TrOCR) -> list[np.ndarray]:
    return [ocr.images.load(path) for path in SAMPLES]


def shares(report: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["equal_share"] for row in report["rows"]}


def test_json_with_a_bad_picture(tmp_path: Path) -> None:
    """It is left out, named and counted."""
    bad = tmp_path / "bad.png"
    bad.write_text("not a picture")
    done = bench(*SAMPLES[:3], bad, *SAMPLES[3:], "--batch-size", 2, "--repeats", 2, "--device", "cpu", "--json")
    assert done.exit_code == 1, done.output
    report = json.loads(done.stdout)
    assert (report["num_lines"], report["num_unreadable"]) == (5, 1)
    assert (report["batch_size"], report["repeats"], report["dtype"]) == (2, 2, "float32")
    assert shares(report) == {OURS: 1.0, SHIPPED: 1.0}
    for row in report["rows"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert row["lines_per_second"] == pytest.approx(5 / (sum(row["seconds"]) / 2))
    assert "bad.png: left out: expected" in done.stderr
    assert [done.stderr.count(f"turn {turn} of 2: ") for turn in (1, 2)] == [2, 2]


def test_table() -> None:
    done = bench(SAMPLES[0], "--repeats", 1, "--device", "cpu")
    assert done.exit_code == 0, done.output
    what, heading, *rows = done.stdout.splitlines()
    assert what.startswith("1 lines, batches of 16, float32, cpu,") and "equal tokens" in heading
    assert [row.split("  ")[0] for row in rows] == [OURS, SHIPPED]
    assert all(row.endswith(" 100.0%") for row in rows)


def test_times_as_fast_and_shares_in_the_table() -> None:
    rows = [
        {"name": "a", "lines_per_second": 12.0, "equal_share": 1.0},
        {"name": "longer", "lines_per_second": 3.0, "equal_share": 0.5},
    ]
    circumstances = {"num_lines": 2, "batch_size": 1, "dtype": "d", "device": "e", "cross_memory": "m", "repeats": 3}
    *_, first, second = table(circumstances | {"rows": rows})
    assert first.split() == ["a", "12", "1.00x", "100.0%"] and second.split() == ["longer", "3", "4.00x", "50.0%"]


def test_a_checkpoint_that_ships_without_cache_is_also_run_with_one(
    ocr: TrOCR, reference: Reference, pixels: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ocr.model.config
    ocr.model.config = replace(config, generation=replace(config.generation, use_cache=False))
    asked = []
    own = reference.model.generate
    monkeypatch.setattr(reference.model, "generate", lambda *a, **k: asked.append(k["use_cache"]) or own(*a, **k))
    report = measure(ocr, reference, pixels[:2], batch_size=1, repeats=1)
    names = [OURS, "transformers, use_cache=True", "transformers as shipped, use_cache=False"]
    assert list(shares(report)) == names and set(shares(report).values()) == {1.0}
    assert asked == [True, False, True, True, False, False]  # a line of warm-up, then both


def test_wrong_tokens_show(ocr: TrOCR, reference: Reference, pixels: list[np.ndarray]) -> None:
    ocr.model.decoder.layers[0].cross_norm[0].neg_()
    found = shares(measure(ocr, reference, pixels, batch_size=4, repeats=1))
    assert found[OURS] < 1 and found[SHIPPED] == 1


def test_half_precision_is_compared_with_float32(pixels: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers runs in that dtype too, and may differ from itself."""
    ocr, reference = TrOCR.from_pretrained(device="cpu", dtype="bfloat16"), Reference(BUILTIN, torch.device("cpu"))
    ran: list[tuple[torch.dtype, list[list[int]]]] = []
    own = reference.tokens

    def tokens(*arguments: Any, **settings: Any) -> list[list[int]]:
        ran.append((reference.model.dtype, own(*arguments, **settings)))
        return ran[-1][1]

    monkeypatch.setattr(reference, "tokens", tokens)
    report = measure(ocr, reference, pixels, batch_size=5, repeats=1)
    assert report["dtype"] == "bfloat16"
    assert [dtype for dtype, _ in ran] == [torch.float32, torch.bfloat16, torch.bfloat16]
    equal = [found == wanted for found, wanted in zip(ran[2][1], ran[0][1], strict=True)]
    assert shares(report)[SHIPPED] == sum(equal) / 5 and shares(report)[OURS] > 0.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "PATH"),
        (["--repeats", 0, SAMPLES[0]], "--repeats"),
        (["--batch-size", 0, SAMPLES[0]], "--batch-size"),
    ],
)
def test_wrong_usage(arguments: list[Any], said: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == 2 and said in done.stderr


def test_nothing_to_measure(tmp_path: Path, ocr: TrOCR, reference: Reference, pixels: list[np.ndarray]) -> None:
    (tmp_path / "bad.png").write_text("not a picture")
    done = bench(tmp_path, "--device", "cpu")
    assert isinstance(done.exception, UsageError) and "got 1 that can't" in str(done.exception)
    for name, value in (("pixels", []), ("batch_size", 0), ("repeats", 0)):
        with pytest.raises(UsageError, match=f"{name}: expected at least 1, got 0"):
            measure(ocr, reference, **{"pixels": pixels, "batch_size": 1, "repeats": 1, name: value})
