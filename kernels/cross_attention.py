"""Cross-attention of a decode step over the cached keys and values of a line.

    out = softmax(q K^T) V

for each row and head, with q scaled by the caller. The rows of a line, its beams, share K and V: one program holds them
all, so that every byte of K and V is read once. A single beam is multiplied out, several go through `tl.dot`, in rows
padded to 16 (not in fp32: see `beams_a_program`). With few lines the keys are split among programs, and a second kernel
merges their results:

    out = sum_i out_i exp(lse_i - lse),    lse = log sum_i exp(lse_i),    lse_i = log sum of exp(scores) of split i

(flash decoding; the softmax summed up piece by piece is Milakov, Gimelshein, arXiv 1805.02867).

Shapes: q [rows, heads, head_dim]; k, v [lines, heads, keys, head_dim], the outer strides free; out
[rows, heads * head_dim]; any of fp32, fp16, bf16, all alike.
Bytes: 2 * lines * heads * keys * head_dim elements read once; q and out. FLOPs: 4 a beam for each of the elements of K;
bound by memory.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trocr_fast.kernels.launch import DTYPES, Launch, Random, Work, output, power_of_two, require, run

LOG2_E = 1.4426950408889634
# An H200 has 132 multiprocessors, an A100 108. Splits bring up to two programs for each, which run all at once: with a
# few more, the last ones would run alone.
ENOUGH_PROGRAMS = 264
# Elements of a piece of K and of V: 32 of each a thread of 4 warps, all loaded before the first is used.
PIECE = 4096
MAX_BEAMS = 32  # of one program: twice as many spill


def reference(q: Tensor, k: Tensor, v: Tensor, slots: Tensor | None = None) -> Tensor:
    """The same mathematics in PyTorch, fp32 inside (fp64 for fp64), rounded once at the end.

    With several beams the weights are rounded, too, as for the kernel's second product.
    """
    inside = torch.promote_types(q.dtype, torch.float32)
    if slots is not None:
        unused = (slots < 0) | (slots >= k.shape[0])
        k, v = (memory[slots.long().masked_fill(unused, 0)] for memory in (k, v))
    grouped = q.to(inside).unflatten(0, (k.shape[0], -1)).transpose(1, 2)  # [groups, heads, beams, head_dim]
    scores = grouped @ k.to(inside).transpose(2, 3)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    if grouped.shape[2] > 1:
        weights = weights.to(q.dtype).to(inside)
    out = weights @ v.to(inside) / total
    if slots is not None:
        out = out.masked_fill(unused[:, None, None, None], 0)
    return out.transpose(1, 2).flatten(0, 1).flatten(1).to(q.dtype)


@triton.jit
def cross_attention_kernel(
    q_ptr,  # [rows, heads, head_dim], rows stride_q apart; rows = groups * beams
    k_ptr,  # [lines, heads, keys, head_dim]
    v_ptr,  # likewise
    slots_ptr,  # [groups], a group's line; or None: its own number
    out_ptr,  # [rows, heads, splits, head_dim]
    lse_ptr,  # [rows, heads, splits], to the base 2; or None
    stride_q,
    stride_k_line,
    stride_k_head,
    stride_v_line,
    stride_v_head,
    num_lines,
    num_keys,
    num_beams,
    num_splits,
    keys_a_split,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,  # a power of two, at least HEAD_DIM
    BEAM_BLOCK: tl.constexpr,  # beams of a program: 1, or a multiple of 16
    KEYS: tl.constexpr,  # keys a piece
    LOG2_E: tl.constexpr,
):
    # The beams of a line side by side, then its splits, then its heads: who shares memory runs together.
    beam_blocks = tl.cdiv(num_beams, BEAM_BLOCK)
    program = tl.program_id(0)
    beams = program % beam_blocks * BEAM_BLOCK + tl.arange(0, BEAM_BLOCK)
    split = program // beam_blocks % num_splits
    head = program // beam_blocks // num_splits % HEADS
    group = (program // beam_blocks // num_splits // HEADS).to(tl.int64)
    line = group
    begin = split * keys_a_split
    end = tl.minimum(begin + keys_a_split, num_keys)
    if slots_ptr is not None:
        line = tl.load(slots_ptr + group).to(tl.int64)
        end = tl.where((line >= 0) & (line < num_lines), end, 0)  # reads nothing, gives zeros

    dims = tl.arange(0, DIM_BLOCK)
    inside = dims < HEAD_DIM
    rows = group * num_beams + beams  # [BEAM_BLOCK]
    used = (beams < num_beams)[:, None] & inside[None, :]
    q = tl.load(q_ptr + rows[:, None] * stride_q + (head * HEAD_DIM + dims)[None, :], mask=used, other=0.0)
    k_ptr += line * stride_k_line + head.to(tl.int64) * stride_k_head
    v_ptr += line * stride_v_line + head.to(tl.int64) * stride_v_head

    top = tl.full([BEAM_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BEAM_BLOCK], tl.float32)
    out = tl.zeros([BEAM_BLOCK, DIM_BLOCK], tl.float32)
    for start in range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        there = keys < end
        at = keys.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
        read = there[:, None] & inside[None, :]
        k = tl.load(k_ptr + at, mask=read, other=0.0)  # [KEYS, DIM_BLOCK]
        v = tl.load(v_ptr + at, mask=read, other=0.0)
        if BEAM_BLOCK == 1:
            scores = tl.sum(k.to(tl.float32) * q.to(tl.float32), axis=1)[:, None]
        else:
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        scores = tl.where(there[:, None], scores * LOG2_E, -float("inf"))  # [KEYS, BEAM_BLOCK]
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights = tl.exp2(scores - new_top[None, :])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=0)
        if BEAM_BLOCK == 1:
            out = out * shrink[:, None] + tl.sum(weights * v.to(tl.float32), axis=0)[None, :]
        else:
            weights = tl.trans(weights.to(v.dtype))
            out = tl.dot(weights, v, out * shrink[:, None], input_precision="ieee")
        top = new_top

    total = tl.where(total > 0, total, 1.0)  # of no keys: zeros
    out = out / total[:, None]
    to = (rows * HEADS + head) * num_splits + split
    tl.store(out_ptr + to[:, None] * HEAD_DIM + dims[None, :], out, mask=used)
    if lse_ptr is not None:
        tl.store(lse_ptr + to, top + tl.log2(total), mask=beams < num_beams)


@triton.jit
def merge_splits_kernel(
    parts_ptr,  # [vectors, splits, width]
    lse_ptr,  # [vectors, splits], to the base 2; -inf where a split had no keys
    out_ptr,  # [vectors, width]
    num_splits,
    width,
    SPLIT_BLOCK: tl.constexpr,  # a power of two, at least num_splits
    COLUMNS: tl.constexpr,  # of a program
):
    column_blocks = tl.cdiv(width, COLUMNS)
    vector = (tl.program_id(0) // column_blocks).to(tl.int64)
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    splits = tl.arange(0, SPLIT_BLOCK)
    there = splits < num_splits
    lse = tl.load(lse_ptr + vector * num_splits + splits, mask=there, other=-float("inf"))
    at = (vector * num_splits + splits)[:, None] * width + columns[None, :]
    parts = tl.load(parts_ptr + at, mask=there[:, None] & (columns < width)[None, :], other=0.0)
    top = tl.max(lse, axis=0)
    weights = tl.exp2(lse - tl.where(top == -float("inf"), 0.0, top))  # no keys at all: zeros
    total = tl.sum(weights, axis=0)
    out = tl.sum(parts * weights[:, None], axis=0) / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + vector * width + columns, out, mask=columns < width)


def merge_splits(out: Tensor, width: int, num_splits: int) -> tuple[Tensor, Tensor | None, list[Launch]]:
    """Where splits write, and what makes `out` of it: vectors of `width` elements.

    Returns:
        (parts [vectors, splits, width], lse [vectors, splits], launches); without splits (out, None, []).
    """
    if num_splits == 1:
        return out, None, []
    vectors = out.numel() // max(1, width)
    parts = torch.empty((vectors, num_splits, width), dtype=torch.float32, device=out.device)
    lse = torch.empty((vectors, num_splits), dtype=torch.float32, device=out.device)
    split_block = power_of_two(num_splits)
    columns = max(16, min(power_of_two(width), 2048 // split_block))  # 16 elements a thread of 4 warps
    launch = Launch(
        merge_splits_kernel,
        (vectors * triton.cdiv(width, columns),),
        {"parts_ptr": parts, "lse_ptr": lse, "out_ptr": out, "num_splits": num_splits, "width": width},
        {"SPLIT_BLOCK": split_block, "COLUMNS": columns},
    )
    return parts, lse, [launch]


def split_keys(num_keys: int, piece: int, programs: int, num_splits: int | None) -> tuple[int, int]:
    """Into how many splits, and how many keys one has: whole pieces, no split without keys.

    Args:
        piece: keys that a program takes at a time.
        programs: that there are without splitting.
        num_splits: wanted; None: enough to keep the chip busy.
    """
    pieces = max(1, triton.cdiv(num_keys, piece))
    if num_splits is None:
        num_splits = ENOUGH_PROGRAMS // max(1, programs)
    keys_a_split = triton.cdiv(pieces, max(1, min(num_splits, pieces))) * piece
    return max(1, triton.cdiv(num_keys, keys_a_split)), keys_a_split


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Launch the kernel, and the one that merges splits.

    Args:
        q: [rows, heads, head_dim], scaled; the first stride is free. The same number of consecutive rows a line.
        k, v: [lines, heads, keys, head_dim]; the strides of lines and heads are free.
        slots: int32 [groups], the line of each group of consecutive rows; one outside k gives zeros and reads nothing.
            None: the groups are the lines.
        num_splits: into how many parts to split the keys at most; None: as many as keep the chip busy. A fixed number
            makes a row's result independent of the batch.
        out: [rows, heads * head_dim]; made if not given.

    Returns:
        out.

    Raises:
        ValueError: an argument of another shape, dtype or device, or one that is not contiguous; named.
    """
    return run(launches(q, k, v, slots, num_splits, out))["out_ptr"]


def launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
) -> list[Launch]:
    """Check the arguments of `cross_attention` and say what to launch."""
    require("q", q, (None, None, None), dtype=DTYPES, contiguous_from=1)
    rows, heads, head_dim = q.shape
    require("k", k, (None, heads, None, head_dim), q, contiguous_from=2)
    num_lines, num_keys = k.shape[0], k.shape[2]
    if num_keys < 1:
        raise ValueError(f"k: expected at least 1 key, got shape {list(k.shape)}")
    require("v", v, k.shape, q, contiguous_from=2)
    groups, num_beams = groups_of("q", q, num_lines, slots)
    out = output("out", out, (rows, heads * head_dim), q)
    beam_block = beams_a_program(num_beams, q.dtype)
    dim_block = power_of_two(head_dim) if beam_block == 1 else max(16, power_of_two(head_dim))
    keys = max(16, min(128, PIECE // dim_block))
    programs = groups * heads * triton.cdiv(num_beams, beam_block)
    num_splits, keys_a_split = split_keys(num_keys, keys, programs, num_splits)
    parts, lse, merge = merge_splits(out, head_dim, num_splits)
    launch = Launch(
        cross_attention_kernel,
        (programs * num_splits,),
        {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "slots_ptr": slots,
            "out_ptr": parts,
            "lse_ptr": lse,
            "stride_q": q.stride(0),
            "stride_k_line": k.stride(0),
            "stride_k_head": k.stride(1),
            "stride_v_line": v.stride(0),
            "stride_v_head": v.stride(1),
            "num_lines": num_lines,
            "num_keys": num_keys,
            "num_beams": num_beams,
            "num_splits": num_splits,
            "keys_a_split": keys_a_split,
        },
        {
            "HEADS": heads,
            "HEAD_DIM": head_dim,
            "DIM_BLOCK": dim_block,
            "BEAM_BLOCK": beam_block,
            "KEYS": keys,
            "LOG2_E": LOG2_E,
        },
    )
    return [launch, *merge]


def beams_a_program(num_beams: int, dtype: torch.dtype) -> int:
    """How many beams a program holds."""
    # An exact fp32 product does not run on the matrix units, and Triton's own takes more registers than there are
    # (2 KB a thread spill). There a program holds one beam, and the next ones find K and V in the L2 cache.
    if num_beams == 1 or dtype == torch.float32:
        return 1
    return 16 if num_beams <= 16 else MAX_BEAMS


def groups_of(name: str, q: Tensor, num_lines: int, slots: Tensor | None) -> tuple[int, int]:
    """How many groups of rows share a line, and the rows of each; `name` is what the launcher calls q.

    Raises:
        ValueError: `slots` is wrong, or the rows cannot be divided among the groups.
    """
    if slots is not None:
        require("slots", slots, (None,), q, torch.int32)
    rows, groups = len(q), num_lines if slots is None else len(slots)
    if rows and (groups == 0 or rows % groups):
        raise ValueError(f"{name}: expected a multiple of {groups} rows, got {rows}")
    return groups, rows // max(1, groups)


class Case(NamedTuple):
    """One layer of a decode step."""

    lines: int
    beams: int
    heads: int
    head_dim: int
    keys: int


def cases() -> list[Case]:
    """Steps of base and large (16 heads of 64; 577 keys, with DeiT 578), small (8 of 32); greedy, 4 beams, one line."""
    return [
        Case(64, 1, 16, 64, 577),
        Case(256, 1, 16, 64, 577),
        Case(64, 4, 16, 64, 577),
        Case(1, 1, 16, 64, 577),
        Case(1, 4, 16, 64, 577),
        Case(64, 10, 16, 64, 577),
        Case(64, 1, 8, 32, 578),
        Case(64, 4, 8, 32, 578),
        Case(1, 1, 8, 32, 578),
    ]


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> tuple:
    """Random arguments of the launcher, outputs aside."""
    lines, beams, heads, head_dim, keys = case
    draw = Random(dtype, device, seed)
    q = draw((lines * beams, heads, head_dim))
    k, v = draw((2, lines, heads, keys, head_dim))
    return q, k, v


def work(case: Case, dtype: torch.dtype) -> Work:
    """What one step must move and compute."""
    lines, beams, heads, head_dim, keys = case
    elements = lines * heads * head_dim
    return Work(num_bytes=2 * elements * (keys + beams) * dtype.itemsize, flops=4 * elements * keys * beams)
