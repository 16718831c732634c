"""add_layernorm against its reference, through Triton's interpreter (or on a GPU where there is one)."""

import pytest
import torch

from tests.kernels.compare import DEVICE, assert_close, assert_refused, over, poisoned
from trocr_fast.kernels.add_layernorm import add_layernorm, cases, inputs, reference

# Awkward sizes, and the real widths with few rows: the interpreter takes a millisecond a row.
SHAPES = [(1, 1), (3, 7), (2, 64), (5, 257), (2, 1023), (2, 1025), *sorted({(3, width) for _, width in cases()})]


@over(SHAPES, cases())
def test_equals_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(inputs(shape, dtype, DEVICE, seed=sum(shape)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_bias_of_x(shape: tuple[int, int]) -> None:
    check(inputs(shape, torch.float16, DEVICE, seed=sum(shape))[:-1])


def check(arguments: tuple) -> None:
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
    arguments = inputs((4, 8), torch.float32, DEVICE)
    assert_refused(add_layernorm, arguments, index, change, name)
