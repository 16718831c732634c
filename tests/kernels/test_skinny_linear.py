"""skinny_linear against its reference, through Triton's interpreter (or on a GPU where there is one)."""

import pytest
import torch

from tests.kernels.compare import DEVICE, assert_close, assert_refused, over, poisoned
from trocr_fast.kernels.bias_gelu import ACTIVATIONS
from trocr_fast.kernels.skinny_linear import blocks, cases, inputs, launches, reference, skinny_linear

Case = tuple[int, int, int, str | None]
# Awkward sizes, among them one column more than a tile and more than a split, and the real widths with few outputs:
# the interpreter takes some ten milliseconds a program.
SHAPES: list[Case] = [
    (1, 1, 1, None),
    (2, 7, 3, "gelu"),
    (3, 64, 65, "silu"),
    (4, 1025, 5, "relu"),
    (3, 2049, 33, None),
    (5, 1, 1, "gelu_new"),
    (7, 65, 17, "gelu"),
    (13, 257, 31, None),
    (16, 1025, 33, "silu"),
    (9, 577, 64, None),
    *sorted({(rows, width_in, 40, "gelu") for rows, width_in, _, _ in cases()}),
]


@over(SHAPES, cases())
def test_equals_reference(shape: Case, dtype: torch.dtype) -> None:
    check(shape, dtype)


def check(case: Case, dtype: torch.dtype, with_bias: bool = True) -> None:
    x, weight, bias, activation = inputs(case, dtype, DEVICE, seed=sum(case[:3]))
    arguments = (x, weight, bias if with_bias else None, activation)
    (out,) = poisoned(torch.empty(case[0], case[2], dtype=dtype, device=DEVICE))
    assert_close([skinny_linear(*arguments, out=out)], reference, arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("width_in", [24, 4096])  # in one part, and split
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_every_activation(activation: str | None, rows: int, width_in: int, with_bias: bool) -> None:
    check((rows, width_in, 19, activation), torch.float32, with_bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_huge_values_is_finite(activation: str | None) -> None:
    x = torch.tensor([[-1e4], [-50.0], [50.0], [1e4]], device=DEVICE)
    arguments = (x, torch.ones(1, 1, device=DEVICE), None, activation)
    assert_close([skinny_linear(*arguments)], reference, arguments)


@pytest.mark.parametrize("rows", [3, 8])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_in_its_row(rows: int, activation: str | None) -> None:
    x, weight, bias, _ = inputs((rows, 40, 21, None), torch.float32, DEVICE)
    x[1, 3] = torch.nan
    bad = skinny_linear(x, weight, bias, activation).isnan()
    assert bad[1].all() and bad.sum() == 21


def test_splits_fill_the_chip_and_give_the_same_result_twice() -> None:
    for rows in (1, 16):
        arguments = inputs((rows, 4096, 64, "gelu"), torch.float16, DEVICE)
        first, merge = launches(*arguments)
        assert first.grid[1] > 1 and merge.grid[0] * merge.grid[1] > 0
        assert torch.equal(skinny_linear(*arguments), skinny_linear(*arguments))


@pytest.mark.parametrize("rows", [1, 4, 5, 16])
def test_parts_cover_every_column_once(rows: int) -> None:
    for width_in in (1, 255, 1024, 1025, 2047, 4096, 5000):
        (first, *_) = launches(*inputs((rows, width_in, 48, None), torch.float16, "meta"))
        part, splits = first.arguments["part"], first.grid[1]
        assert (splits - 1) * part < width_in <= splits * part
        assert part % blocks(rows, width_in, 48, torch.float16)[1] == 0


def test_the_tiles_of_the_wide_head(monkeypatch: pytest.MonkeyPatch) -> None:
    # the interpreter would take a minute for so many outputs; its tiles are proven with few
    wide = blocks(16, 1024, 50265, torch.float16)
    monkeypatch.setattr("trocr_fast.kernels.skinny_linear.blocks", lambda *_: wide)
    check((16, 1024, 130, None), torch.float16)


def test_empty_batch_launches_nothing() -> None:
    assert skinny_linear(*inputs((0, 8, 5, "gelu"), torch.float32, DEVICE)).shape == (0, 5)
    assert skinny_linear(*inputs((0, 8192, 5, None), torch.float32, DEVICE)).shape == (0, 5)


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (0, lambda x: x.T.contiguous().T, "x"),
        (0, lambda x: x.double(), "x"),
        (0, lambda x: x.repeat(5, 1), "x"),
        (0, lambda x: x[0], "x"),
        (1, lambda x: x[:, :-1].contiguous(), "weight"),
        (1, lambda x: x.half(), "weight"),
        (1, lambda x: x.T.contiguous().T, "weight"),
        (2, lambda x: x[:-1], "bias"),
        (2, lambda x: x.half(), "bias"),
        (3, lambda x: "swish", "activation"),
        (4, lambda x: torch.empty(4, 5, device=DEVICE), "out"),
        (4, lambda x: torch.empty(4, 6, device=DEVICE).half(), "out"),
    ],
)
def test_wrong_arguments_are_named(index: int, change, name: str) -> None:
    arguments = [*inputs((4, 8, 6, None), torch.float32, DEVICE), None]
    assert_refused(skinny_linear, arguments, index, change, name)
