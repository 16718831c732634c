"""Bias and activation in one pass over memory, behind a matrix product that left its bias out.

    out = activation(x + bias)

with gelu(x) = x / 2 * (1 + erf(x / sqrt(2))), gelu_new(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3))),
relu(x) = max(x, 0), silu(x) = x / (1 + exp(-x)) (Hendrycks, Gimpel, arXiv 1606.08415).

Shapes: x, out [rows, width]; bias [width]; any of fp32, fp16, bf16, all alike.
Bytes: 1 read and 1 write of rows * width elements, the bias once. FLOPs: about 30 an element for erf; bound by memory.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from trocr_fast.kernels.launch import DTYPES, Launch, Random, Work, output, power_of_two, require, run

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
# The widths of the models are multiples of 512. 4096 elements are 32 a thread, all loaded before the first is used.
BLOCK_WIDTH = 512
BLOCK_ELEMENTS = 4096


def reference(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    """The same mathematics in PyTorch, fp32 inside (fp64 for fp64), rounded once at the end."""
    inside = torch.promote_types(x.dtype, torch.float32)
    return ACTIVATIONS[activation](x.to(inside) + bias.to(inside)).to(x.dtype)


@triton.jit
def activate(
    x,  # fp32, any shape
    ACTIVATION: tl.constexpr,  # a key of ACTIVATIONS, or None
):
    """The activation of each element; NaN stays NaN."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_new":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), with 2 sqrt(2 / pi) = 1.5957691216057308
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    else:
        return x


@triton.jit
def bias_gelu_kernel(
    x_ptr,  # [rows, width]
    bias_ptr,  # [width]
    out_ptr,  # [rows, width]
    rows,
    width,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # neighbours are neighbours in memory: the tiles of some rows one after another
    tiles = tl.cdiv(width, BLOCK_WIDTH)
    first = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % tiles * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(out_ptr + at, activate(x, ACTIVATION), mask=inside)


def require_activation(activation: str | None, none_allowed: bool = False) -> None:
    """Check the name of an activation.

    Raises:
        ValueError: none of those known.
    """
    if activation not in ACTIVATIONS and not (none_allowed and activation is None):
        known = ", ".join(ACTIVATIONS) + (" or None" if none_allowed else "")
        raise ValueError(f"activation: expected one of {known}, got {activation!r}")


def bias_gelu(x: Tensor, bias: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """Launch the kernel.

    Args:
        x: [..., width], contiguous.
        bias: [width], of the dtype and device of x.
        activation: a key of ACTIVATIONS.
        out: of the shape of x (x itself, to overwrite it); made if not given.

    Returns:
        out.

    Raises:
        ValueError: an argument of another shape, dtype or device, or one that is not contiguous; named.
    """
    return run(launches(x, bias, activation, out))["out_ptr"]


def launches(x: Tensor, bias: Tensor, activation: str, out: Tensor | None = None) -> list[Launch]:
    """Check the arguments of `bias_gelu` and say what to launch."""
    require("x", x, x.shape, dtype=DTYPES)
    require("bias", bias, x.shape[-1:], x)
    require_activation(activation)
    out = output("out", out, x.shape, x)
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    block_width = min(BLOCK_WIDTH, power_of_two(max(width, 1)))
    block_rows = BLOCK_ELEMENTS // block_width
    # one line has a row a step: no need to hold eight
    block_rows = min(block_rows, power_of_two(max(rows, 1)))
    launch = Launch(
        bias_gelu_kernel,
        (triton.cdiv(rows, block_rows) * triton.cdiv(width, block_width),),
        {"x_ptr": x, "bias_ptr": bias, "out_ptr": out, "rows": rows, "width": width},
        {"ACTIVATION": activation, "BLOCK_ROWS": block_rows, "BLOCK_WIDTH": block_width},
        num_warps=4,
    )
    return [launch]


def cases() -> list[tuple[int, int, str]]:
    """(rows, width, activation) of the real models: encoders base, large, small, a decode batch, one line."""
    encoder = [(64 * 577, 3072, "gelu"), (64 * 577, 4096, "gelu"), (64 * 578, 1536, "gelu")]
    # none of the published models has these two
    others = [(64 * 577, 3072, "gelu_new"), (64 * 577, 3072, "silu")]
    return [*encoder, *others, (256, 4096, "gelu"), (64, 1024, "relu"), (1, 4096, "gelu")]


def inputs(case: tuple[int, int, str], dtype: torch.dtype, device: str, seed: int = 0) -> tuple:
    """Random arguments of the launcher, outputs aside."""
    rows, width, activation = case
    draw = Random(dtype, device, seed)
    # wide enough that both ends of the activation are seen
    return draw((rows, width), scale=3.0), draw((width,), mean=-1.0), activation


def work(case: tuple[int, int, str], dtype: torch.dtype) -> Work:
    """What one launch must move and compute."""
    rows, width, _ = case
    return Work(num_bytes=(2 * rows + 1) * width * dtype.itemsize, flops=30 * rows * width)
