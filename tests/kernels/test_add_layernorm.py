"""add_layernorm against its reference, through Triton's interpreter (or on a GPU where there is one)."""

import pytest
import torch

from trocr_fast.kernels.add_layernorm import add_layernorm, cases, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Awkward sizes, and the real widths with few rows: the interpreter takes a millisecond a row.
SHAPES = [(1, 1), (3, 7), (2, 64), (5, 257), (2, 1023), (2, 1025), *sorted({(3, width) for _, width in cases()})]


def arguments(rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 10_007 + width)
    shapes = [(rows, width), (rows, width), (width,), (width,)]
    # a mean far from zero shows a variance that is computed as E[x^2] - E[x]^2
    return [(torch.randn(shape, generator=generator) + 3).to(DEVICE, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(shape, dtype, monkeypatch)


@pytest.mark.gpu  # and in bf16, whose arithmetic the interpreter gets wrong
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES + cases(), ids=str)
def test_equals_reference_on_a_gpu(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(shape, dtype, monkeypatch)


def check(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = arguments(*shape, dtype)
    # Poisoned outputs: an element that is not written stays NaN and fails the comparison.
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
    got = add_layernorm(*inputs, 1e-5)
    exact = reference(*[x.double() for x in inputs], 1e-5)
    same_mathematics = reference(*inputs, 1e-5)
    for name, ours, theirs, truth in zip(("sum", "out"), got, same_mathematics, exact, strict=True):
        error = (ours.double() - truth.double()).abs().max().item()
        allowed = 2 * (theirs.double() - truth.double()).abs().max().item() + 1e-6
        assert error <= allowed, f"{name}: largest error {error:.3g}, allowed {allowed:.3g}"


def test_empty_batch_launches_nothing() -> None:
    total, out = add_layernorm(*arguments(0, 8, torch.float32), 1e-5)
    assert total.shape == out.shape == (0, 8)


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (1, lambda x: x[:, :-1], "residual"),
        (1, lambda x: x.half(), "residual"),
        (2, lambda x: x[:-1], "weight"),
        (3, lambda x: x[None], "bias"),
        (0, lambda x: x.T.contiguous().T, "x"),
    ],
)
def test_wrong_arguments_are_named(index: int, change, name: str) -> None:
    inputs = arguments(4, 8, torch.float32)
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        add_layernorm(*inputs, 1e-5)
