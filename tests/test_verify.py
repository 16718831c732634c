"""`verify` finds what differs, says where and how sure the reference was, and tells ties apart."""

import math
from pathlib import Path

import pytest
import torch

from trocr_fast import CheckpointError, TrOCR
from trocr_fast.checkpoint import BUILTIN
from trocr_fast.verify import Difference, Reference, compare_row, verify

LINES = Path(__file__).parent.parent / "examples" / "lines"
SAMPLES = sorted(path for path in LINES.iterdir() if path.suffix != ".txt")[:8]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(BUILTIN, torch.device("cpu"))


def test_equal_rows_and_unreadable_ones(reference: Reference) -> None:
    ocr = TrOCR.from_pretrained(device="cpu")
    checks = list(verify(ocr, reference, [*SAMPLES[:3], b"", *SAMPLES[3:]], batch_size=2))
    assert [check.equal for check in checks] == [True] * 3 + [False] + [True] * 5
    assert "expected" in checks[3].error


def test_a_wrong_weight_is_found(reference: Reference) -> None:
    ocr = TrOCR.from_pretrained(device="cpu")
    weight = ocr.model.decoder.layers[0].cross_norm[0]
    weight.neg_()  # a mistake in one layer
    checks = list(verify(ocr, reference, SAMPLES, batch_size=4))
    different = [check for check in checks if not check.equal]
    assert different
    for check in different:
        found = check.difference
        assert not found.is_tie and found.our_token != found.reference_token
        assert found.margin > 2 * found.noise


def test_a_difference_is_judged_at_its_first_position(reference: Reference) -> None:
    ocr = TrOCR.from_pretrained(device="cpu")
    pixels = ocr.pixel_values([ocr.images.load(SAMPLES[0])])
    [theirs] = reference.tokens(pixels, 64)
    ours = [*theirs[:3], (theirs[3] + 1) % 100, *theirs[4:]]
    found = compare_row(reference, pixels[0], ours, theirs)
    logits = reference.model(pixels, decoder_input_ids=torch.tensor([theirs[:3]])).logits[0, -1]
    best, second = logits.topk(2).values.tolist()
    assert (found.position, found.our_token, found.reference_token) == (3, ours[3], theirs[3])
    assert found.margin == pytest.approx(best - second, abs=1e-3)
    assert found.gap == pytest.approx(best - logits[ours[3]].item(), abs=1e-3) and found.gap > found.margin
    shorter = compare_row(reference, pixels[0], theirs[:4], theirs)
    assert (shorter.position, shorter.our_token, shorter.reference_token) == (4, None, theirs[4])


def test_what_counts_as_a_tie() -> None:
    assert Difference(1, 2, 3, margin=2e-6, gap=2e-6, noise=1e-6).is_tie
    assert not Difference(1, 2, 3, margin=3e-6, gap=3e-6, noise=1e-6).is_tie
    assert not Difference(1, 2, 3, margin=1e-9, gap=1e-9, noise=0).is_tie
    # The two best are as good as equal, but ours is neither of them.
    assert not Difference(1, 2, 3, margin=1e-9, gap=5.0, noise=1e-6).is_tie
    # The reference itself takes another way in a batch of 8.
    assert Difference(1, 2, 3, margin=math.nan, gap=math.nan, noise=math.inf).is_tie


def test_other_text_for_equal_tokens_is_told(reference: Reference) -> None:
    ocr = TrOCR.from_pretrained(device="cpu")

    class Shouting:
        def batch_decode(self, rows):
            return [text.upper() + "!" for text in reference.texts(rows)]

    ocr.text = Shouting()
    [check] = verify(ocr, reference, SAMPLES[:1], batch_size=1)
    assert check.difference is None and check.texts_differ and not check.equal


def test_a_checkpoint_that_transformers_cannot_load_is_told(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((BUILTIN / name).read_bytes())
    with pytest.raises(CheckpointError, match="transformers loads too"):
        Reference(tmp_path, torch.device("cpu"))
