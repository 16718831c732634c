"""Non-causal self-attention of all tokens of a picture, straight from the fused projection.

    out = softmax(q k^T * head_dim**-0.5) v        for each picture and head

in one pass over the keys: the softmax is online (Milakov, Gimelshein, arXiv 1805.02867) and the scores stay in
registers (FlashAttention-2: Dao, arXiv 2307.08691). Nothing is transposed or padded in memory.

Shapes: qkv [batch, tokens, 3 * width], queries, keys and values side by side, each `num_heads` heads of
head_dim <= 128; out [batch, tokens, width]; any of fp32, fp16, bf16, both alike.
Bytes: 4 * batch * tokens * width elements, each once. FLOPs: 4 * batch * tokens**2 * width; bound by arithmetic: in
half precision with head_dim 64 one exponential costs a multiprocessor about as long as the 256 FLOPs beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trocr_fast.kernels.launch import DTYPES, Launch, Random, Work, output, power_of_two, require, run

LOG2_E = 1.4426950408889634
MAX_HEAD_DIM = 128

# (half precision, padded head_dim) -> queries and keys a tile, warps, stages of the pipeline of keys and values.
# 577 = 9 * 64 + 1: key tiles of 64 leave one key over, for which a tile of 16 does; tiles of 128 would leave 65.
# Half precision: two warp groups of 64 queries each, the least rows of a Hopper product; two such programs fit a
# multiprocessor, and one takes exponentials while the other multiplies. fp32 has no matrix unit that is exact: its
# operands come from registers too, which four warps overflow from head_dim 64 on (by 152 bytes a thread).
TILES = {
    (True, 16): (128, 64, 8, 3),
    (True, 32): (128, 64, 8, 3),
    (True, 64): (128, 64, 8, 3),
    (True, 128): (128, 32, 8, 2),
    (False, 16): (64, 32, 4, 2),
    (False, 32): (64, 32, 4, 2),
    (False, 64): (64, 32, 8, 2),
    (False, 128): (32, 32, 8, 2),
}


def reference(qkv: Tensor, num_heads: int) -> Tensor:
    """The same mathematics in PyTorch, fp32 inside (fp64 for fp64), rounded once at the end.

    Once more before: as in the kernel, the exponentials are rounded to the dtype of the values that they multiply
    (their sum is not).
    """
    batch, tokens, _ = qkv.shape
    inside = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(inside).view(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # [batch, heads, tokens, tokens]
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    out = exponentials.to(qkv.dtype).to(inside) @ v / exponentials.sum(-1, keepdim=True)
    return out.transpose(1, 2).reshape(batch, tokens, -1).to(qkv.dtype)


@triton.jit
def attend(
    q,  # [BLOCK_M, BLOCK_D]
    k,  # [keys, BLOCK_D]
    v,  # [keys, BLOCK_D]
    visible,  # [1, keys], or None: all of them are
    best,  # [BLOCK_M]: the largest scaled score so far
    total,  # [BLOCK_M]: sum of 2 ** (scaled score - best) so far
    out,  # [BLOCK_M, BLOCK_D]: their sum with the values
    scale,
):
    """One tile of keys into the running softmax."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, keys]
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1) * scale)
    weights = tl.math.exp2(scores * scale - new_best[:, None])
    shrink = tl.math.exp2(best - new_best)
    total = total * shrink + tl.sum(weights, axis=1)
    out = tl.dot(weights.to(v.dtype), v, acc=out * shrink[:, None], input_precision="ieee")
    return new_best, total, out


@triton.jit
def encoder_attention_kernel(
    qkv_ptr,  # [batch, tokens, 3, num_heads, HEAD_DIM]
    out_ptr,  # [batch, tokens, num_heads, HEAD_DIM]
    tokens,
    num_heads,
    scale,  # head_dim**-0.5 * log2(e)
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # a power of two, at least HEAD_DIM and 16
    BLOCK_M: tl.constexpr,  # queries a program
    BLOCK_N: tl.constexpr,  # keys a tile
    TAIL: tl.constexpr,  # a power of two that holds the last tokens % BLOCK_N keys; 0 if there are none
):
    # Neighbours share the keys and values of a head: queries first, then heads, then pictures.
    program = tl.program_id(0)
    tiles = tl.cdiv(tokens, BLOCK_M)
    head = program // tiles % num_heads
    picture = (program // tiles // num_heads).to(tl.int64)
    width = num_heads * HEAD_DIM
    stride = tl.cast(3 * width, tl.int64)  # of a token
    rows = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    q_ptr = qkv_ptr + picture * tokens * stride + head * HEAD_DIM
    k_ptr = q_ptr + width
    v_ptr = k_ptr + width

    stored = (rows < tokens)[:, None] & (columns < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=stored, other=0.0)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # The last keys come first, so that the loop over full tiles has no mask.
    whole = tokens // BLOCK_N * BLOCK_N
    if TAIL:
        keys = tl.arange(0, TAIL)
        at_last = (whole + keys).to(tl.int64)[:, None] * stride + columns[None, :]
        loaded = (whole + keys < tokens)[:, None] & (columns < HEAD_DIM)[None, :]
        last_k = tl.load(k_ptr + at_last, mask=loaded, other=0.0)
        last_v = tl.load(v_ptr + at_last, mask=loaded, other=0.0)
        best, total, out = attend(q, last_k, last_v, (whole + keys < tokens)[None, :], best, total, out, scale)
    at = tl.arange(0, BLOCK_N).to(tl.int64)[:, None] * stride + columns[None, :]
    for _ in range(0, whole, BLOCK_N):
        if HEAD_DIM == BLOCK_D:
            k = tl.load(k_ptr + at)
            v = tl.load(v_ptr + at)
        else:
            k = tl.load(k_ptr + at, mask=(columns < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(v_ptr + at, mask=(columns < HEAD_DIM)[None, :], other=0.0)
        best, total, out = attend(q, k, v, None, best, total, out, scale)
        k_ptr += BLOCK_N * stride
        v_ptr += BLOCK_N * stride

    out_ptr += picture * tokens * width + head * HEAD_DIM
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], out / total[:, None], mask=stored)


def encoder_attention(qkv: Tensor, num_heads: int, out: Tensor | None = None) -> Tensor:
    """Launch the kernel.

    Args:
        qkv: [batch, tokens, 3 * width], contiguous: queries, keys and values side by side.
        num_heads: divides the width into heads of at most 128.
        out: [batch, tokens, width], of the dtype and device of qkv; made if not given.

    Returns:
        out.

    Raises:
        ValueError: an argument of another shape, dtype or device, or one that is not contiguous; named.
    """
    return run(launches(qkv, num_heads, out))["out_ptr"]


def launches(qkv: Tensor, num_heads: int, out: Tensor | None = None) -> list[Launch]:
    """Check the arguments of `encoder_attention` and say what to launch."""
    require("qkv", qkv, (None, None, None), dtype=DTYPES)
    batch, tokens, columns = qkv.shape
    if num_heads < 1 or columns % (3 * num_heads) or not 1 <= columns // (3 * num_heads) <= MAX_HEAD_DIM:
        raise ValueError(
            f"num_heads: expected a number that divides the {columns} columns of qkv into three times so many heads "
            f"of at most {MAX_HEAD_DIM}, got {num_heads}"
        )
    head_dim = columns // (3 * num_heads)
    out = output("out", out, (batch, tokens, num_heads * head_dim), qkv)
    block_d = max(16, power_of_two(head_dim))
    block_m, block_n, num_warps, num_stages = TILES[qkv.dtype != torch.float32, block_d]
    tail = tokens % block_n
    launch = Launch(
        encoder_attention_kernel,
        (triton.cdiv(tokens, block_m) * num_heads * batch,),
        {
            "qkv_ptr": qkv,
            "out_ptr": out,
            "tokens": tokens,
            "num_heads": num_heads,
            "scale": head_dim**-0.5 * LOG2_E,
        },
        {
            "HEAD_DIM": head_dim,
            "BLOCK_D": block_d,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "TAIL": max(16, power_of_two(tail)) if tail else 0,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return [launch]


def cases() -> list[tuple[int, int, int, int]]:
    """(batch, tokens, num_heads, head_dim) of the real encoders: base, large, small; a wide picture; one line."""
    full = [(64, 577, 12, 64), (64, 577, 16, 64), (64, 578, 6, 64)]
    return [*full, (64, 769, 12, 64), (64, 577, 12, 32), (1, 577, 12, 64)]


def inputs(case: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int = 0) -> tuple:
    """Random arguments of the launcher, outputs aside."""
    batch, tokens, num_heads, head_dim = case
    # scores of a few units: some keys weigh much more than others
    return Random(dtype, device, seed)((batch, tokens, 3 * num_heads * head_dim), scale=1.5), num_heads


def work(case: tuple[int, int, int, int], dtype: torch.dtype) -> Work:
    """What one launch must move and compute."""
    batch, tokens, num_heads, head_dim = case
    width = num_heads * head_dim
    return Work(num_bytes=4 * batch * tokens * width * dtype.itemsize, flops=4 * batch * tokens**2 * width)
