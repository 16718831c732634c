"""linear_persistent against its reference, through Triton's interpreter (or on a GPU where there is one)."""

import pytest
import torch

from tests.kernels.compare import DEVICE, assert_close, assert_refused, over, poisoned
from trocr_fast.kernels import linear_activation
from trocr_fast.kernels import linear_persistent as module
from trocr_fast.kernels.bias_gelu import ACTIVATIONS
from trocr_fast.kernels.linear_persistent import cases, inputs, linear_persistent, reference

# (rows, in, out, activation): awkward sizes (rows of whole 16 bytes), then some real widths with few rows and columns.
SHAPES = [
    (1, 8, 8, None),
    (3, 24, 40, "gelu"),
    (129, 72, 264, "relu"),
    (65, 136, 56, "silu"),
    (257, 64, 512, "gelu_new"),
    (5, 384, 136, "gelu"),
    (20, 768, 96, None),
    (3, 1024, 320, "gelu"),
]


@over(SHAPES, cases())
def test_equals_reference(shape: tuple[int, int, int, str | None], dtype: torch.dtype) -> None:
    check(shape, dtype)


def check(shape: tuple[int, int, int, str | None], dtype: torch.dtype) -> None:
    arguments = inputs(shape, dtype, DEVICE, seed=sum(shape[:3]))
    (out,) = poisoned(torch.empty(shape[0], shape[2], dtype=dtype, device=DEVICE))
    assert_close([linear_persistent(*arguments, out=out)], reference, arguments)


@pytest.mark.parametrize("programs", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_program_takes_several_tiles(programs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_multiprocessors", lambda _: programs)
    monkeypatch.setattr(linear_activation, "GROUP_M", 2)  # and the last group of rows is not full
    check((257, 72, 520, "relu"), dtype)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, None])
def test_without_bias(activation: str | None) -> None:
    x, weight, _, _ = inputs((3, 40, 24, None), torch.float32, DEVICE)
    assert_close([linear_persistent(x, weight, None, activation)], reference, (x, weight, None, activation))


def test_reads_and_writes_nothing_outside() -> None:
    """Rows before the first and after the last are neither read nor written, nor are those of the weight."""
    x, weight, bias, activation = inputs((7, 24, 32, "gelu"), torch.float32, DEVICE)
    expected = linear_persistent(x[1:6].clone(), weight[4:28].clone(), bias[4:28].clone(), activation)
    for tensor in (x, weight, bias):
        tensor[:1], tensor[-1:] = torch.nan, torch.nan
    weight[:4], weight[28:], bias[:4], bias[28:] = (torch.nan,) * 4
    (around,) = poisoned(torch.empty(7, 24, device=DEVICE))
    linear_persistent(x[1:6], weight[4:28], bias[4:28], activation, out=around[1:6])
    assert torch.equal(around[1:6], expected)
    assert around[0].isnan().all() and around[6].isnan().all()


def test_empty_batch_launches_nothing() -> None:
    assert linear_persistent(*inputs((0, 8, 16, "gelu"), torch.float32, DEVICE)).shape == (0, 16)


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (0, lambda x: x.T.contiguous().T, "x"),
        (0, lambda x: x.double(), "x"),
        (0, lambda x: x[0], "x"),
        (0, lambda x: torch.empty(33, device=DEVICE)[1:].view(4, 8), "x"),  # begins between two multiples of 16 bytes
        (1, lambda x: x[:, :-1].contiguous(), "weight"),
        (1, lambda x: x.half(), "weight"),
        (2, lambda x: x[:-1], "bias"),
        (3, lambda _: "tanh", "activation"),
        (4, lambda x: x[:-1], "out"),
        (4, lambda x: x.half(), "out"),
    ],
)
def test_wrong_arguments_are_named(index: int, change, name: str) -> None:
    arguments = [*inputs((4, 8, 12, "gelu"), torch.float32, DEVICE), torch.empty(4, 12, device=DEVICE)]
    assert_refused(linear_persistent, arguments, index, change, name)


@pytest.mark.parametrize(("shape", "name"), [((4, 6, 8, None), "x"), ((4, 8, 6, None), "out")])
def test_rows_that_are_not_aligned_are_named(shape: tuple[int, int, int, None], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected rows"):
        linear_persistent(*inputs(shape, torch.float32, DEVICE))
