"""add_layernorm against its reference, through Triton's interpreter (or on a GPU where there is one)."""

import pytest
import torch

from tests.kernels.compare import assert_close, poisoned
from trocr_fast.kernels.add_layernorm import add_layernorm, cases, inputs, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Awkward sizes, and the real widths with few rows: the interpreter takes a millisecond a row.
SHAPES = [(1, 1), (3, 7), (2, 64), (5, 257), (2, 1023), (2, 1025), *sorted({(3, width) for _, width in cases()})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_equals_reference(shape: tuple[int, int], dtype: torch.dtype, with_bias: bool) -> None:
    check(shape, dtype, with_bias)


@pytest.mark.gpu  # and in bf16, whose arithmetic the interpreter gets wrong
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES + cases(), ids=str)
def test_equals_reference_on_a_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(shape, dtype, with_bias=True)


def check(shape: tuple[int, int], dtype: torch.dtype, with_bias: bool) -> None:
    arguments = inputs(shape, dtype, DEVICE, seed=sum(shape))
    arguments = arguments if with_bias else arguments[:-1]
    total, out = poisoned(arguments[0], arguments[0])
    assert_close(add_layernorm(*arguments, total=total, out=out), reference, arguments)


def test_empty_batch_launches_nothing() -> None:
    total, out = add_layernorm(*inputs((0, 8), torch.float32, DEVICE))
    assert total.shape == out.shape == (0, 8)


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (0, lambda x: x.T.contiguous().T, "x"),
        (0, lambda x: x.double(), "x"),
        (1, lambda x: x[:, :-1], "residual"),
        (1, lambda x: x.half(), "residual"),
        (2, lambda x: x[:-1], "weight"),
        (3, lambda x: x[None], "bias"),
        (5, lambda x: x.half(), "x_bias"),
    ],
)
def test_wrong_arguments_are_named(index: int, change, name: str) -> None:
    arguments = list(inputs((4, 8), torch.float32, DEVICE))
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        add_layernorm(*arguments)
