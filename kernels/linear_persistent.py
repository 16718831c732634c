"""The layer of `linear_activation` for Hopper: tiles by tensor descriptor, one program a multiprocessor.

    out = activation(x weight^T + bias)

Tiles of x and weight come through the bulk copy engine (TMA), which computes addresses and fills in zeros beyond the
edges by itself, and so do those of out on their way back. A program stays on its multiprocessor and takes every
num_programs-th tile, so that the first loads of its next tile run under the activation of the last one (as in Triton's
tutorial on persistent matrix multiplication). On older chips Triton makes ordinary loads of the descriptors.

Shapes, bytes and FLOPs: those of `linear_activation`. Rows of x, weight and out must begin at multiples of 16 bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trocr_fast.kernels import linear_activation as plain
from trocr_fast.kernels.bias_gelu import activate, require_activation
from trocr_fast.kernels.launch import Launch, Work, output, require
from trocr_fast.kernels.linear_activation import halves

reference = plain.reference

# Whether in half precision -> rows, columns and depth of a tile, warps, stages. The largest tile that two warp groups
# hold in registers; four stages of 48 KB and a quarter of the result fit the 227 KB of a multiprocessor, which has
# no other program to hide its waiting behind. fp32: no matrix unit is exact, see `linear_activation`.
TILES = {True: (128, 256, 64, 8, 4), False: (64, 64, 16, 4, 2)}
GROUP_M = 8  # tiles of rows that share the columns in L2
MULTIPROCESSORS = 132  # of an H200, where there is no device to ask


@triton.jit
def place(tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile: down GROUP_M tiles, then a column to the right, and so on."""
    in_group = GROUP_M * tl.cdiv(columns, BLOCK_N)
    first_tile = tile // in_group * GROUP_M
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - first_tile, GROUP_M)
    return (first_tile + tile % in_group % height) * BLOCK_M, tile % in_group // height * BLOCK_N


@triton.jit
def finish(
    product,  # [height, width], a tile or a part of its columns
    row,
    column,
    bias_ptr,  # [columns], or None
    out,  # descriptor of [rows, columns] in tiles of this shape
    columns,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Bias, activation, and the way to memory."""
    if HAS_BIAS:
        at = column + tl.arange(0, product.shape[1])
        product += tl.load(bias_ptr + at, mask=at < columns, other=0.0).to(tl.float32)[None, :]
    out.store([row, column], activate(product, ACTIVATION).to(out.dtype))


@triton.jit
def linear_persistent_kernel(
    x_ptr,  # [rows, depth]
    weight_ptr,  # [columns, depth]
    bias_ptr,  # [columns], or None
    out_ptr,  # [rows, columns]
    rows,
    columns,
    depth,
    ACTIVATION: tl.constexpr,  # or None
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OUT: tl.constexpr,  # columns that are finished at a time: BLOCK_N, or a quarter of it
    GROUP_M: tl.constexpr,
):
    x = tl.make_tensor_descriptor(x_ptr, [rows, depth], [depth, 1], [BLOCK_M, BLOCK_K])
    weight = tl.make_tensor_descriptor(weight_ptr, [columns, depth], [depth, 1], [BLOCK_N, BLOCK_K])
    out = tl.make_tensor_descriptor(out_ptr, [rows, columns], [columns, 1], [BLOCK_M, BLOCK_OUT])
    num_programs = tl.num_programs(0)
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, num_programs, flatten=True):
        row, column = place(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, depth, BLOCK_K):
            product = tl.dot(x.load([row, start]), weight.load([column, start]).T, acc=product, input_precision="ieee")
        if BLOCK_OUT == BLOCK_N:
            finish(product, row, column, bias_ptr, out, columns, ACTIVATION, HAS_BIAS)
        else:  # the activation of the whole tile at once would need more registers than there are
            left, right = halves(product)
            one, two = halves(left)
            finish(one, row, column, bias_ptr, out, columns, ACTIVATION, HAS_BIAS)
            finish(two, row, column + BLOCK_OUT, bias_ptr, out, columns, ACTIVATION, HAS_BIAS)
            three, four = halves(right)
            finish(three, row, column + 2 * BLOCK_OUT, bias_ptr, out, columns, ACTIVATION, HAS_BIAS)
            finish(four, row, column + 3 * BLOCK_OUT, bias_ptr, out, columns, ACTIVATION, HAS_BIAS)


def linear_persistent(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, out: Tensor | None = None
) -> Tensor:
    """Launch the kernel.

    Args:
        x: [rows, in], contiguous, its rows a multiple of 16 bytes long.
        weight: [out, in], likewise, of the dtype and device of x.
        bias: [out], likewise; may be None.
        activation: a key of ACTIVATIONS, or None.
        out: [rows, out], its rows a multiple of 16 bytes long; made if not given. Must not overlap x.

    Returns:
        out.

    Raises:
        ValueError: an argument of another shape, dtype or device, or one that is not contiguous or not aligned; named.
    """
    _check(x, weight, bias, activation)
    out = output("out", out, (x.shape[0], weight.shape[0]), x)
    # where a kernel keeps the descriptors that it makes; freed on the same stream after it
    triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device=x.device))
    for launch in launches(x, weight, bias, activation, out):
        launch.run()
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    require("x", x, (None, None), dtype=(torch.float32, torch.float16, torch.bfloat16))
    require("weight", weight, (None, x.shape[1]), x)
    if bias is not None:
        require("bias", bias, weight.shape[:1], x)
    require_activation(activation, none_allowed=True)
    for name, tensor in (("x", x), ("weight", weight)):
        _require_aligned(name, tensor.shape[1], tensor)


def _require_aligned(name: str, columns: int, tensor: Tensor) -> None:
    step = 16 // tensor.element_size()
    if columns % step or (tensor.device.type != "meta" and tensor.data_ptr() % 16):
        raise ValueError(f"{name}: expected rows that begin at multiples of 16 bytes, got {columns} columns")


def launches(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, out: Tensor | None = None
) -> list[Launch]:
    """Check the arguments of `linear_persistent` and say what to launch."""
    _check(x, weight, bias, activation)
    (rows, depth), columns = x.shape, weight.shape[0]
    out = output("out", out, (rows, columns), x)
    _require_aligned("out", columns, out)
    block_m, block_n, block_k, num_warps, num_stages = TILES[x.dtype != torch.float32]
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n)
    launch = Launch(
        linear_persistent_kernel,
        (min(tiles, _multiprocessors(x)),),
        {
            "x_ptr": x,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "out_ptr": out,
            "rows": rows,
            "columns": columns,
            "depth": depth,
        },
        {
            "ACTIVATION": activation,
            "HAS_BIAS": bias is not None,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "BLOCK_OUT": block_n if block_n <= 128 else block_n // 4,
            "GROUP_M": GROUP_M,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return [launch]


def _multiprocessors(x: Tensor) -> int:
    if x.device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def cases() -> list[tuple[int, int, int, str | None]]:
    """(rows, in, out, activation): those of `linear_activation` that fill the chip."""
    return [case for case in plain.cases() if case[0] > 1024]


def inputs(case: tuple[int, int, int, str | None], dtype: torch.dtype, device: str, seed: int = 0) -> tuple:
    """Random arguments of the launcher, outputs aside."""
    return plain.inputs(case, dtype, device, seed)


def work(case: tuple[int, int, int, str | None], dtype: torch.dtype) -> Work:
    """What one launch must move and compute."""
    return plain.work(case, dtype)
