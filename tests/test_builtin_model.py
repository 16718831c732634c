"""The built-in model keeps what its card says, as far as the sample pictures can tell; and the card's arithmetic."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.builtin_model import calibration, confusions, ranking, review
from trocr_fast import TrOCR
from trocr_fast.checkpoint import BUILTIN
from trocr_fast.line import Line
from trocr_fast.metrics import evaluate, find_truths

ROOT = Path(__file__).parent.parent
CARD = ROOT / "docs" / "builtin_model.md"
LINES = ROOT / "examples" / "lines"
SAMPLES = sorted(path for path in LINES.iterdir() if path.suffix != ".txt")
LONGEST = 80


@pytest.fixture(scope="module")
def ocr() -> TrOCR:
    return TrOCR.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def samples(ocr: TrOCR) -> list[Line]:
    return list(ocr.read(SAMPLES))


def test_sample_pictures_are_read(samples: list[Line]) -> None:
    report = evaluate([truth.text for truth in find_truths(SAMPLES)], samples)
    assert report.score.cer <= 0.01, report.worst
    assert not any(line.truncated for line in samples)


def test_there_is_room_for_the_longest_line(ocr: TrOCR) -> None:
    assert ocr.read_max_length() >= LONGEST + 2
    assert max(len(truth.text) for truth in find_truths(SAMPLES)) > 70


def test_what_it_cannot_read_shows_in_the_confidence(ocr: TrOCR, samples: list[Line]) -> None:
    upside_down = [Image.open(path).convert("RGB").transpose(Image.Transpose.ROTATE_180) for path in SAMPLES]
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (32, 40 * n, 3), dtype=np.uint8) for n in range(1, 16)]
    usual = np.median([line.confidence for line in samples])
    for outside in (upside_down, noise):
        assert np.quantile([line.confidence for line in ocr.read(outside)], 0.8) < usual - 0.1


def test_the_card_shows_the_alphabet() -> None:
    vocabulary = json.loads((BUILTIN / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    characters = {token for token in vocabulary if len(token) == 1}
    [block] = re.findall(
        r"The alphabet, and the space:\n\n```\n(.*?)\n```", CARD.read_text(encoding="utf-8"), re.DOTALL
    )
    assert set(block.split()) | {" "} == characters
    assert len(block.split()) + 1 == len(characters)
    text = "".join(truth.text for truth in find_truths(SAMPLES))
    assert set(text) <= characters


def test_calibration_of_a_model_that_knows_itself() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.random(20_000)
    right = rng.random(20_000) < predicted
    edges = (0.0, 0.25, 0.5, 1.0)
    honest, boasting = calibration(predicted, right, edges), calibration(np.sqrt(predicted), right, edges)
    assert honest["ece"] < 0.01 and boasting["ece"] == pytest.approx(1 / 6, abs=0.01)  # the mean of sqrt(p) - p
    assert [row["lines"] for row in honest["bins"]] == [
        ((predicted >= low) & (predicted < high)).sum() for low, high in ((0, 0.25), (0.25, 0.5), (0.5, 1))
    ]
    edge_values = calibration(np.array([0.0, 0.25, 1.0]), np.array([False, True, True]), edges)
    assert [(row["from"], row["lines"]) for row in edge_values["bins"]] == [(0.0, 1), (0.25, 1), (0.5, 1)]


def test_ranking_and_review() -> None:
    confidence = np.arange(20) / 20
    right = np.arange(20) >= 4  # the four least confident are wrong
    assert ranking(confidence, right) == {"auroc": 1.0, "wrong_found_in_least_confident_tenth": 0.5}
    assert ranking(1 - confidence, right) == {"auroc": 0.0, "wrong_found_in_least_confident_tenth": 0.0}
    assert ranking(np.ones(20), right)["auroc"] == 0.5
    assert ranking(confidence, np.ones(20, bool))["auroc"] is None
    assert review(confidence, right, (0.1, 0.5)) == [
        {"threshold": 0.1, "below": 0.1, "wrong_found": 0.5, "exact_of_the_rest": 0.88889},
        {"threshold": 0.5, "below": 0.5, "wrong_found": 1.0, "exact_of_the_rest": 1.0},
    ]


def test_confusions_name_both_characters() -> None:
    texts = [("l00l", "lO0l"), ("00", "O0"), ("a b", "ab"), ("ab", "abc"), ("same", "same"), ("", "x")]
    assert confusions(texts) == {"'0' as 'O'": 2, "' ' as ''": 1, "'' as 'c'": 1}
    assert confusions(texts[4:]) == {}
