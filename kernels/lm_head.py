"""The head's product and the choice of the next token, without the logits in memory.

    logits = x @ weight.T
    token = argmax(logits), the first of equal maxima
    log_prob = logits[token] - log(sum(exp(logits)))

The first launch gives each program a tile of the vocabulary and a tile of rows; it keeps the tile's logits in fp32
registers and writes only their maximum, its place, and the sum of exponentials relative to it. The second merges the
tiles of a row (the online softmax of Milakov, Gimelshein, arXiv 1805.02867). The logits stay in fp32 from the
product's accumulators on and are never rounded to the dtype of the weights, so rows that would tie in fp16 do not.

A NaN counts as plus infinity: the token is the place of the first of either, and the log-probability is NaN. So it is
where all logits are minus infinity. A token is valid whatever the logits.

Shapes: x [rows, width]; weight [vocab, width]; fp32, fp16 or bf16, both alike; tokens int64 [rows], log_probs fp32
[rows]; any number of rows.
Bytes: the weights once, and x: vocab * width + rows * width elements. FLOPs: 2 * rows * vocab * width; bound by memory
up to about 200 rows in bf16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trocr_fast.kernels.launch import DTYPES, Launch, Random, Work, output, power_of_two, require, run


def reference(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same mathematics in PyTorch, fp32 inside (fp64 for fp64)."""
    inside = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(inside) @ weight.to(inside).T
    tokens = logits.argmax(-1)
    return tokens, logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)


@triton.jit
def lm_head_kernel(
    x_ptr,  # [rows, width]
    weight_ptr,  # [vocab, width]
    maxima_ptr,  # fp32 [rows, tiles]
    places_ptr,  # int32 [rows, tiles]: tokens
    sums_ptr,  # fp32 [rows, tiles]: of exp(logit - maximum)
    rows,
    vocab,
    width,
    tiles,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # The row tiles of one vocabulary tile are neighbours in the grid: its weights come from memory once, then from L2.
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.program_id(1)
    token = tile * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
    filled, exists = row < rows, token < vocab
    starts_x = x_ptr + row.to(tl.int64)[:, None] * width
    starts = weight_ptr + token.to(tl.int64)[:, None] * width
    # The vocabulary is the product's first side: with 64 or more rows there it is Hopper's own instruction, however
    # few rows x has.
    logits = tl.zeros((BLOCK_VOCAB, BLOCK_ROWS), tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        columns = start + tl.arange(0, BLOCK_WIDTH)
        inside = columns < width
        weight = tl.load(starts + columns[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
        x = tl.load(starts_x + columns[None, :], mask=filled[:, None] & inside[None, :], other=0.0)
        logits = tl.dot(weight, tl.trans(x), logits, input_precision="ieee")
    logits = tl.where(exists[:, None], logits, float("-inf"))

    ranked = tl.where(logits != logits, float("inf"), logits)  # a NaN is the largest; the sum below tells of it
    maximum = tl.max(ranked, axis=0)  # [BLOCK_ROWS]
    place = tl.min(tl.where(ranked == maximum[None, :], token[:, None], vocab - 1), axis=0)
    # minus infinity everywhere: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp(logits - base[None, :]), axis=0)
    at = row.to(tl.int64) * tiles + tile
    tl.store(maxima_ptr + at, maximum, mask=filled)
    tl.store(places_ptr + at, place, mask=filled)
    tl.store(sums_ptr + at, total, mask=filled)


@triton.jit
def lm_head_merge_kernel(
    maxima_ptr,  # fp32 [rows, tiles]
    places_ptr,  # int32 [rows, tiles]
    sums_ptr,  # fp32 [rows, tiles]
    tokens_ptr,  # int64 [rows]
    log_probs_ptr,  # fp32 [rows]
    vocab,
    tiles,
    BLOCK: tl.constexpr,  # a power of two, at least tiles: one program holds one row
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    inside = tile < tiles
    at = row * tiles + tile
    maxima = tl.load(maxima_ptr + at, mask=inside, other=float("-inf"))
    places = tl.load(places_ptr + at, mask=inside, other=vocab - 1)
    sums = tl.load(sums_ptr + at, mask=inside, other=0.0)
    best = tl.max(maxima, axis=0)
    # a tile's place is its first, so the least of the places is the row's first
    token = tl.min(tl.where(maxima == best, places, vocab - 1), axis=0)
    base = tl.where(best == float("-inf"), 0.0, best)
    # a tile of minus infinity alone has a sum of 0 and a factor of 0
    total = tl.sum(sums * tl.exp(maxima - base), axis=0)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    # the token's own term is exp(0): what is left of logit - logsumexp is -log(sum), or NaN where `best` is infinite
    tl.store(log_probs_ptr + row, (best - base) - tl.log(total))


def lm_head(
    x: Tensor, weight: Tensor, tokens: Tensor | None = None, log_probs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the two kernels.

    Args:
        x: [rows, width], contiguous.
        weight: [vocab, width], contiguous, of the dtype and device of x.
        tokens: int64 [rows]; made if not given.
        log_probs: fp32 [rows]; made if not given.

    Returns:
        (tokens, log_probs).

    Raises:
        ValueError: an argument of another shape, dtype or device, or one that is not contiguous; named.
    """
    last = run(launches(x, weight, tokens, log_probs))
    return last["tokens_ptr"], last["log_probs_ptr"]


def launches(x: Tensor, weight: Tensor, tokens: Tensor | None = None, log_probs: Tensor | None = None) -> list[Launch]:
    """Check the arguments of `lm_head` and say what to launch."""
    require("x", x, (None, None), dtype=DTYPES)
    rows, width = x.shape
    require("weight", weight, (None, width), x)
    vocab = weight.shape[0]
    if vocab < 1:
        raise ValueError("weight: expected at least one token, got none")
    tokens = output("tokens", tokens, (rows,), x, torch.int64)
    log_probs = output("log_probs", log_probs, (rows,), x, torch.float32)
    block_rows, block_vocab, block_width, num_warps, num_stages = blocks(rows, x.dtype)
    tiles = triton.cdiv(vocab, block_vocab)
    maxima, sums = (torch.empty((rows, tiles), dtype=torch.float32, device=x.device) for _ in range(2))
    places = torch.empty((rows, tiles), dtype=torch.int32, device=x.device)
    partial = {"maxima_ptr": maxima, "places_ptr": places, "sums_ptr": sums}
    sizes = {"vocab": vocab, "tiles": tiles}
    product = Launch(
        lm_head_kernel,
        (triton.cdiv(rows, block_rows), tiles),
        {"x_ptr": x, "weight_ptr": weight, **partial, "rows": rows, "width": width, **sizes},
        {"BLOCK_ROWS": block_rows, "BLOCK_VOCAB": block_vocab, "BLOCK_WIDTH": block_width},
        num_warps,
        num_stages,
    )
    block = power_of_two(tiles)
    merge = Launch(
        lm_head_merge_kernel,
        (rows,),
        {**partial, "tokens_ptr": tokens, "log_probs_ptr": log_probs, **sizes},
        {"BLOCK": block},
        num_warps=max(1, min(4, block // 128)),
    )
    return [product, merge]


def blocks(rows: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """(rows, tokens, columns of a tile, warps, stages). Not yet measured on a GPU."""
    if dtype == torch.float32:
        # without matrix units: each thread multiplies its own part of the tile, which lives in registers
        return (16, 64, 32, 4, 3) if rows <= 16 else (64, 64, 32, 8, 3)
    if rows <= 16:
        return 16, 64, 128, 4, 4  # 80 KB of stages: two programs a multiprocessor keep 160 KB under way
    if rows <= 32:
        return 32, 64, 128, 4, 4
    if rows <= 64:
        return 64, 128, 64, 4, 4  # 64 accumulators a thread
    return 128, 128, 64, 8, 4  # 256 rows are two tiles: 0.5 L2 reads a product instead of more registers


def cases() -> list[tuple[int, int, int]]:
    """(rows, vocab, width): batch 64 and 256 of base, small, one line, a few, and the built-in model."""
    return [
        (64, 50265, 1024),
        (256, 50265, 1024),
        (1, 50265, 1024),
        (8, 50265, 1024),
        (64, 64044, 256),
        (256, 64044, 256),
        (64, 202, 192),
    ]


def inputs(case: tuple[int, int, int], dtype: torch.dtype, device: str, seed: int = 0) -> tuple:
    """Random arguments of the launcher, outputs aside."""
    rows, vocab, width = case
    draw = Random(dtype, device, seed)
    # logits of a spread of about 3: neither one token alone nor all alike
    return draw((rows, width)), draw((vocab, width), scale=3.0 * max(width, 1) ** -0.5)


def work(case: tuple[int, int, int], dtype: torch.dtype) -> Work:
    """What the launches must move and compute."""
    rows, vocab, width = case
    return Work(num_bytes=(vocab + rows) * width * dtype.itemsize + 12 * rows, flops=2 * rows * vocab * width)
