"""Normalised patches from 8-bit pictures in one pass: the look-up and the cutting of patches.

    out[b, r * columns + c, (channel, y, x)] = table[channel, pixels[b, channel, r * height + y, c * width + x]]

for patches of height x width, columns = W // width. The table holds exactly what the model's processor makes of each of
the 256 values. What is left over at the right and bottom edge is dropped.

Shapes: pixels uint8 [batch, channels, H, W]; table fp32 [channels, 256]; out [batch, rows * columns,
channels * height * width], in fp32, fp16 or bf16: the table's value, rounded once.
Bytes: 1 read a pixel, 1 write an element. FLOPs: none; bound by memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trocr_fast.kernels.launch import DTYPES, Launch, Random, Work, output, power_of_two, require, run

# A patch of 16 x 16 pixels is 256 elements of each channel. Eight patches side by side are rows of 128 bytes to read
# and 512 bytes at a time to write in half precision.
BLOCK_PATCHES = 8
BLOCK_ELEMENTS = 256


def reference(pixels: Tensor, table: Tensor, patch_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The same in PyTorch."""
    batch, channels, image_height, image_width = pixels.shape
    height, width = patch_size
    rows, columns = image_height // height, image_width // width
    channel = torch.arange(channels, device=pixels.device).view(1, -1, 1, 1)
    values = table[channel, pixels[:, :, : rows * height, : columns * width].long()]
    patches = values.view(batch, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows * columns, channels * height * width).to(dtype)


@triton.jit
def pixels_to_patches_kernel(
    pixels_ptr,  # uint8 [batch, channels, image_height, image_width]
    table_ptr,  # fp32 [channels, 256]
    out_ptr,  # [num_patches, size]
    num_patches,  # of all pictures
    channels,
    image_height,
    image_width,
    rows,
    columns,
    size,  # channels * HEIGHT * WIDTH
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
):
    # neighbours are neighbours in memory: the tiles of some patches one after another
    tiles = tl.cdiv(size, BLOCK_ELEMENTS)
    patch = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    element = tl.program_id(0) % tiles * BLOCK_ELEMENTS + tl.arange(0, BLOCK_ELEMENTS)
    inside = (patch < num_patches)[:, None] & (element < size)[None, :]

    picture = patch // (rows * columns)
    top = patch // columns % rows * HEIGHT
    left = patch % columns * WIDTH
    corner = (picture * channels * image_height + top) * image_width + left
    channel = element // (HEIGHT * WIDTH)
    line = channel.to(tl.int64) * image_height + element // WIDTH % HEIGHT
    at = corner[:, None] + (line * image_width + element % WIDTH)[None, :]
    values = tl.load(pixels_ptr + at, mask=inside, other=0).to(tl.int32)
    out = tl.load(table_ptr + channel[None, :] * 256 + values, mask=inside, other=0.0)
    tl.store(out_ptr + patch[:, None] * size + element[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


def pixels_to_patches(
    pixels: Tensor, table: Tensor, patch_size: tuple[int, int], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Launch the kernel.

    Args:
        pixels: uint8 [batch, channels, H, W], contiguous.
        table: fp32 [channels, 256], contiguous, on the device of pixels.
        patch_size: (height, width).
        dtype: of the result: fp32, fp16 or bf16.
        out: [batch, (H // height) * (W // width), channels * height * width]; made if not given.

    Returns:
        out.

    Raises:
        ValueError: an argument of another shape, dtype or device, or one that is not contiguous; named.
    """
    return run(launches(pixels, table, patch_size, dtype, out))["out_ptr"]


def launches(
    pixels: Tensor, table: Tensor, patch_size: tuple[int, int], dtype: torch.dtype, out: Tensor | None = None
) -> list[Launch]:
    """Check the arguments of `pixels_to_patches` and say what to launch."""
    require("pixels", pixels, (None, None, None, None), dtype=torch.uint8)
    batch, channels, image_height, image_width = pixels.shape
    require("table", table, (channels, 256), pixels, torch.float32)
    if len(patch_size) != 2 or min(patch_size) < 1:
        raise ValueError(f"patch_size: expected a height and a width of at least 1, got {patch_size}")
    if dtype not in DTYPES:
        wanted = " or ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise ValueError(f"dtype: expected {wanted}, got {dtype}")
    height, width = patch_size
    rows, columns, size = image_height // height, image_width // width, channels * height * width
    out = output("out", out, (batch, rows * columns, size), pixels, dtype)
    num_patches = batch * rows * columns
    block = min(BLOCK_ELEMENTS, power_of_two(max(size, 1)))
    launch = Launch(
        pixels_to_patches_kernel,
        (triton.cdiv(num_patches, BLOCK_PATCHES) * triton.cdiv(size, block),),
        {
            "pixels_ptr": pixels,
            "table_ptr": table,
            "out_ptr": out,
            "num_patches": num_patches,
            "channels": channels,
            "image_height": image_height,
            "image_width": image_width,
            "rows": rows,
            "columns": columns,
            "size": size,
        },
        {"HEIGHT": height, "WIDTH": width, "BLOCK_PATCHES": BLOCK_PATCHES, "BLOCK_ELEMENTS": block},
        num_warps=4,
    )
    return [launch]


def cases() -> list[tuple[int, int, int, int, tuple[int, int]]]:
    """(batch, channels, H, W, patch_size): all published models, in batches; a wide picture; one line."""
    batches = [(64, 3, 384, 384, (16, 16)), (256, 3, 384, 384, (16, 16)), (64, 3, 64, 768, (16, 16))]
    return [*batches, (1, 3, 384, 384, (16, 16))]


def inputs(case: tuple[int, int, int, int, tuple[int, int]], dtype: torch.dtype, device: str, seed: int = 0) -> tuple:
    """Random arguments of the launcher, outputs aside."""
    *shape, patch_size = case
    table = Random(torch.float32, device, seed)((shape[1], 256))
    if device == "meta":
        return torch.empty(shape, dtype=torch.uint8, device=device), table, patch_size, dtype
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    return pixels, table, patch_size, dtype


def work(case: tuple[int, int, int, int, tuple[int, int]], dtype: torch.dtype) -> Work:
    """What one launch must move and compute."""
    batch, channels, image_height, image_width, (height, width) = case
    elements = batch * channels * (image_height // height * height) * (image_width // width * width)
    return Work(num_bytes=elements * (1 + dtype.itemsize) + channels * 256 * 4, flops=0)
