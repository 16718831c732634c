"""bias_gelu against its reference, through Triton's interpreter (or on a GPU where there is one)."""

import pytest
import torch

from tests.kernels.compare import DEVICE, assert_close, assert_refused, over, poisoned
from trocr_fast import ops, torch_ops
from trocr_fast.kernels.bias_gelu import ACTIVATIONS, bias_gelu, cases, inputs, reference

# Awkward sizes, and the real widths with few rows.
SHAPES = [(1, 1), (3, 7), (17, 64), (5, 257), (9, 511), (2, 513), *sorted({(3, width) for _, width, _ in cases()})]


@over([(*shape, activation) for shape in SHAPES for activation in ACTIVATIONS], cases())
def test_equals_reference(shape: tuple[int, int, str], dtype: torch.dtype) -> None:
    arguments = inputs(shape, dtype, DEVICE, seed=sum(shape[:2]))
    (out,) = poisoned(arguments[0])
    assert_close([bias_gelu(*arguments, out=out)], reference, arguments)


def test_activations_are_those_of_ops() -> None:
    x, bias, _ = inputs((3, 8, "gelu"), torch.float64, DEVICE)
    for activation in torch_ops.ACTIVATIONS:
        expected = ops.linear(x, torch.eye(8, dtype=torch.float64, device=DEVICE), bias, activation)
        torch.testing.assert_close(reference(x, bias, activation), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(activation: str) -> None:
    """Nothing overflows on the way: far above zero x itself, far below it nothing; and NaN stays NaN."""
    x = torch.tensor([[1e30, 300.0, -300.0, -1e30, torch.nan, 0.0]], device=DEVICE)
    out = bias_gelu(x, torch.zeros(6, device=DEVICE), activation)
    assert out.isnan().tolist() == [[False] * 4 + [True, False]]
    assert torch.equal(out[:, [0, 1, 2, 3, 5]], torch.tensor([[1e30, 300.0, 0, 0, 0]], device=DEVICE))


def test_in_place() -> None:
    x, bias, activation = inputs((3, 70, "gelu"), torch.float32, DEVICE)
    expected = bias_gelu(x, bias, activation)
    assert bias_gelu(x, bias, activation, out=x) is x
    assert torch.equal(x, expected)


def test_writes_nothing_outside() -> None:
    x, bias, activation = inputs((5, 37, "gelu"), torch.float32, DEVICE)
    (around,) = poisoned(torch.empty(7, 37, device=DEVICE))
    bias_gelu(x, bias, activation, out=around[1:6])
    assert around[0].isnan().all() and around[6].isnan().all() and not around[1:6].isnan().any()


def test_empty_batch_launches_nothing() -> None:
    assert bias_gelu(*inputs((0, 8, "gelu"), torch.float32, DEVICE)).shape == (0, 8)


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (0, lambda x: x.T.contiguous().T, "x"),
        (0, lambda x: x.double(), "x"),
        (1, lambda x: x[:-1], "bias"),
        (1, lambda x: x.half(), "bias"),
        (2, lambda _: "tanh", "activation"),
        (2, lambda _: None, "activation"),
        (3, lambda x: x[:-1], "out"),
        (3, lambda x: x.half(), "out"),
    ],
)
def test_wrong_arguments_are_named(index: int, change, name: str) -> None:
    arguments = [*inputs((4, 8, "gelu"), torch.float32, DEVICE), torch.empty(4, 8, device=DEVICE)]
    assert_refused(bias_gelu, arguments, index, change, name)
