"""Self-attention of a decode step over the paged cache: stores a row's new token and attends, in one launch.

    memory[slot] = k, v
    out = softmax(q K^T) V,    K and V: the row's tokens in its blocks, and the new one

for each row and head, with q scaled by the caller. Token t of a row lies in block `block_tables[row, t // block_size]`
at `t % block_size`; the last of its `context_lens[row]` tokens is the new one. One program owns a (row, head): it takes
the new token from registers and reads the others from memory, so that no program reads what another one writes.
The softmax is summed up piece by piece (Milakov, Gimelshein, arXiv 1805.02867), from the new token on.

Shapes: q, k, v [rows, heads, head_dim]; memory [blocks, layers, 2, block_size, heads, head_dim] (csrc/kv_memory.h);
out [rows, heads * head_dim]; any of fp32, fp16, bf16, all alike.
Bytes: K and V of the cached tokens once, 3 reads and 3 writes of rows * width elements, the table. FLOPs: 4 a key and
element of a head; bound by memory, and at short contexts by the latency of three reads that wait for one another.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from trocr_fast.kernels.launch import DTYPES, Launch, Random, Work, output, power_of_two, require, run

LOG2_E = 1.4426950408889634
# Keys a piece. A line has 11 tokens at the mean and a tail past 30, so most rows take one piece.
KEYS = 32
# Warps, by the width of a piece: 32 elements of K and of V a thread, all loaded before the first is used.
NUM_WARPS = {32: 1, 64: 2, 128: 4}


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """The attention in PyTorch over a gathered copy, fp32 inside (fp64 for fp64), rounded once at the end.

    Stores nothing: what is written to `memory` is what `KVMemory.write` of csrc writes.
    """
    del slot_mapping
    inside = torch.promote_types(q.dtype, torch.float32)
    blocks_in_memory, _, _, block_size = memory.shape[:4]
    lengths = context_lens.unsqueeze(1)
    tokens = torch.arange(max(1, int(lengths.max())), device=q.device)
    columns = (tokens // block_size).clamp(max=block_tables.shape[1])  # the last one stands for all past the table
    blocks = F.pad(block_tables, (0, 1), value=-1)[:, columns].long()  # [rows, tokens]
    is_new = tokens == lengths - 1
    beyond = tokens >= lengths
    unread = beyond | is_new | (blocks < 0) | (blocks >= blocks_in_memory)
    kv = memory[:, layer].transpose(1, 2)  # [blocks, block_size, 2, heads, head_dim]
    kv = kv[blocks.masked_fill(unread, 0), tokens % block_size]  # [rows, tokens, 2, heads, head_dim]
    kv = kv.to(inside).masked_fill(unread[..., None, None, None], 0)
    new = torch.stack([k, v], dim=1).to(inside).unsqueeze(1)  # [rows, 1, 2, heads, head_dim]
    keys, values = torch.where(is_new[..., None, None, None], new, kv).unbind(2)
    scores = torch.einsum("rhd,rthd->rht", q.to(inside), keys).masked_fill(beyond.unsqueeze(1), -torch.inf)
    probabilities = scores.softmax(-1).masked_fill(beyond.unsqueeze(1), 0)  # of length 0: NaN before
    return torch.einsum("rht,rthd->rhd", probabilities, values).flatten(1).to(q.dtype)


@triton.jit
def paged_attention_kernel(
    q_ptr,  # [rows, heads, head_dim], rows stride_q apart
    k_ptr,  # likewise
    v_ptr,  # likewise
    memory_ptr,  # [blocks, 2, block_size, heads, head_dim] of one layer, blocks stride_block apart
    block_tables_ptr,  # [rows, max_blocks]
    context_lens_ptr,  # [rows]
    slot_mapping_ptr,  # [rows]
    out_ptr,  # [rows, heads, head_dim]
    stride_q,
    stride_k,
    stride_v,
    stride_block,
    num_blocks,
    max_blocks,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,  # a power of two, at least HEAD_DIM
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,  # keys a piece
    LOG2_E: tl.constexpr,
):
    head = tl.program_id(0) % HEADS
    row = (tl.program_id(0) // HEADS).to(tl.int64)
    dims = tl.arange(0, DIM_BLOCK)
    inside = dims < HEAD_DIM
    at = head * HEAD_DIM + dims
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    SIDE: tl.constexpr = BLOCK_SIZE * WIDTH  # from a block's keys to its values

    length = tl.load(context_lens_ptr + row)
    slot = tl.load(slot_mapping_ptr + row)
    new_k = tl.load(k_ptr + row * stride_k + at, mask=inside, other=0.0)
    new_v = tl.load(v_ptr + row * stride_v + at, mask=inside, other=0.0)
    if (slot >= 0) & (slot // BLOCK_SIZE < num_blocks):
        place = memory_ptr + slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * WIDTH
        tl.store(place + at, new_k, mask=inside)
        tl.store(place + SIDE + at, new_v, mask=inside)

    out = tl.zeros([DIM_BLOCK], tl.float32)
    if length > 0:
        # exp2 costs less than exp: log2(e) goes into q
        q = tl.load(q_ptr + row * stride_q + at, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        top = tl.sum(q * new_k.to(tl.float32), axis=0)
        total = 1.0
        out = new_v.to(tl.float32)
        for start in range(0, length - 1, KEYS):
            tokens = start + tl.arange(0, KEYS)
            cached = tokens < length - 1
            # As in csrc, a token past the table and a block outside the memory read as zeros.
            columns = tokens // BLOCK_SIZE
            blocks = tl.load(
                block_tables_ptr + row * max_blocks + columns, mask=cached & (columns < max_blocks), other=-1
            )
            read = ((blocks >= 0) & (blocks < num_blocks))[:, None] & inside[None, :]
            offsets = (blocks.to(tl.int64) * stride_block + tokens % BLOCK_SIZE * WIDTH)[:, None] + at[None, :]
            keys = tl.load(memory_ptr + offsets, mask=read, other=0.0).to(tl.float32)
            values = tl.load(memory_ptr + SIDE + offsets, mask=read, other=0.0).to(tl.float32)
            scores = tl.where(cached, tl.sum(keys * q[None, :], axis=1), -float("inf"))  # [KEYS]
            new_top = tl.maximum(top, tl.max(scores, axis=0))
            weights = tl.exp2(scores - new_top)
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weights, axis=0)
            out = out * shrink + tl.sum(weights[:, None] * values, axis=0)
            top = new_top
        out = out / total
    tl.store(out_ptr + row * WIDTH + at, out, mask=inside)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    slot_mapping: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Launch the kernel.

    Args:
        q, k, v: [rows, heads, head_dim] of the new tokens, q scaled; the first stride is free.
        memory: [blocks, layers, 2, block_size, heads, head_dim], contiguous; the new tokens are stored there.
        layer: whose keys and values.
        block_tables: int32 [rows, max_blocks], contiguous; read up to the row's length only.
        context_lens: int32 [rows], tokens of each row, the new one counted; a row of 0 gives zeros and reads no block.
        slot_mapping: int64 [rows], where the new token is stored; -1 stores nothing.
        out: [rows, heads * head_dim]; made if not given.

    Returns:
        out. An index that lies outside stores nothing and reads zeros, as in csrc: on a GPU it cannot be checked.

    Raises:
        ValueError: an argument of another shape, dtype or device, one that is not contiguous, no such layer; named.
    """
    return run(launches(q, k, v, memory, layer, block_tables, context_lens, slot_mapping, out))["out_ptr"]


def launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    slot_mapping: Tensor,
    out: Tensor | None = None,
) -> list[Launch]:
    """Check the arguments of `paged_attention` and say what to launch."""
    require("q", q, (None, None, None), dtype=DTYPES, contiguous_from=1)
    rows, heads, head_dim = q.shape
    require("k", k, q.shape, q, contiguous_from=1)
    require("v", v, q.shape, q, contiguous_from=1)
    require("memory", memory, (None, None, 2, None, heads, head_dim), q)
    num_blocks, num_layers, _, block_size = memory.shape[:4]
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer: expected 0 to {num_layers - 1}, got {layer}")
    require("block_tables", block_tables, (rows, None), q, torch.int32)
    require("context_lens", context_lens, (rows,), q, torch.int32)
    require("slot_mapping", slot_mapping, (rows,), q, torch.int64)
    out = output("out", out, (rows, heads * head_dim), q)
    dim_block = power_of_two(head_dim)
    launch = Launch(
        paged_attention_kernel,
        (rows * heads,),
        {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "memory_ptr": memory[:, layer],
            "block_tables_ptr": block_tables,
            "context_lens_ptr": context_lens,
            "slot_mapping_ptr": slot_mapping,
            "out_ptr": out,
            "stride_q": q.stride(0),
            "stride_k": k.stride(0),
            "stride_v": v.stride(0),
            "stride_block": memory.stride(0),
            "num_blocks": num_blocks,
            "max_blocks": block_tables.shape[1],
        },
        {
            "HEADS": heads,
            "HEAD_DIM": head_dim,
            "DIM_BLOCK": dim_block,
            "BLOCK_SIZE": block_size,
            "KEYS": KEYS,
            "LOG2_E": LOG2_E,
        },
        num_warps=NUM_WARPS.get(dim_block, 1 if dim_block < 32 else 8),
    )
    return [launch]


class Case(NamedTuple):
    """A decode step; the rows' lengths are `length` and a few tokens less."""

    rows: int
    heads: int
    head_dim: int
    length: int
    layers: int = 1
    block_size: int = 1


def cases() -> list[Case]:
    """Steps of base and large (16 heads of 64), small (8 of 32); greedy, 4 beams of 64 lines, one line, formulas."""
    return [
        Case(64, 16, 64, 11, layers=12),
        Case(256, 16, 64, 11, layers=12),
        Case(1, 16, 64, 11, layers=12),
        Case(256, 8, 32, 11, layers=6),
        Case(64, 16, 64, 30, layers=12, block_size=16),
        Case(100, 16, 64, 500),
    ]


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> tuple:
    """Random arguments of the launcher, outputs aside; NaN in every slot that holds no token."""
    rows, heads, head_dim, length, layers, block_size = case
    draw = Random(dtype, device, seed)
    q, k, v = draw((rows, 3 * heads * head_dim)).unflatten(1, (3, heads, head_dim)).unbind(1)
    max_blocks = -(-length // block_size)
    num_blocks = rows * max_blocks + 1
    memory = draw((num_blocks, layers, 2, block_size, heads, head_dim))
    if device == "meta":
        tables = torch.empty((rows, max_blocks), dtype=torch.int32, device=device)
        return q, k, v, memory, layers // 2, tables, tables.new_empty(rows), q.new_empty(rows, dtype=torch.int64)
    order = torch.randperm(num_blocks, generator=draw.generator)[: rows * max_blocks]
    tables = order.view(rows, max_blocks)
    lengths = (length - torch.arange(rows) % 5).clamp(min=1)
    last = lengths - 1
    slots = tables[torch.arange(rows), last // block_size] * block_size + last % block_size
    free = torch.ones(num_blocks, block_size, dtype=torch.bool)
    tokens = torch.arange(max_blocks * block_size)
    held = tokens < last.unsqueeze(1)
    free[tables[:, tokens // block_size][held], (tokens % block_size).expand(rows, -1)[held]] = False
    memory = memory.masked_fill(free.to(device)[:, None, None, :, None, None], torch.nan)
    tables = torch.where(tokens[::block_size] < lengths.unsqueeze(1), tables, 2**30)  # never read
    return q, k, v, memory, layers // 2, tables.int().to(device), lengths.int().to(device), slots.to(device)


def work(case: Case, dtype: torch.dtype) -> Work:
    """What one launch must move and compute."""
    rows, heads, head_dim, length, _, block_size = case
    keys = sum(max(1, length - row % 5) for row in range(rows))  # with the new token's
    width = heads * head_dim
    elements = 2 * (keys - rows) + 6 * rows  # times width: K and V read; q, k, v read and K, V, out written
    tables = 4 * (keys // block_size + rows) + 8 * rows
    return Work(num_bytes=elements * width * dtype.itemsize + tables, flops=4 * keys * width)
