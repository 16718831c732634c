"""The layer of `linear_activation` for Hopper: tiles by tensor descriptor, one program a multiprocessor.

    out = activation(x weight^T + bias)

Tiles of x and weight come through the bulk copy engine (TMA), which computes addresses and fills in zeros beyond the
edges by itself, and so do those of out on their way back. A program stays on its multiprocessor and takes every
num_programs-th tile, so that the first loads of its next tile run under the activation of the last one (as in Triton's
tutorial on persistent matrix multiplication). On older chips Triton makes ordinary loads of the descriptors;
`linear_activation` is for those.

Shapes, bytes and FLOPs: those of `linear_activation`. Rows of x, weight and out must begin at multiples of 16 bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trocr_fast.kernels import linear_activation as plain
from trocr_fast.kernels.bias_gelu import activate
from trocr_fast.kernels.launch import Launch, run
from trocr_fast.kernels.linear_activation import Tile, halves, place

reference, inputs, work = plain.reference, plain.inputs, plain.work

# Whether in half precision -> tile. The largest that two warp groups hold in registers; four stages of 48 KB and a
# quarter of the result fit the 227 KB of a multiprocessor, which has no other program to hide its waiting behind.
# fp32: no matrix unit is exact, see `linear_activation`.
TILES = {True: Tile(128, 256, 64, 8, 4), False: Tile(64, 64, 16, 4, 2)}
MULTIPROCESSORS = 132  # of an H200, where there is no device to ask


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
    return run(launches(x, weight, bias, activation, out))["out_ptr"]


class DescriptorLaunch(Launch):
    """A launch of a kernel that keeps the descriptors that it makes in memory it is given."""

    def run(self) -> None:
        # of this thread; freed on the same stream after the kernel
        device = self.arguments["x_ptr"].device
        triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device=device))
        super().run()


def launches(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, out: Tensor | None = None
) -> list[Launch]:
    """Check the arguments of `linear_persistent` and say what to launch."""
    out = plain.checked(x, weight, bias, activation, out)
    for name, tensor in (("x", x), ("weight", weight), ("out", out)):
        _require_aligned(name, tensor)
    tile = TILES[x.dtype != torch.float32]
    arguments, constants = plain.of_tiles(tile, x, weight, bias, activation, out)
    launch = DescriptorLaunch(
        linear_persistent_kernel,
        (min(plain.num_tiles(tile, out), _multiprocessors(x)),),
        arguments,
        {**constants, "BLOCK_OUT": tile.columns if tile.columns <= 128 else tile.columns // 4},
        tile.num_warps,
        tile.num_stages,
    )
    return [launch]


def _require_aligned(name: str, tensor: Tensor) -> None:
    columns = tensor.shape[1]
    if columns * tensor.element_size() % 16:
        raise ValueError(f"{name}: expected rows of a multiple of 16 bytes, got {columns} columns")
    if tensor.device.type != "meta" and tensor.data_ptr() % 16:
        raise ValueError(f"{name}: expected memory that begins at a multiple of 16 bytes, got {tensor.data_ptr():#x}")


def _multiprocessors(x: Tensor) -> int:
    if x.device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def cases() -> list[tuple[int, int, int, str | None]]:
    """(rows, in, out, activation): those of `linear_activation` that fill the chip."""
    return [case for case in plain.cases() if case[0] > 1024]
