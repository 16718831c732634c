"""A small model of each family, computed wholly by the Triton kernels, gives transformers' tokens in fp32.

Without a GPU Triton's interpreter runs them, a few milliseconds each, so rows are few and short.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.parity.models import MAX_LENGTH, Case, cut, greedy, lively_reference, save
from trocr_fast import ops, triton_ops
from trocr_fast.cross_memory import KINDS
from trocr_fast.kernels.launch import Launch
from trocr_fast.model import Model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_ROWS, NUM_TOKENS = (40, MAX_LENGTH) if torch.cuda.is_available() else (7, 6)
CASES = [
    Case("A", width=16, heads=2),
    Case("B", width=16, heads=1, use_cache=False, bridge="proj"),
    Case("C", width=12, heads=2, encoder="deit", qkv_bias=True, encoder_activation="gelu_new"),
]
KERNELS = {
    "add_layernorm_kernel",
    "encoder_attention_kernel",
    "linear_activation_kernel",
    "lm_head_kernel",
    "paged_attention_kernel",
    "skinny_dot_kernel",
}
BY_KIND = {"kv": "cross_attention_kernel", "latent": "latent_cross_attention_kernel"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each kernel was launched."""
    counts: Counter[str] = Counter()
    run = Launch.run

    def counted(launch: Launch) -> None:
        counts[launch.kernel.__name__] += 1
        run(launch)

    monkeypatch.setattr(Launch, "run", counted)
    with ops.use("all=triton"):
        yield counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_equal_transformers(case: Case, kind: str, tmp_path: Path, launched: Counter[str]) -> None:
    reference, pixels, eos = lively_reference(case)
    expected = [cut(row, eos) for row in reference.generate(pixels, max_length=NUM_TOKENS).tolist()]
    # Two that end early, so that rows leave the batch; the others last.
    order = sorted(range(len(expected)), key=lambda row: len(expected[row]))
    chosen = order[:2] + order[2 - NUM_ROWS :]
    expected = [expected[row] for row in chosen]
    assert len({len(row) for row in expected}) > 1 and len({tuple(row) for row in expected}) > 2
    save(reference, tmp_path)
    model = Model.load(tmp_path, DEVICE, torch.float32, kind)
    found = greedy(model, pixels[chosen], NUM_TOKENS)
    assert [hypothesis.tokens for hypothesis in found] == expected
    assert {*KERNELS, BY_KIND[kind]} <= launched.keys()


def test_large_layers_by_tensor_descriptor(
    tmp_path: Path, launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the encoders of real models, which have more rows than the interpreter could take."""
    reference, pixels, _ = lively_reference(Case("A"))
    model = Model.load(save(reference, tmp_path), DEVICE, torch.float32, "kv")
    pixels = pixels[:2].to(DEVICE)
    with ops.use("all=torch"):
        expected = model.encoder(pixels)
    monkeypatch.setattr(triton_ops, "PERSISTENT_ABOVE", 0)
    torch.testing.assert_close(model.encoder(pixels), expected, rtol=1e-4, atol=1e-4)
    assert launched["linear_persistent_kernel"] and not launched["linear_activation_kernel"]


def test_pictures_of_8_bits(tmp_path: Path, launched: Counter[str]) -> None:
    """They are normalised as their patches are cut: the same as normalising them first."""
    reference, _, _ = lively_reference(Case("A"))
    model = Model.load(save(reference, tmp_path), DEVICE, torch.float32, "kv")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=generator)
    table = torch.randn(3, 256, generator=generator)
    expected = model.encoder(ops.normalise_pixels(pixels, table).to(DEVICE))
    found = model.encoder(pixels.to(DEVICE), table.to(DEVICE))
    assert launched["pixels_to_patches_kernel"] == 1
    assert torch.equal(found, expected)
