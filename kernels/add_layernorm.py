"""Residual addition and LayerNorm in one pass over memory.

    sum = x + residual
    out = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias

over the last dimension, with the variance of the whole population (Ba, Kiros, Hinton, arXiv 1607.06450).

Shapes: x, residual, sum, out [rows, width]; weight, bias [width]; any of fp32, fp16, bf16, all alike.
Bytes: 2 reads and 2 writes of rows * width elements, weight and bias once. FLOPs: about 8 an element; bound by memory.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


def reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same mathematics in PyTorch, fp32 inside (fp64 for fp64), rounded once at the end."""
    inside = torch.promote_types(x.dtype, torch.float32)
    total = x.to(inside) + residual.to(inside)
    out = F.layer_norm(total, (total.shape[-1],), weight.to(inside), bias.to(inside), eps)
    return total.to(x.dtype), out.to(x.dtype)


@triton.jit
def add_layernorm_kernel(
    x_ptr,  # [rows, width]
    residual_ptr,  # [rows, width]
    weight_ptr,  # [width]
    bias_ptr,  # [width]
    sum_ptr,  # [rows, width]
    out_ptr,  # [rows, width]
    width,
    eps,
    BLOCK: tl.constexpr,  # a power of two, at least width: one program holds one row
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = x + residual
    tl.store(sum_ptr + at, total, mask=inside)

    mean = tl.sum(total, axis=0) / width
    centred = tl.where(inside, total - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    out = centred / tl.sqrt(variance + eps) * weight + bias
    tl.store(out_ptr + at, out, mask=inside)


def add_layernorm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch the kernel.

    Args:
        x, residual: [..., width], contiguous, of one dtype and device.
        weight, bias: [width], likewise.
        eps: added to the variance.

    Returns:
        (sum, out), each of the shape of x.

    Raises:
        ValueError: an argument of another shape, dtype or device, or one that is not contiguous; named.
    """
    width = x.shape[-1]
    expected = {"residual": (residual, x.shape), "weight": (weight, (width,)), "bias": (bias, (width,))}
    for name, (tensor, shape) in {"x": (x, x.shape), **expected}.items():
        if tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected {list(shape)} {x.dtype} on {x.device}, "
                f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    total, out = torch.empty_like(x), torch.empty_like(x)
    num_rows = x.numel() // width if width else 0
    if num_rows:
        block = triton.next_power_of_2(width)
        num_warps = max(1, min(8, block // 256))
        add_layernorm_kernel[(num_rows,)](
            x, residual, weight, bias, total, out, width, eps, BLOCK=block, num_warps=num_warps
        )  # fmt: skip
    return total, out


def cases() -> list[tuple[int, int]]:
    """(rows, width) of the real models: a batch of encoder rows, a decode batch, one line."""
    return [(64 * 578, 384), (64 * 577, 768), (64 * 577, 1024), (64, 256), (64, 1024), (1, 1024)]
