"""Cross-attention of a decode step over the encoder's output itself, without keys and values.

    context = softmax(latent_q E^T) E

for each row and head, with latent_q = q Wk, made by a library product, and q scaled. The heads' outputs are
context Wv^T + bv, again library products: see `ops.latent_cross_attention`, which has the whole mathematics. All heads
of all beams of a line share E, so that they fill the rows of a tile for the matrix units. The products are computed
transposed, E times latent_q^T, because their long side has to come first there; the width is cut into chunks, as Triton
has no range of 768. With few lines the keys are split among programs and merged, as in `cross_attention`.

E may be stored less its mean over the keys, which rounds better in half precision: the scores of a head shift alike,
which softmax does not see, and context misses the mean, which the caller adds. The kernel is the same.

Shapes: latent_q, context [rows, heads, width]; states, that is E, [lines, keys, width]; any of fp32, fp16, bf16, all
alike.
Bytes: lines * keys * width elements of E once; latent_q and context. FLOPs: 4 a beam and head for each element of E:
bound by memory with one beam, by arithmetic from some four beams of 16 heads on.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trocr_fast.kernels.cross_attention import LOG2_E, groups_of, merge_splits, split_keys
from trocr_fast.kernels.launch import DTYPES, Launch, Random, Work, output, power_of_two, require, run

MAX_VECTORS = 32  # rows times heads of a program: more spill
MAX_CHUNK = 256  # columns of E in one product


def reference(latent_q: Tensor, states: Tensor, slots: Tensor | None = None) -> Tensor:
    """The same mathematics in PyTorch, fp32 inside (fp64 for fp64), rounded once at the end.

    The weights are rounded, too, as for the kernel's second product.
    """
    inside = torch.promote_types(latent_q.dtype, torch.float32)
    if slots is not None:
        unused = (slots < 0) | (slots >= states.shape[0])
        states = states[slots.long().masked_fill(unused, 0)]
    grouped = latent_q.to(inside).flatten(0, 1).unflatten(0, (states.shape[0], -1))  # [groups, beams * heads, width]
    scores = grouped @ states.to(inside).transpose(1, 2)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    out = weights.to(states.dtype).to(inside) @ states.to(inside) / total
    if slots is not None:
        out = out.masked_fill(unused[:, None, None], 0)
    return out.view(latent_q.shape).to(latent_q.dtype)


@triton.jit
def with_another(values, value):
    # Triton does not know (*values, value)
    return values + (value,)  # noqa: RUF005


@triton.jit
def latent_cross_attention_kernel(
    q_ptr,  # [rows, heads, width], rows stride_q_row and heads stride_q_head apart; rows = groups * beams
    states_ptr,  # [lines, keys, width], lines stride_line apart
    slots_ptr,  # [groups], a group's line; or None: its own number
    out_ptr,  # [rows, heads, splits, width]
    lse_ptr,  # [rows, heads, splits], to the base 2; or None
    stride_q_row,
    stride_q_head,
    stride_line,
    num_lines,
    num_keys,
    num_vectors,  # of a group: beams * heads
    num_splits,
    keys_a_split,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,  # columns of a product, a power of two
    VECTORS: tl.constexpr,  # of a program, a multiple of 16
    KEYS: tl.constexpr,  # keys a piece
    LOG2_E: tl.constexpr,
):
    # The parts of a group's vectors side by side: the second reads E from the L2 cache.
    vector_blocks = tl.cdiv(num_vectors, VECTORS)
    program = tl.program_id(0)
    vectors = program % vector_blocks * VECTORS + tl.arange(0, VECTORS)
    split = program // vector_blocks % num_splits
    group = (program // vector_blocks // num_splits).to(tl.int64)
    line = group
    begin = split * keys_a_split
    end = tl.minimum(begin + keys_a_split, num_keys)
    if slots_ptr is not None:
        line = tl.load(slots_ptr + group).to(tl.int64)
        end = tl.where((line >= 0) & (line < num_lines), end, 0)  # reads nothing, gives zeros
    states_ptr += line * stride_line

    used = vectors < num_vectors
    # No masks but where a chunk is part-filled: a vector or key too many is the last one again, and left out later.
    vectors = group * num_vectors + tl.minimum(vectors, num_vectors - 1)  # [VECTORS], rows * heads
    q_at = vectors // HEADS * stride_q_row + vectors % HEADS * stride_q_head
    columns = tl.arange(0, CHUNK)
    CHUNKS: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK

    top = tl.full([VECTORS], -float("inf"), tl.float32)
    total = tl.zeros([VECTORS], tl.float32)
    out = ()  # a chunk each: [CHUNK, VECTORS]
    for _ in tl.static_range(CHUNKS):
        out = with_another(out, tl.zeros([CHUNK, VECTORS], tl.float32))
    for start in range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        there = keys < end
        at = tl.minimum(keys, end - 1).to(tl.int64)[:, None] * WIDTH
        scores = tl.zeros([KEYS, VECTORS], tl.float32)
        states = ()
        for i in tl.static_range(CHUNKS):
            column = i * CHUNK + columns
            # q again for each piece, from the nearest cache: it would take too many registers
            if WIDTH % CHUNK == 0:
                chunk = tl.load(states_ptr + at + column[None, :])
                q = tl.load(q_ptr + q_at[:, None] + column[None, :])
            else:
                inside = (column < WIDTH)[None, :]
                chunk = tl.load(states_ptr + at + column[None, :], mask=inside, other=0.0)
                q = tl.load(q_ptr + q_at[:, None] + column[None, :], mask=inside, other=0.0)
            scores = tl.dot(chunk, tl.trans(q), scores, input_precision="ieee")
            states = with_another(states, chunk)
        scores = tl.where(there[:, None], scores * LOG2_E, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights = tl.exp2(scores - new_top[None, :])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=0)
        weights = weights.to(states_ptr.dtype.element_ty)  # [KEYS, VECTORS]
        added = ()
        for i in tl.static_range(CHUNKS):
            chunk = tl.dot(tl.trans(states[i]), weights, out[i] * shrink[None, :], input_precision="ieee")
            added = with_another(added, chunk)
        out = added
        top = new_top

    total = tl.where(total > 0, total, 1.0)  # of no keys: zeros
    to = vectors * num_splits + split
    for i in tl.static_range(CHUNKS):
        column = i * CHUNK + columns
        mask = (column < WIDTH)[:, None] & used[None, :]
        tl.store(out_ptr + to[None, :] * WIDTH + column[:, None], out[i] / total[None, :], mask=mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + to, top + tl.log2(total), mask=used)


def latent_cross_attention(
    latent_q: Tensor,
    states: Tensor,
    slots: Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Launch the kernel, and the one that merges splits.

    Args:
        latent_q: [rows, heads, width]; the strides of rows and heads are free. The same number of consecutive rows a
            line.
        states: [lines, keys, width]; the first stride is free.
        slots, num_splits: as of `cross_attention`.
        out: [rows, heads, width]; made if not given.

    Returns:
        out: the context, not yet multiplied by Wv.

    Raises:
        ValueError: an argument of another shape, dtype or device, or one that is not contiguous; named.
    """
    return run(launches(latent_q, states, slots, num_splits, out))["out_ptr"]


def launches(
    latent_q: Tensor,
    states: Tensor,
    slots: Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
) -> list[Launch]:
    """Check the arguments of `latent_cross_attention` and say what to launch."""
    require("latent_q", latent_q, (None, None, None), dtype=DTYPES, contiguous_from=2)
    _, heads, width = latent_q.shape
    require("states", states, (None, None, width), latent_q, contiguous_from=1)
    num_lines, num_keys, _ = states.shape
    if num_keys < 1:
        raise ValueError(f"states: expected at least 1 key, got shape {list(states.shape)}")
    groups, num_beams = groups_of("latent_q", latent_q, num_lines, slots)
    out = output("out", out, latent_q.shape, latent_q)
    num_vectors = num_beams * heads
    tile = tile_of(width, num_vectors, latent_q.element_size())
    programs = groups * triton.cdiv(num_vectors, tile.vectors)
    num_splits, keys_a_split = split_keys(num_keys, tile.keys, programs, num_splits)
    parts, lse, merge = merge_splits(out, width, num_splits)
    launch = Launch(
        latent_cross_attention_kernel,
        (programs * num_splits,),
        {
            "q_ptr": latent_q,
            "states_ptr": states,
            "slots_ptr": slots,
            "out_ptr": parts,
            "lse_ptr": lse,
            "stride_q_row": latent_q.stride(0),
            "stride_q_head": latent_q.stride(1),
            "stride_line": states.stride(0),
            "num_lines": num_lines,
            "num_keys": num_keys,
            "num_vectors": num_vectors,
            "num_splits": num_splits,
            "keys_a_split": keys_a_split,
        },
        {
            "HEADS": heads,
            "WIDTH": width,
            "CHUNK": tile.chunk,
            "VECTORS": tile.vectors,
            "KEYS": tile.keys,
            "LOG2_E": LOG2_E,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return [launch, *merge]


class Tile(NamedTuple):
    """What one program holds."""

    vectors: int
    keys: int  # a piece
    chunk: int  # columns
    num_warps: int
    num_stages: int


def tile_of(width: int, num_vectors: int, item_size: int) -> Tile:
    """The table of tiles: what fits into 255 registers a thread and into the shared memory of an A100, 163 KB."""
    if item_size == 4:  # without matrix units a product holds whole rows and columns of a chunk in registers
        return Tile(vectors=16, keys=16, chunk=max(16, min(64, power_of_two(width))), num_warps=8, num_stages=2)
    vectors = 16 if num_vectors <= 16 else MAX_VECTORS
    # What leaves the least of the last chunk empty: 3 * 256 for 768, 3 * 128 for 384.
    chunk = min((MAX_CHUNK, 128), key=lambda size: triton.cdiv(width, size) * size)
    chunk = max(16, min(chunk, power_of_two(width)))
    keys = 32
    if vectors == MAX_VECTORS and width <= 512:
        keys = 64  # as many as Hopper's matrix instruction takes at once
    elif vectors == MAX_VECTORS and width > 768:
        keys = 16  # 32 spill on an A100
    # With 16 vectors two programs share a multiprocessor, with 32 the registers leave room for one alone.
    num_stages = 3 if vectors == MAX_VECTORS and width <= 768 else 2
    return Tile(vectors, keys, chunk, num_warps=8, num_stages=num_stages)


class Case(NamedTuple):
    """One layer of a decode step."""

    lines: int
    beams: int
    heads: int
    width: int
    keys: int


def cases() -> list[Case]:
    """Steps of base (E of 768), large (1024) and small (384, 578 keys); greedy, 4 and 10 beams, one line."""
    return [
        Case(64, 1, 16, 768, 577),
        Case(256, 1, 16, 768, 577),
        Case(64, 4, 16, 768, 577),
        Case(1, 1, 16, 768, 577),
        Case(1, 4, 16, 768, 577),
        Case(64, 10, 16, 768, 577),
        Case(64, 1, 16, 1024, 577),
        Case(64, 4, 16, 1024, 577),
        Case(64, 1, 8, 384, 578),
        Case(64, 4, 8, 384, 578),
        Case(1, 1, 8, 384, 578),
    ]


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> tuple:
    """Random arguments of the launcher, outputs aside; scores of about one, as a model's."""
    lines, beams, heads, width, keys = case
    draw = Random(dtype, device, seed)
    # by head, as the library product leaves it
    latent_q = draw((heads, lines * beams, width), scale=1 / math.sqrt(width)).transpose(0, 1)
    return latent_q, draw((lines, keys, width))


def work(case: Case, dtype: torch.dtype) -> Work:
    """What one step must move and compute."""
    lines, beams, heads, width, keys = case
    vectors = beams * heads
    num_bytes = lines * width * (keys + 2 * vectors) * dtype.itemsize
    return Work(num_bytes=num_bytes, flops=4 * lines * vectors * keys * width)
