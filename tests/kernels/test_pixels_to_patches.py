"""pixels_to_patches against its reference, through Triton's interpreter (or on a GPU where there is one)."""

import pytest
import torch

from tests.kernels.compare import DEVICE, assert_refused, over, poisoned
from trocr_fast import ops
from trocr_fast.kernels.pixels_to_patches import cases, inputs, pixels_to_patches, reference

Case = tuple[int, int, int, int, tuple[int, int]]
# Awkward sizes (nothing left over, something at either edge, pictures of one patch), then real pictures, fewer of them.
SHAPES = [
    (1, 1, 1, 1, (1, 1)),
    (2, 3, 7, 5, (2, 3)),
    (3, 3, 33, 47, (16, 16)),
    (2, 4, 28, 43, (14, 14)),
    (1, 3, 16, 16, (16, 16)),
    (2, 2, 17, 40, (5, 13)),
    (1, 3, 96, 64, (32, 32)),
    (1, 3, 64, 384, (16, 16)),
]


@over(SHAPES, cases())
def test_equals_reference(shape: Case, dtype: torch.dtype) -> None:
    check(shape, dtype)


def check(shape: Case, dtype: torch.dtype) -> None:
    """To the bit: it only looks values up and rounds them once."""
    arguments = inputs(shape, dtype, DEVICE, seed=sum(shape[:4]))
    expected = reference(*arguments)
    (out,) = poisoned(expected)
    assert torch.equal(pixels_to_patches(*arguments, out=out), expected)
    assert pixels_to_patches(*arguments).dtype == dtype


@pytest.mark.parametrize("shape", [(2, 3, 33, 47, (16, 16)), (1, 3, 8, 20, (4, 5))], ids=str)
def test_equals_the_operations_of_ops_to_the_bit(shape: Case) -> None:
    pixels, table, patch_size, dtype = inputs(shape, torch.float32, DEVICE)
    expected = ops.cut_patches(ops.normalise_pixels(pixels, table), patch_size)
    assert torch.equal(pixels_to_patches(pixels, table, patch_size, dtype), expected)


def test_every_value_of_every_channel() -> None:
    pixels = torch.arange(256, dtype=torch.uint8, device=DEVICE).expand(1, 3, 1, 256).contiguous()
    table = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    out = pixels_to_patches(pixels, table, (1, 1), torch.float32)
    assert torch.equal(out, table.T[None])


def test_the_edges_are_dropped() -> None:
    """What a picture has beyond its last whole patch changes nothing."""
    pixels, table, patch_size, dtype = inputs((2, 3, 13, 21, (4, 6)), torch.float32, DEVICE)
    expected = pixels_to_patches(pixels[:, :, :12, :18].contiguous(), table, patch_size, dtype)
    assert torch.equal(pixels_to_patches(pixels, table, patch_size, dtype), expected)


def test_writes_nothing_outside() -> None:
    pixels, table, patch_size, dtype = inputs((3, 3, 9, 12, (3, 4)), torch.float32, DEVICE)
    (around,) = poisoned(torch.empty(5, 9, 36, device=DEVICE))
    pixels_to_patches(pixels, table, patch_size, dtype, out=around[1:4])
    assert around[0].isnan().all() and around[4].isnan().all() and not around[1:4].isnan().any()


def test_empty_batch_launches_nothing() -> None:
    arguments = inputs((0, 3, 32, 48, (16, 16)), torch.float32, DEVICE)
    assert pixels_to_patches(*arguments).shape == (0, 6, 768)


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (0, lambda x: x.transpose(2, 3), "pixels"),
        (0, lambda x: x.float(), "pixels"),
        (0, lambda x: x[0], "pixels"),
        (1, lambda x: x[:2], "table"),
        (1, lambda x: x.half(), "table"),
        (2, lambda _: (0, 4), "patch_size"),
        (2, lambda _: (4,), "patch_size"),
        (3, lambda _: torch.float64, "dtype"),
        (4, lambda x: x[:, :-1].contiguous(), "out"),
        (4, lambda x: x.half(), "out"),
    ],
)
def test_wrong_arguments_are_named(index: int, change, name: str) -> None:
    arguments = [*inputs((2, 3, 8, 12, (4, 4)), torch.float32, DEVICE), torch.empty(2, 6, 48, device=DEVICE)]
    assert_refused(pixels_to_patches, arguments, index, change, name)
