"""The best continuations of each line's beams, in one pass over the logits.

    total[beam, token] = scores[beam] + log_softmax(logits[beam])[token]
    values, indices = the `count` largest totals of a line over (beam, token), indices = beam * vocab + token

Three launches. The first streams the logits: each program takes a tile of one row and writes the sum of its
exponentials and the largest logit of every group of 64. The `count` best tokens of a row lie in the `count` groups with
the largest maxima (any other group is beaten by as many tokens), so the second launch reads these few groups again, and
knows the row's log-sum-exp and so its best totals: the softmax shifts all logits of a row alike, so their order is that
of the totals. The third merges the beams of a line. A logit and its place are packed in one integer of 64 bits, so that
the largest integer is the largest logit and, of equal logits, the one that comes first.

Order: values do not increase. Of equal values the smaller beam comes first, within a beam the larger logit, and of
equal logits the smaller token. So exact ties go to the smaller flat index, and where fp32 cannot tell totals apart (a
dead beam, whose score of -1e9 swallows its log-probabilities) a beam still offers its best tokens, in their order.
`torch.topk` on the [lines, beams * vocab] layout gives the same values, and promises no order of ties.
A NaN is the largest, as in `torch.topk`: the row's log-sum-exp is NaN then, and with it all its values; the indices are
valid all the same.

Shapes: logits [lines * beams, vocab], fp32, fp16 or bf16; scores fp32 [lines * beams]; values fp32 [lines, count],
indices int64 [lines, count]; count at most 64 and beams * vocab. All arithmetic in fp32.
Bytes: the logits once; besides, 4 for every group of 64, written and read. FLOPs: about 5 a logit; bound by memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trocr_fast.kernels.launch import DTYPES, Launch, Random, Work, output, power_of_two, require, run

MAX_COUNT = 64
# Less than any packed logit: that of a negative NaN, which none has (the kernel makes them positive).
NOTHING = tl.constexpr(-(2**63) + 1)
EMPTY = tl.constexpr(-(2**31))  # likewise, of a logit alone
GROUP = tl.constexpr(64)
ALIGNED = tl.constexpr(16)  # elements; what Triton asks of a number to know an address as aligned


def reference(logits: Tensor, scores: Tensor, beams: int, count: int) -> tuple[Tensor, Tensor]:
    """The same mathematics in PyTorch, fp32 inside (fp64 for fp64), with the same order of ties."""
    inside = torch.promote_types(logits.dtype, torch.float32)
    lines, vocab = len(logits) // beams, logits.shape[1]
    # stable sorts: a row's best by logit, then a line's best by value over its beams' best in their order
    _, tokens = logits.sort(dim=-1, descending=True, stable=True)
    tokens = tokens[:, :count]
    log_probs = logits.to(inside).log_softmax(-1).gather(1, tokens)
    totals = (scores.to(inside).unsqueeze(1) + log_probs).view(lines, -1)  # [lines, beams * offered]
    offset = torch.arange(beams, device=logits.device).view(1, beams, 1) * vocab
    indices = (tokens.view(lines, beams, -1) + offset).view(lines, -1)
    values, places = totals.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], indices.gather(1, places)[:, :count]


@triton.jit
def ordered_bits(
    value,  # fp32
):
    # NaNs positive, so that they are the largest; zeros positive, so that they are equal
    value = tl.where(value != value, float("nan"), tl.where(value == 0.0, 0.0, value))
    bits = value.to(tl.int32, bitcast=True)
    # of negative numbers all bits but the sign's are turned: integers in the order of the values
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def packed(
    ordered,  # int32: ordered_bits
    place,  # int32, not negative; broadcasts to it
):
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)


@triton.jit
def value_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def place_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def largest(
    keys,  # int64 [n], all different but for NOTHING
    count,
    COUNT_BLOCK: tl.constexpr,  # a power of two, at least count
):
    # The `count` largest in descending order, then NOTHING: count small makes a maximum a place cheaper than a sort.
    slot = tl.arange(0, COUNT_BLOCK)
    kept = tl.full((COUNT_BLOCK,), NOTHING, tl.int64)
    for index in range(count):
        best = tl.max(keys, axis=0)
        kept = tl.where(slot == index, best, kept)
        keys = tl.where(keys == best, NOTHING, keys)
    return kept


@triton.jit
def beam_topk_tile_kernel(
    logits_ptr,  # [rows, vocab]
    groups_ptr,  # int32 [rows, tiles, BLOCK / GROUP]: ordered_bits of the largest logits, EMPTY where there is none
    maxima_ptr,  # fp32 [rows, tiles]
    sums_ptr,  # fp32 [rows, tiles]: of exp(logit - maximum)
    numel,  # rows * vocab
    vocab,
    tiles,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)  # row * tiles + tile
    row, tile = at // tiles, at % tiles
    # A row of 50265 starts anywhere. Its tiles start at the 16th element before that at most, so that the loads are of
    # 16 bytes each: they may touch the neighbouring rows, whose logits are dropped. Their mask ends at a multiple of 16
    # too, or they would be of single elements; what lies beyond, at the very end, is loaded by itself.
    start = row * vocab
    first = start // ALIGNED * ALIGNED + tile * BLOCK
    place = first + tl.arange(0, BLOCK)
    whole = numel // ALIGNED * ALIGNED
    logits = tl.load(logits_ptr + place, mask=place < whole, other=float("-inf")).to(tl.float32)
    if first + BLOCK > whole:
        rest = tl.load(logits_ptr + place, mask=(place >= whole) & (place < numel), other=float("-inf"))
        logits = tl.where(place < whole, logits, rest.to(tl.float32))
    token = (place - start).to(tl.int32)
    inside = (token >= 0) & (token < vocab)
    logits = tl.where(inside, logits, float("-inf"))
    maximum = tl.max(tl.where(logits != logits, float("inf"), logits), axis=0)
    # minus infinity everywhere: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    tl.store(maxima_ptr + at, maximum)
    tl.store(sums_ptr + at, tl.sum(tl.exp(logits - base), axis=0))

    ordered = tl.where(inside, ordered_bits(logits), EMPTY)
    groups = tl.max(tl.reshape(ordered, (BLOCK // GROUP, GROUP)), axis=1)
    tl.store(groups_ptr + at * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP), groups)


@triton.jit
def beam_topk_row_kernel(
    logits_ptr,  # [rows, vocab]
    groups_ptr,  # int32 [rows, groups]
    maxima_ptr,  # fp32 [rows, tiles]
    sums_ptr,  # fp32 [rows, tiles]
    scores_ptr,  # fp32 [rows]
    totals_ptr,  # fp32 [rows, count]
    tokens_ptr,  # int32 [rows, count], -1 where the vocabulary has fewer
    vocab,
    groups,
    tiles,
    count,
    GROUPS_BLOCK: tl.constexpr,  # a power of two, at least groups
    TILE_BLOCK: tl.constexpr,  # a power of two, at least tiles
    COUNT_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILE_BLOCK)
    maxima = tl.load(maxima_ptr + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
    sums = tl.load(sums_ptr + row * tiles + tile, mask=tile < tiles, other=0.0)
    maximum = tl.max(maxima, axis=0)
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    # a tile of minus infinity alone has a sum of 0 and a factor of 0
    total = tl.sum(sums * tl.exp(maxima - base), axis=0)
    log_sum = tl.log(total)  # relative to the maximum

    group = tl.arange(0, GROUPS_BLOCK)
    ordered = tl.load(groups_ptr + row * groups + group, mask=group < groups, other=EMPTY)
    best = largest(tl.where(ordered == EMPTY, NOTHING, packed(ordered, group)), count, COUNT_BLOCK)
    start = row * vocab
    place = start // ALIGNED * ALIGNED + place_of(best).to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    token = place - start
    inside = (best != NOTHING)[:, None] & (token >= 0) & (token < vocab)  # [COUNT_BLOCK, GROUP]
    logits = tl.load(logits_ptr + place, mask=inside, other=0.0).to(tl.float32)
    keys = tl.where(inside, packed(ordered_bits(logits), token.to(tl.int32)), NOTHING)
    kept = largest(tl.reshape(keys, (COUNT_BLOCK * GROUP,)), count, COUNT_BLOCK)
    slot = tl.arange(0, COUNT_BLOCK)
    # as torch's log_softmax: the maximum is taken off before the logarithm, so that large logits lose nothing
    totals = tl.load(scores_ptr + row) + ((value_of(kept) - maximum) - log_sum)
    at = row * count + slot
    tl.store(totals_ptr + at, totals, mask=slot < count)
    tl.store(tokens_ptr + at, tl.where(kept == NOTHING, -1, place_of(kept)), mask=slot < count)


@triton.jit
def beam_topk_line_kernel(
    totals_ptr,  # fp32 [lines, beams, count]
    tokens_ptr,  # int32 [lines, beams, count]
    values_ptr,  # fp32 [lines, count]
    indices_ptr,  # int64 [lines, count]
    vocab,
    beams,
    count,
    BLOCK: tl.constexpr,  # a power of two, at least beams * count
    COUNT_BLOCK: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < beams * count
    start = line * beams * count
    totals = tl.load(totals_ptr + start + place, mask=inside, other=0.0)
    tokens = tl.load(tokens_ptr + start + place, mask=inside, other=-1)
    # of equal totals the smaller place: the smaller beam, and within it the better logit
    kept = largest(tl.where(tokens >= 0, packed(ordered_bits(totals), place), NOTHING), count, COUNT_BLOCK)
    slot = tl.arange(0, COUNT_BLOCK)
    written = slot < count
    chosen = place_of(kept)
    tokens = tl.load(tokens_ptr + start + chosen, mask=written, other=0)
    tl.store(values_ptr + line * count + slot, value_of(kept), mask=written)
    tl.store(indices_ptr + line * count + slot, (chosen // count).to(tl.int64) * vocab + tokens, mask=written)


def beam_topk(
    logits: Tensor,
    scores: Tensor,
    beams: int,
    count: int,
    values: Tensor | None = None,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the three kernels.

    Args:
        logits: [lines * beams, vocab], contiguous.
        scores: fp32 [lines * beams], the beams' sums of log-probabilities; -1e9 or less for a dead one.
        beams: of each line.
        count: how many continuations to keep a line, at most 64 and beams * vocab; usually 2 * beams.
        values: fp32 [lines, count]; made if not given.
        indices: int64 [lines, count]; made if not given.

    Returns:
        (values, indices), in the order that the module describes.

    Raises:
        ValueError: an argument of another shape, dtype or device, one that is not contiguous, or a `beams` or `count`
            that does not go with them; named.
    """
    last = run(launches(logits, scores, beams, count, values, indices))
    return last["values_ptr"], last["indices_ptr"]


def launches(
    logits: Tensor,
    scores: Tensor,
    beams: int,
    count: int,
    values: Tensor | None = None,
    indices: Tensor | None = None,
) -> list[Launch]:
    """Check the arguments of `beam_topk` and say what to launch."""
    require("logits", logits, (None, None), dtype=DTYPES)
    rows, vocab = logits.shape
    require("scores", scores, (rows,), logits, torch.float32)
    if beams < 1 or rows % beams:
        raise ValueError(f"beams: expected a divisor of the {rows} rows, got {beams}")
    if not 1 <= count <= min(MAX_COUNT, beams * vocab):
        raise ValueError(f"count: expected 1 to {min(MAX_COUNT, beams * vocab)}, got {count}")
    values = output("values", values, (rows // beams, count), logits, torch.float32)
    indices = output("indices", indices, (rows // beams, count), logits, torch.int64)
    # 16 logits a thread: two loads of 16 bytes in fp16 and bf16, four in fp32; and a single line of 4 beams of 50265
    # still gives 100 programs. Not yet measured on a GPU.
    block = min(2048, max(GROUP.value, power_of_two(vocab)))
    tiles = triton.cdiv(vocab + ALIGNED.value - 1, block)
    num_groups = tiles * block // GROUP.value

    def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty((rows, *shape), dtype=dtype, device=logits.device)

    groups = scratch(torch.int32, num_groups)
    maxima, sums = scratch(torch.float32, tiles), scratch(torch.float32, tiles)
    totals, tokens = scratch(torch.float32, count), scratch(torch.int32, count)
    partial = {"groups_ptr": groups, "maxima_ptr": maxima, "sums_ptr": sums, "tiles": tiles}
    merged = {"totals_ptr": totals, "tokens_ptr": tokens, "vocab": vocab, "count": count}
    count_block = {"COUNT_BLOCK": power_of_two(count)}
    groups_block, line_block = power_of_two(num_groups), power_of_two(beams * count)
    return [
        Launch(
            beam_topk_tile_kernel,
            (rows * tiles,),
            {"logits_ptr": logits, "numel": logits.numel(), "vocab": vocab, **partial},
            {"BLOCK": block},
            num_warps=max(1, min(4, block // 128)),
        ),
        Launch(
            beam_topk_row_kernel,
            (rows,),
            {"logits_ptr": logits, **partial, "groups": num_groups, "scores_ptr": scores, **merged},
            {"GROUPS_BLOCK": groups_block, "TILE_BLOCK": power_of_two(tiles), **count_block},
            num_warps=warps(max(groups_block, count_block["COUNT_BLOCK"] * GROUP.value)),
        ),
        Launch(
            beam_topk_line_kernel,
            (rows // beams,),
            {**merged, "values_ptr": values, "indices_ptr": indices, "beams": beams},
            {"BLOCK": line_block, **count_block},
            num_warps=warps(line_block),
        ),
    ]


def warps(block: int) -> int:
    """Of a merge: few, since every maximum waits for all of them; 8 integers a thread, more only beyond 8 warps."""
    return max(1, min(8, block // 256))


def cases() -> list[tuple[int, int, int, int]]:
    """(lines, beams, count, vocab): base with 4 beams and with the paper's 10, one line of it, small, built-in."""
    return [
        (64, 4, 8, 50265),
        (64, 10, 20, 50265),
        (1, 4, 8, 50265),
        (1, 10, 20, 50265),
        (64, 10, 20, 64044),
        (16, 20, 40, 50265),
        (64, 4, 8, 202),
    ]


def inputs(case: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int = 0) -> tuple:
    """Random arguments of the launcher, outputs aside."""
    lines, beams, count, vocab = case
    # few bits in fp16 and bf16, so that many logits of a row are equal
    logits = Random(dtype, device, seed)((lines * beams, vocab), scale=3.0)
    scores = Random(torch.float32, device, seed + 1)((lines * beams,), mean=-5.0)
    return logits, scores, beams, count


def work(case: tuple[int, int, int, int], dtype: torch.dtype) -> Work:
    """What the launches must move and compute: no comparison counts."""
    lines, beams, count, vocab = case
    return Work(
        num_bytes=lines * beams * (vocab * dtype.itemsize + 4) + lines * count * 12, flops=5 * lines * beams * vocab
    )
