"""Linear layer of a few rows, at the speed at which memory gives the weights.

    out = activation(x @ weight.T + bias)

for 1 to 16 rows, as a decode step of a few lines has them. Every weight is read once and meets all rows while it is in
registers. Up to 4 rows a program multiplies and sums, with no matrix unit; above, the rows are padded to 16 for one.
Where there are too few outputs to fill the chip, the reduction is split: parts are written in fp32 and a second small
kernel sums them in a fixed order, so the result is the same at every run, which atomic additions would not promise.

Shapes: x [rows, in]; weight [out, in]; bias [out] or absent; out [rows, out]; any of fp32, fp16, bf16, all alike.
Accumulated in fp32, rounded once at the end. The activations are those of `trocr_fast.ops`: gelu is the exact one, by
erf, and gelu_new its approximation by tanh (Hendrycks, Gimpel, arXiv 1606.08415).
Bytes: out * in weights, and rows * (in + out) elements. FLOPs: 2 * rows * out * in; bound by memory.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trocr_fast.kernels import linear_activation as plain
from trocr_fast.kernels.bias_gelu import activate
from trocr_fast.kernels.launch import Launch, power_of_two, run

reference, inputs, work = plain.reference, plain.inputs, plain.work

MAX_ROWS = 16
MAX_ROWS_SUMMED = 4  # above, matrix units
# The least number of programs worth having: about one for each multiprocessor of an H200 (132) or an A100 (108).
FILLED = 128


@triton.jit
def skinny_sum_kernel(
    x_ptr,  # [ROWS, width_in]
    weight_ptr,  # [width_out, width_in]
    bias_ptr,  # [width_out], or None
    out_ptr,  # [ROWS, width_out], or fp32 [splits, ROWS, width_out] to be merged
    width_in,
    width_out,
    part,  # columns of one split
    ROWS: tl.constexpr,  # 1 to 4
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    split = tl.program_id(1)
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    exists = outputs < width_out
    starts = weight_ptr + outputs.to(tl.int64)[:, None] * width_in
    first = split * part
    end = tl.minimum(first + part, width_in)
    # One accumulator a row, of the shape of the weights: the sum over threads comes once, after the loop.
    total0 = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    total1, total2, total3 = total0, total0, total0
    for start in range(first, end, BLOCK_IN):
        columns = start + tl.arange(0, BLOCK_IN)
        inside = columns < end
        # evict_first: no one reads a weight twice in a step
        weight = tl.load(
            starts + columns[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        at = x_ptr + columns
        total0 += weight * tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
        if ROWS > 1:
            total1 += weight * tl.load(at + width_in, mask=inside, other=0.0).to(tl.float32)[None, :]
        if ROWS > 2:
            total2 += weight * tl.load(at + 2 * width_in, mask=inside, other=0.0).to(tl.float32)[None, :]
        if ROWS > 3:
            total3 += weight * tl.load(at + 3 * width_in, mask=inside, other=0.0).to(tl.float32)[None, :]

    bias = tl.zeros((BLOCK_OUT,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outputs, mask=exists, other=0.0).to(tl.float32)
    at = out_ptr + split.to(tl.int64) * ROWS * width_out + outputs
    tl.store(at, activate(tl.sum(total0, axis=1) + bias, ACTIVATION), mask=exists)
    if ROWS > 1:
        tl.store(at + width_out, activate(tl.sum(total1, axis=1) + bias, ACTIVATION), mask=exists)
    if ROWS > 2:
        tl.store(at + 2 * width_out, activate(tl.sum(total2, axis=1) + bias, ACTIVATION), mask=exists)
    if ROWS > 3:
        tl.store(at + 3 * width_out, activate(tl.sum(total3, axis=1) + bias, ACTIVATION), mask=exists)


@triton.jit
def skinny_dot_kernel(
    x_ptr,  # [rows, width_in]
    weight_ptr,  # [width_out, width_in]
    bias_ptr,  # [width_out], or None
    out_ptr,  # [rows, width_out], or fp32 [splits, rows, width_out] to be merged
    rows,  # at most 16
    width_in,
    width_out,
    part,  # columns of one split
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    split = tl.program_id(1)
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    exists = outputs < width_out
    row = tl.arange(0, 16)
    filled = row < rows
    starts = weight_ptr + outputs.to(tl.int64)[:, None] * width_in
    first = split * part
    end = tl.minimum(first + part, width_in)
    total = tl.zeros((BLOCK_OUT, 16), tl.float32)
    for start in range(first, end, BLOCK_IN):
        columns = start + tl.arange(0, BLOCK_IN)
        inside = columns < end
        weight = tl.load(
            starts + columns[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )  # [BLOCK_OUT, BLOCK_IN]
        x = tl.load(
            x_ptr + row[:, None] * width_in + columns[None, :], mask=filled[:, None] & inside[None, :], other=0.0
        )  # [16, BLOCK_IN]
        total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")

    bias = tl.zeros((BLOCK_OUT,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outputs, mask=exists, other=0.0).to(tl.float32)
    at = out_ptr + (split.to(tl.int64) * rows + row)[None, :] * width_out + outputs[:, None]
    tl.store(at, activate(total + bias[:, None], ACTIVATION), mask=exists[:, None] & filled[None, :])


@triton.jit
def skinny_merge_kernel(
    parts_ptr,  # fp32 [splits, rows, width_out]
    bias_ptr,  # [width_out], or None
    out_ptr,  # [rows, width_out]
    rows,
    width_out,
    splits,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = outputs < width_out
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts_ptr + (split * rows + row) * width_out + outputs, mask=exists, other=0.0)
    bias = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outputs, mask=exists, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width_out + outputs, activate(total + bias, ACTIVATION), mask=exists)


def skinny_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, out: Tensor | None = None
) -> Tensor:
    """Launch the kernel, and the merge where the reduction was split.

    Args:
        x: [rows, in], contiguous, at most 16 rows.
        weight: [out, in], contiguous, of the dtype and device of x.
        bias: [out], likewise, or None.
        activation: None, "gelu", "gelu_new", "relu" or "silu".
        out: [rows, out]; made if not given.

    Returns:
        out.

    Raises:
        ValueError: an argument of another shape, dtype or device, or one that is not contiguous; named.
    """
    return run(launches(x, weight, bias, activation, out))["out_ptr"]


def launches(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, out: Tensor | None = None
) -> list[Launch]:
    """Check the arguments of `skinny_linear` and say what to launch."""
    out = plain.checked(x, weight, bias, activation, out)
    (rows, width_in), width_out = x.shape, weight.shape[0]
    if rows > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows, got {rows}")
    block_out, block_in, splits, num_warps, num_stages = blocks(rows, width_in, width_out, x.dtype)
    # whole tiles, so that no split but the last has an edge
    part = triton.cdiv(triton.cdiv(width_in, splits), block_in) * block_in
    splits = max(1, triton.cdiv(width_in, part)) if part else 1
    ending: dict[str, Any] = {"HAS_BIAS": bias is not None, "ACTIVATION": activation}
    scratch = out if splits == 1 else torch.empty((splits, rows, width_out), dtype=torch.float32, device=x.device)
    arguments = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias if splits == 1 else None,
        "out_ptr": scratch,
        "width_in": width_in,
        "width_out": width_out,
        "part": part,
    }
    constants = ending if splits == 1 else {"HAS_BIAS": False, "ACTIVATION": None}
    constants = constants | {"BLOCK_OUT": block_out, "BLOCK_IN": block_in}
    grid = (triton.cdiv(width_out, block_out) if rows else 0, splits)
    if rows <= MAX_ROWS_SUMMED:
        first = Launch(skinny_sum_kernel, grid, arguments, constants | {"ROWS": rows}, num_warps, num_stages)
    else:
        first = Launch(skinny_dot_kernel, grid, arguments | {"rows": rows}, constants, num_warps, num_stages)
    if splits == 1:
        return [first]
    block = 256
    merge = Launch(
        skinny_merge_kernel,
        (triton.cdiv(width_out, block), rows),
        {
            "parts_ptr": scratch,
            "bias_ptr": bias,
            "out_ptr": out,
            "rows": rows,
            "width_out": width_out,
            "splits": splits,
        },
        ending | {"BLOCK": block},
        num_warps=2,
    )
    return [first, merge]


def blocks(rows: int, width_in: int, width_out: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """(outputs a program, columns a step, splits, warps, stages). Not yet measured on a GPU."""
    if rows <= MAX_ROWS_SUMMED:
        # A step is 4 or 8 KB of weights a program: with 8 to 16 programs a multiprocessor enough is under way for
        # memory (about 24 KB each), and the accumulators take at most 64 registers a thread.
        block_in = min(max(power_of_two(width_in), 64), 2048 if width_in > 1024 else 1024)
        block_out = 4 if rows <= 2 and width_out >= 4096 else 2
        num_warps = max(1, min(8, block_in // 256))
        num_stages = 2
        least = 1024
    elif dtype == torch.float32:
        # without matrix units: each thread multiplies its own part of the tile, which lives in registers
        block_out, block_in, num_warps, num_stages, least = 32, 32, 4, 3, 256
    else:
        # 16 outputs are one instruction's tile; the wide head has enough outputs for larger ones
        block_out = 64 if width_out >= 16384 else 16
        block_in = min(max(power_of_two(width_in), 16), 128 if block_out == 64 else 256)
        num_warps = 4 if block_out == 64 else 2
        num_stages, least = 4, 256
    programs, splits = triton.cdiv(width_out, block_out), 1
    while programs * splits < FILLED and width_in >= 2 * splits * least:
        splits *= 2
    return block_out, block_in, splits, num_warps, num_stages


def cases() -> list[tuple[int, int, int, str | None]]:
    """(rows, in, out, activation) of the real models: one line of base and large, four beams of it, small, 16 rows."""
    return [
        (1, 1024, 4096, "gelu"),
        (1, 4096, 1024, None),
        (1, 1024, 3072, None),
        (1, 1024, 1024, None),
        (1, 1024, 50265, None),
        (4, 1024, 4096, "gelu"),
        (4, 4096, 1024, None),
        (4, 1024, 50265, None),
        (16, 1024, 4096, "gelu"),
        (16, 4096, 1024, None),
        (16, 1024, 1024, None),
        (16, 1024, 50265, None),
        (1, 256, 1024, "relu"),
        (1, 1024, 256, None),
        (1, 256, 256, None),
        (1, 256, 64044, None),
        (16, 256, 256, None),
    ]
