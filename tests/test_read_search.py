"""`read` with the search that it is asked for, on the built-in model."""

import json
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import VisionEncoderDecoderModel

from trocr_fast import TrOCR
from trocr_fast.checkpoint import BUILTIN
from trocr_fast.errors import UsageError

LINES = Path(__file__).parent.parent / "examples" / "lines"
SAMPLES = sorted(path for path in LINES.iterdir() if path.suffix != ".txt")[:9]


@pytest.fixture(scope="module")
def ocr() -> TrOCR:
    return TrOCR.from_pretrained(device="cpu")


@cache
def reference() -> VisionEncoderDecoderModel:
    return VisionEncoderDecoderModel.from_pretrained(BUILTIN).eval()


@pytest.mark.parametrize(
    "search",
    [
        {"num_beams": 4},
        {"num_beams": 3, "length_penalty": -4.0, "early_stopping": True},
        {"num_beams": 2, "early_stopping": "never", "no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.8},
    ],
    ids=str,
)
def test_tokens_equal_those_of_transformers(ocr: TrOCR, search: dict[str, Any]) -> None:
    pictures = [_faint(path) for path in SAMPLES]
    pixels = ocr.pixel_values([ocr.images.load(picture) for picture in pictures])
    expected = reference().generate(pixels, max_new_tokens=50, **search).tolist()
    lines = list(ocr.read(pictures, batch_size=4, max_new_tokens=50, **search))
    for line, row in zip(lines, expected, strict=True):
        assert line.token_ids == row[: len(line.token_ids)]
        assert set(row[len(line.token_ids) :]) <= {reference().generation_config.pad_token_id}
    assert [line.token_ids for line in lines] != [line.token_ids for line in ocr.read(pictures, max_new_tokens=50)]


def _faint(path: Path) -> Image.Image:
    """So small that the model is unsure: of a clear picture every search finds the same."""
    image = Image.open(path).convert("RGB")
    return image.resize((image.width // 5, image.height // 5))


def test_sampled_texts_depend_on_the_seed_alone(ocr: TrOCR) -> None:
    def read(**options: Any) -> list[list[int] | None]:
        return [line.token_ids for line in ocr.read(SAMPLES[:5], do_sample=True, temperature=3.0, **options)]

    expected = read(seed=3)
    assert expected == read(seed=3, batch_size=1) == read(seed=3, batch_size=4, num_workers=1)
    assert sum(a != b for a, b in zip(expected, read(), strict=True)) > 3


def test_a_line_has_the_same_draws_beside_a_bad_picture(ocr: TrOCR) -> None:
    search = {"do_sample": True, "temperature": 3.0}
    plain = [line.text for line in ocr.read(SAMPLES[:1] * 5, **search)]
    assert len(set(plain)) == 5  # the same picture again is drawn anew
    mixed = [SAMPLES[0], b"", SAMPLES[0], "no/such/file.png", SAMPLES[0]]
    assert [line.text for line in ocr.read(mixed, **search)] == [plain[0], None, plain[2], None, plain[4]]


def test_low_temperature_reads_greedily(ocr: TrOCR) -> None:
    cold = list(ocr.read(SAMPLES[:5], do_sample=True, temperature=1e-4))
    assert [line.token_ids for line in cold] == [line.token_ids for line in ocr.read(SAMPLES[:5])]


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 2.0}], ids=str)
def test_log_probabilities_of_tokens_on_request(ocr: TrOCR, search: dict[str, Any]) -> None:
    for line in ocr.read(SAMPLES[:3], token_log_probs=True, **search):
        assert len(line.token_log_probs) == len(line.token_ids) - 1
        mean = torch.tensor(line.token_log_probs).mean().exp().item()
        assert line.confidence == pytest.approx(mean, rel=1e-5) and max(line.token_log_probs) <= 0
    assert all(line.token_log_probs is None for line in ocr.read(SAMPLES[:1], **search))
    assert next(ocr.read([b""], token_log_probs=True, **search)).token_log_probs is None


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"num_beams": 0}, "num_beams: expected at least 1, got 0"),
        ({"num_beams": "4"}, "num_beams: expected at least 1, got '4'"),
        ({"num_beams": 2, "length_penalty": "long"}, "length_penalty: expected a number, got 'long'"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping: expected True, False or \"never\", got 'soon'"),
        ({"do_sample": True, "temperature": 0}, "temperature: expected a number above 0, got 0"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number above 0, got 0"),
        ({"no_repeat_ngram_size": [2]}, r"no_repeat_ngram_size: expected an integer from 0, got \[2\]"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: expected at least 1, got 1.5"),
        # contradictions
        ({"do_sample": True, "num_beams": 2}, "num_beams: expected 1 where tokens are sampled, got 2; .*`generate`"),
        ({"temperature": 0.5}, "temperature: expected do_sample=True beside it, got temperature=0.5 alone"),
        ({"num_beams": 2, "top_p": 0.5}, "top_p: expected do_sample=True beside it"),
        ({"length_penalty": 2.0}, "length_penalty: expected num_beams above 1 beside it, got length_penalty=2.0 alone"),
        ({"do_sample": True, "early_stopping": True}, "early_stopping: expected num_beams above 1 beside it"),
    ],
    ids=str,
)
def test_wrong_settings_are_named_before_anything_is_read(ocr: TrOCR, search: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        ocr.read(SAMPLES, **search)


def test_unknown_settings_are_refused(ocr: TrOCR) -> None:
    with pytest.raises(TypeError, match="num_beam'"):
        ocr.read(SAMPLES, num_beam=4)


def test_equal_settings_are_equal(ocr: TrOCR) -> None:
    """Requests of equal settings can be decoded together."""
    search = {"num_beams": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3}
    assert ocr.search_settings(**search) == ocr.search_settings(**search) != ocr.search_settings(num_beams=2)
    sampling = {"do_sample": True, "top_p": 0.5}
    assert ocr.search_settings(**sampling) == ocr.search_settings(**sampling) != ocr.search_settings(do_sample=True)


def test_settings_of_the_checkpoint_are_not_followed_in_silence(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN, folder)
    path = folder / "generation_config.json"
    own = {"num_beams": 4, "no_repeat_ngram_size": 3, "length_penalty": 2.0, "early_stopping": False, "top_k": 5}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    ours = TrOCR.from_pretrained(folder, device="cpu")
    with pytest.warns(UserWarning, match="'num_beams': 4, 'no_repeat_ngram_size': 3.*plain greedy"):
        ours.read([])
    for search, left in (
        ({"num_beams": 2}, "'no_repeat_ngram_size': 3, 'length_penalty': 2.0"),
        ({"num_beams": 2, "length_penalty": 0.5}, "'no_repeat_ngram_size': 3"),
        ({"do_sample": True, "num_beams": 1}, "'no_repeat_ngram_size': 3, 'top_k': 5"),
    ):
        with pytest.warns(UserWarning, match=rf"settings \{{{left}\}} are not followed.*was asked for"):
            ours.read([], **search)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.read([], num_beams=1, no_repeat_ngram_size=3)
