"""Residual addition and LayerNorm in one pass over memory.

    sum = x + x_bias + residual
    out = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias

over the last dimension, with the variance of the whole population (Ba, Kiros, Hinton, arXiv 1607.06450). `x_bias` is
the bias of the linear layer that made x, left out there, and may be absent.

Shapes: x, residual, sum, out [rows, width]; x_bias, weight, bias [width]; any of fp32, fp16, bf16, all alike.
Bytes: 2 reads and 2 writes of rows * width elements, the vectors once. FLOPs: about 9 an element; bound by memory.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from trocr_fast.kernels.launch import DTYPES, Launch, Random, Work, output, power_of_two, require, run


def reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, x_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same mathematics in PyTorch, fp32 inside (fp64 for fp64), rounded once at the end."""
    inside = torch.promote_types(x.dtype, torch.float32)
    total = x.to(inside) + residual.to(inside)
    if x_bias is not None:
        total = total + x_bias.to(inside)
    out = F.layer_norm(total, (total.shape[-1],), weight.to(inside), bias.to(inside), eps)
    return total.to(x.dtype), out.to(x.dtype)


@triton.jit
def add_layernorm_kernel(
    x_ptr,  # [rows, width]
    residual_ptr,  # [rows, width]
    x_bias_ptr,  # [width], or None
    weight_ptr,  # [width]
    bias_ptr,  # [width]
    sum_ptr,  # [rows, width]
    out_ptr,  # [rows, width]
    width,
    eps,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least width: one program holds one row
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    total = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(x_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(sum_ptr + at, total, mask=inside)

    mean = tl.sum(total, axis=0) / width
    centred = tl.where(inside, total - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    out = centred / tl.sqrt(variance + eps) * weight + bias
    tl.store(out_ptr + at, out, mask=inside)


def add_layernorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    x_bias: Tensor | None = None,
    total: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel.

    Args:
        x, residual: [..., width], contiguous, of one dtype and device.
        weight, bias, x_bias: [width], likewise; x_bias may be None.
        eps: added to the variance.
        total, out: of the shape of x; made if not given.

    Returns:
        (total, out).

    Raises:
        ValueError: an argument of another shape, dtype or device, or one that is not contiguous; named.
    """
    last = run(launches(x, residual, weight, bias, eps, x_bias, total, out))
    return last["sum_ptr"], last["out_ptr"]


def launches(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    x_bias: Tensor | None = None,
    total: Tensor | None = None,
    out: Tensor | None = None,
) -> list[Launch]:
    """Check the arguments of `add_layernorm` and say what to launch."""
    require("x", x, x.shape, dtype=DTYPES)
    require("residual", residual, x.shape, x)
    width = x.shape[-1]
    for name, vector in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if vector is not None:
            require(name, vector, (width,), x)
    total, out = output("total", total, x.shape, x), output("out", out, x.shape, x)
    block = power_of_two(width)
    launch = Launch(
        add_layernorm_kernel,
        (x.numel() // width if width else 0,),
        {
            "x_ptr": x,
            "residual_ptr": residual,
            "x_bias_ptr": x_bias,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "sum_ptr": total,
            "out_ptr": out,
            "width": width,
            "eps": eps,
        },
        {"HAS_BIAS": x_bias is not None, "BLOCK": block},
        num_warps=max(1, min(8, block // 256)),
    )
    return [launch]


def cases() -> list[tuple[int, int]]:
    """(rows, width) of the real models: a batch of encoder rows, a decode batch, one line."""
    return [(64 * 578, 384), (64 * 577, 768), (64 * 577, 1024), (64, 256), (64, 1024), (1, 1024)]


def inputs(case: tuple[int, int], dtype: torch.dtype, device: str, seed: int = 0) -> tuple:
    """Random arguments of the launcher, outputs aside."""
    rows, width = case
    draw = Random(dtype, device, seed)
    # a mean far from zero shows a variance that is computed as E[x^2] - E[x]^2
    x, residual, weight, bias, x_bias = (draw(shape, mean=3.0) for shape in ((rows, width),) * 2 + ((width,),) * 3)
    return x, residual, weight, bias, 1e-5, x_bias


def work(case: tuple[int, int], dtype: torch.dtype) -> Work:
    """What one launch must move and compute."""
    rows, width = case
    return Work(num_bytes=(4 * rows + 3) * width * dtype.itemsize, flops=9 * rows * width)
