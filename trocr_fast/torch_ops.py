"""The operations of `trocr_fast.ops` in PyTorch: what runs on a CPU, and what the kernels are held against.

Each function is the one of that name in `trocr_fast.ops`, which has the contracts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trocr_fast.paged_cache import PagedStep

ACTIVATIONS = {
    "gelu": F.gelu,  # the exact one, by erf
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}

# The same at the end of oneDNN's product: attribute, its numbers, its algorithm.
FUSED: dict[str | None, tuple[str, list[float], str]] = {
    None: ("none", [], "none"),
    "gelu": ("gelu", [], "none"),
    "gelu_new": ("gelu", [], "tanh"),
    "relu": ("relu", [], "none"),
    "silu": ("swish", [], "none"),
}
PACKING = ("_reorder_linear_weight", "_linear_pointwise")
PACKED_FOR_ROWS = 64  # of a product; any number above a few gives the same layout


def normalise_pixels(pixels: Tensor, table: Tensor) -> Tensor:
    offsets = torch.arange(table.shape[0], device=pixels.device, dtype=torch.int32) * 256
    index = pixels.int() + offsets.view(1, -1, 1, 1)
    return table.flatten().index_select(0, index.flatten()).view(pixels.shape)


def cut_patches(pixels: Tensor, patch_size: tuple[int, int]) -> Tensor:
    batch, channels, image_height, image_width = pixels.shape
    height, width = patch_size
    rows, columns = image_height // height, image_width // width
    pixels = pixels[:, :, : rows * height, : columns * width]
    patches = pixels.reshape(batch, channels, rows, height, columns, width)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * height * width)


def pixels_to_patches(pixels: Tensor, table: Tensor, patch_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return cut_patches(normalise_pixels(pixels, table).to(dtype), patch_size)


def packed(weight: Tensor) -> Tensor:
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return weight
    # What torch.compile uses; not promised to stay.
    if not all(hasattr(torch.ops.mkldnn, name) for name in PACKING):
        return weight
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *FUSED[activation])
    out = F.linear(x, weight, bias)
    return out if activation is None else ACTIVATIONS[activation](out)


linear_activation = skinny_linear = linear  # the libraries tell few rows from many by themselves


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layernorm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, layernorm(total, weight, bias, eps)


def encoder_attention(qkv: Tensor, num_heads: int) -> Tensor:
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # [batch, heads, tokens, head_dim]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)


def paged_attention(q: Tensor, k: Tensor, v: Tensor, layer: int, step: PagedStep) -> Tensor:
    keys = q.new_empty((q.shape[0], q.shape[1], step.longest, q.shape[2]))  # [rows, heads, tokens, head_dim]
    values = torch.empty_like(keys)
    step.cache.write(layer, k, v, step.slot_mapping)
    step.cache.gather(layer, step.block_tables, step.context_lens, keys, values)
    beyond = torch.arange(step.longest, device=q.device) >= step.context_lens.unsqueeze(1)  # [rows, tokens]
    scores = torch.matmul(q.unsqueeze(2), keys.transpose(2, 3))  # [rows, heads, 1, tokens]
    # Not -inf: a row without tokens would turn into NaN, and this is exactly zero beside any score.
    scores = scores.masked_fill(beyond[:, None, None, :], torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    return torch.matmul(probabilities, values).flatten(1)


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.unflatten(0, (k.shape[0], -1)).transpose(1, 2)  # [lines, heads, beams, head_dim]
    scores = torch.matmul(grouped, k.transpose(2, 3))  # [lines, heads, beams, keys]
    probabilities = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return torch.matmul(probabilities, v).transpose(1, 2).reshape(q.shape[0], -1)


def attend_latent(q: Tensor, states: Tensor) -> Tensor:
    """softmax(q E^T) E; q [rows, heads, width], states E [lines, keys, width] -> [rows, heads, width]."""
    grouped = q.reshape(states.shape[0], -1, states.shape[2])  # [lines, beams * heads, width]
    scores = torch.matmul(grouped, states.transpose(1, 2))  # [lines, beams * heads, keys]
    probabilities = scores.softmax(-1, dtype=torch.float32).to(states.dtype)
    return torch.matmul(probabilities, states).view(q.shape)


def latent_cross_attention(
    q: Tensor,
    states: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    attend: Callable[[Tensor, Tensor], Tensor] = attend_latent,
) -> Tensor:
    """`attend`, whoever computes it, between the two projections."""
    latent_q = torch.matmul(q.transpose(0, 1), k_weight).transpose(0, 1)  # [rows, heads, width]
    context = attend(latent_q, states)
    out = torch.matmul(context.transpose(0, 1), v_weight.transpose(1, 2))  # [heads, rows, head_dim]
    return out.transpose(0, 1).flatten(1)


def greedy_token(x: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    logits = linear(x, head, None, None).float()
    best = logits.argmax(-1)
    return best, logits.gather(1, best.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)
