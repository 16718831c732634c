"""linear_activation against its reference, through Triton's interpreter (or on a GPU where there is one)."""

import pytest
import torch

from tests.kernels.compare import DEVICE, assert_close, assert_refused, over, poisoned
from trocr_fast import ops
from trocr_fast.kernels import linear_activation as module
from trocr_fast.kernels.bias_gelu import ACTIVATIONS
from trocr_fast.kernels.linear_activation import cases, inputs, linear_activation, reference

# (rows, in, out, activation): awkward sizes, then some real widths with few rows and columns.
SHAPES = [
    (1, 1, 1, None),
    (3, 7, 5, "gelu"),
    (17, 64, 33, "relu"),
    (65, 129, 31, "silu"),
    (31, 257, 127, "gelu_new"),
    (2, 16, 300, "gelu"),
    (5, 384, 130, "gelu"),
    (20, 768, 96, None),
    (1, 1024, 70, "gelu"),
    (64, 256, 64, "relu"),
]


@over(SHAPES, cases())
def test_equals_reference(shape: tuple[int, int, int, str | None], dtype: torch.dtype) -> None:
    check(shape, dtype)


def check(shape: tuple[int, int, int, str | None], dtype: torch.dtype) -> None:
    arguments = inputs(shape, dtype, DEVICE, seed=sum(shape[:3]))
    (out,) = poisoned(torch.empty(shape[0], shape[2], dtype=dtype, device=DEVICE))
    assert_close([linear_activation(*arguments, out=out)], reference, arguments)


@pytest.mark.parametrize("tile", [tile for _, tile in module.TILES_HALF], ids=str)
def test_every_tile_of_the_table(tile: module.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, column and step of depth more than a tile; a group of rows that is not full."""
    monkeypatch.setattr(module, "TILES_HALF", [(None, tile)])
    monkeypatch.setattr(module, "GROUP_M", 2)
    check((2 * tile.rows + 1, tile.depth + 1, tile.columns + 1, None), torch.float16)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, None])
def test_reference_is_the_linear_layer_of_ops(activation: str | None) -> None:
    x, weight, bias, _ = inputs((3, 8, 5, None), torch.float64, DEVICE)
    for one in (bias, None):
        torch.testing.assert_close(reference(x, weight, one, activation), ops.linear(x, weight, one, activation))


@pytest.mark.parametrize("activation", [*ACTIVATIONS, None])
def test_without_bias(activation: str | None) -> None:
    x, weight, _, _ = inputs((3, 40, 21, None), torch.float32, DEVICE)
    assert_close([linear_activation(x, weight, None, activation)], reference, (x, weight, None, activation))


def test_reads_and_writes_nothing_outside() -> None:
    """Rows before the first and after the last are neither read nor written, nor are those of the weight."""
    x, weight, bias, activation = inputs((7, 24, 23, "gelu"), torch.float32, DEVICE)
    expected = linear_activation(x[1:6].clone(), weight[1:22].clone(), bias[1:22].clone(), activation)
    for tensor in (x, weight, bias):
        tensor[0], tensor[-1] = torch.nan, torch.nan
    (around,) = poisoned(torch.empty(7, 21, device=DEVICE))
    linear_activation(x[1:6], weight[1:22], bias[1:22], activation, out=around[1:6])
    assert torch.equal(around[1:6], expected)
    assert around[0].isnan().all() and around[6].isnan().all()


def test_empty_batch_launches_nothing() -> None:
    assert linear_activation(*inputs((0, 8, 5, "gelu"), torch.float32, DEVICE)).shape == (0, 5)


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (0, lambda x: x.T.contiguous().T, "x"),
        (0, lambda x: x.double(), "x"),
        (0, lambda x: x[0], "x"),
        (1, lambda x: x[:, :-1].contiguous(), "weight"),
        (1, lambda x: x.half(), "weight"),
        (1, lambda x: x.T.contiguous().T, "weight"),
        (2, lambda x: x[:-1], "bias"),
        (2, lambda x: x.half(), "bias"),
        (3, lambda _: "tanh", "activation"),
        (4, lambda x: x[:-1], "out"),
        (4, lambda x: x.half(), "out"),
    ],
)
def test_wrong_arguments_are_named(index: int, change, name: str) -> None:
    arguments = [*inputs((4, 8, 6, "gelu"), torch.float32, DEVICE), torch.empty(4, 6, device=DEVICE)]
    assert_refused(linear_activation, arguments, index, change, name)
