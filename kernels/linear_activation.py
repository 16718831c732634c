"""Linear layer with bias and activation in its epilogue: the product never goes to memory without them.

    out = activation(x weight^T + bias)

with the activations of `bias_gelu`, or none. Tiles are taken in groups of rows, so that tiles in flight at the same
time share their operands in L2 (as in Triton's tutorial on matrix multiplication).

Shapes: x [rows, in]; weight [out, in]; bias [out] or None; out [rows, out]; any of fp32, fp16, bf16, all alike.
Bytes: rows * in + out * in + rows * out elements. FLOPs: 2 * rows * in * out; bound by arithmetic for an encoder's
rows, by reading the weight for a decode batch.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from trocr_fast.kernels.bias_gelu import ACTIVATIONS, activate, require_activation
from trocr_fast.kernels.launch import DTYPES, Launch, Random, Work, output, require, run


class Tile(NamedTuple):
    """What a program computes at a time, and with what."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# Tiles in half precision: at most so many rows -> tile.
# An encoder batch fills the chip many times over: the largest tile that two warp groups hold in registers. A decode
# batch is one or a few tiles high: narrow tiles, so that a weight of 4096 rows is read by about as many programs as
# there are multiprocessors, with deep stages, since reading is all they do. A Hopper product has at least 64 rows.
TILES_HALF = [
    (16, Tile(16, 32, 128, 4, 4)),
    (64, Tile(64, 32, 128, 4, 4)),
    (512, Tile(64, 64, 64, 4, 4)),
    (4096, Tile(128, 128, 64, 8, 3)),
    (None, Tile(128, 256, 64, 8, 3)),
]
# fp32 has no matrix unit that is exact: plain multiplications from registers, which larger tiles would overflow.
TILES_FP32 = [(16, Tile(16, 32, 32, 4, 2)), (None, Tile(64, 64, 16, 4, 2))]
GROUP_M = 8  # tiles of rows that share the columns in L2


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """The same mathematics in PyTorch, fp32 inside (fp64 for fp64), rounded once at the end."""
    inside = torch.promote_types(x.dtype, torch.float32)
    out = F.linear(x.to(inside), weight.to(inside), None if bias is None else bias.to(inside))
    return (out if activation is None else ACTIVATIONS[activation](out)).to(x.dtype)


@triton.jit
def place(tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile: down GROUP_M tiles, then a column to the right, and so on."""
    in_group = GROUP_M * tl.cdiv(columns, BLOCK_N)
    first_tile = tile // in_group * GROUP_M
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - first_tile, GROUP_M)  # the last group may be smaller
    return (first_tile + tile % in_group % height) * BLOCK_M, tile % in_group // height * BLOCK_N


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def finish(
    product,  # [height, width], a tile or a part of its columns
    first_column,
    bias_ptr,  # [columns], or None
    out_ptr,  # [rows, columns], from the tile's first row on
    rows,  # from there on
    columns,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Bias, activation, and the way to memory."""
    row = tl.arange(0, product.shape[0])
    column = first_column + tl.arange(0, product.shape[1])
    if HAS_BIAS:
        product += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    out = activate(product, ACTIVATION).to(out_ptr.dtype.element_ty)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + row[:, None] * columns + column[None, :], out, mask=inside)


@triton.jit
def linear_activation_kernel(
    x_ptr,  # [rows, depth]
    weight_ptr,  # [columns, depth]
    bias_ptr,  # [columns], or None
    out_ptr,  # [rows, columns]
    rows,
    columns,
    depth,
    ACTIVATION: tl.constexpr,  # or None
    HAS_BIAS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,  # whether depth is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    first_row, first_column = place(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    row = tl.arange(0, BLOCK_M)  # of the tile, as column: 64-bit offsets go into the scalar pointers, to save registers
    column = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    # What lies below the last row or right of the last column reads that one again: loads without a mask, and
    # results that are not stored.
    x_ptr += first_row.to(tl.int64) * depth
    weight_ptr += first_column.to(tl.int64) * depth
    x_ptrs = x_ptr + tl.minimum(row, rows - 1 - first_row)[:, None] * depth + k[None, :]
    weight_ptrs = weight_ptr + tl.minimum(column, columns - 1 - first_column)[:, None] * depth + k[None, :]
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_DEPTH:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(start + k < depth)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(start + k < depth)[None, :], other=0.0)
        product = tl.dot(x, tl.trans(weight), acc=product, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    out_ptr += first_row.to(tl.int64) * columns
    rows -= first_row
    if BLOCK_N <= 128:
        finish(product, first_column, bias_ptr, out_ptr, rows, columns, ACTIVATION, HAS_BIAS)
    else:  # in quarters: the activation of the whole tile at once would need more registers than there are
        left, right = halves(product)
        one, two = halves(left)
        finish(one, first_column, bias_ptr, out_ptr, rows, columns, ACTIVATION, HAS_BIAS)
        finish(two, first_column + BLOCK_N // 4, bias_ptr, out_ptr, rows, columns, ACTIVATION, HAS_BIAS)
        three, four = halves(right)
        finish(three, first_column + BLOCK_N // 2, bias_ptr, out_ptr, rows, columns, ACTIVATION, HAS_BIAS)
        finish(four, first_column + BLOCK_N // 4 * 3, bias_ptr, out_ptr, rows, columns, ACTIVATION, HAS_BIAS)


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, out: Tensor | None = None
) -> Tensor:
    """Launch the kernel.

    Args:
        x: [rows, in], contiguous.
        weight: [out, in], likewise, of the dtype and device of x.
        bias: [out], likewise; may be None.
        activation: a key of ACTIVATIONS, or None.
        out: [rows, out]; made if not given. Must not overlap x.

    Returns:
        out.

    Raises:
        ValueError: an argument of another shape, dtype or device, or one that is not contiguous; named.
    """
    return run(launches(x, weight, bias, activation, out))["out_ptr"]


def launches(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, out: Tensor | None = None
) -> list[Launch]:
    """Check the arguments of `linear_activation` and say what to launch."""
    out = checked(x, weight, bias, activation, out)
    table = TILES_FP32 if x.dtype == torch.float32 else TILES_HALF
    tile = next(tile for most, tile in table if most is None or len(x) <= most)
    arguments, constants = of_tiles(tile, x, weight, bias, activation, out)
    launch = Launch(
        linear_activation_kernel,
        (num_tiles(tile, out),),
        arguments,
        {**constants, "EVEN_DEPTH": x.shape[1] % tile.depth == 0},
        tile.num_warps,
        tile.num_stages,
    )
    return [launch]


def checked(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, out: Tensor | None) -> Tensor:
    """The output of a linear layer, after a look at all of its arguments."""
    require("x", x, (None, None), dtype=DTYPES)
    require("weight", weight, (None, x.shape[1]), x)
    if bias is not None:
        require("bias", bias, weight.shape[:1], x)
    require_activation(activation, none_allowed=True)
    return output("out", out, (x.shape[0], weight.shape[0]), x)


def num_tiles(tile: Tile, out: Tensor) -> int:
    """How many tiles out has."""
    return triton.cdiv(out.shape[0], tile.rows) * triton.cdiv(out.shape[1], tile.columns)


def of_tiles(
    tile: Tile, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, out: Tensor
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants of a kernel that computes `out` by tiles."""
    arguments = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "out_ptr": out,
        "rows": x.shape[0],
        "columns": weight.shape[0],
        "depth": x.shape[1],
    }
    constants = {
        "ACTIVATION": activation,
        "HAS_BIAS": bias is not None,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "GROUP_M": GROUP_M,
    }
    return arguments, constants


def cases() -> list[tuple[int, int, int, str | None]]:
    """(rows, in, out, activation) of the real models: first layers of the feed-forward networks, other products."""
    base, large, small = 64 * 577, 64 * 577, 64 * 578
    encoder = [(base, 768, 3072, "gelu"), (large, 1024, 4096, "gelu"), (small, 384, 1536, "gelu")]
    plain = [(base, 3072, 768, None), (base, 768, 2304, None)]
    decoder = [(256, 1024, 4096, "gelu"), (64, 1024, 4096, "gelu"), (64, 256, 1024, "relu"), (1, 1024, 4096, "gelu")]
    return [*encoder, *plain, *decoder]


def inputs(case: tuple[int, int, int, str | None], dtype: torch.dtype, device: str, seed: int = 0) -> tuple:
    """Random arguments of the launcher, outputs aside; of all launchers of linear layers."""
    rows, depth, columns, activation = case
    draw = Random(dtype, device, seed)
    weight = draw((columns, depth), scale=2 * max(depth, 1) ** -0.5)  # products of about 2
    return draw((rows, depth)), weight, draw((columns,)), activation


def work(case: tuple[int, int, int, str | None], dtype: torch.dtype) -> Work:
    """What one launch must move and compute."""
    rows, depth, columns, _ = case
    elements = rows * depth + columns * depth + columns + rows * columns
    return Work(num_bytes=elements * dtype.itemsize, flops=2 * rows * depth * columns)
