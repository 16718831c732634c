"""What `bench.kernels` times each Triton kernel against: PyTorch's ways to the same result.

One function a kernel, of the kernel's name and arguments. It gives {provider: a call without arguments}; a call returns
what the kernel's reference returns. What a model could prepare once for all layers of a step is prepared outside the
call, everything else inside. Providers are named after the operations, in their order; `sdpa` is
`F.scaled_dot_product_attention` with one of its backends, which refuses some shapes with a RuntimeError.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trocr_fast.kernels import add_layernorm as add_layernorm_file
from trocr_fast.kernels import bias_gelu as bias_gelu_file
from trocr_fast.kernels import pixels_to_patches as pixels_to_patches_file
from trocr_fast.kernels.bias_gelu import ACTIVATIONS

Rivals = dict[str, Callable[[], Any]]

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def with_each_backend(attend: Callable[[], Tensor], before: str = "") -> Rivals:
    """A call that uses sdpa, once for each of its backends."""

    def fixed(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return attend()

        return call

    return {f"{before}sdpa {name}": fixed(backend) for name, backend in BACKENDS.items()}


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """torch.compile's code for these very shapes."""
    torch.compiler.reset()  # or the ninth shape of a function would run uncompiled
    fast = torch.compile(function, dynamic=False)
    return lambda: fast(*arguments)


def pixels_to_patches(pixels: Tensor, table: Tensor, patch_size: tuple[int, int], dtype: torch.dtype) -> Rivals:
    channels = pixels.shape[1]
    height, width = patch_size
    rows, columns = pixels.shape[2] // height, pixels.shape[3] // width
    flat = table.to(dtype).flatten()
    first = torch.arange(channels, device=pixels.device, dtype=torch.int32).view(1, -1, 1, 1) * 256

    def look_up() -> Tensor:
        used = pixels[:, :, : rows * height, : columns * width]
        values = flat.index_select(0, (used.int() + first).flatten())
        patches = values.view(-1, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(-1, rows * columns, channels * height * width)

    reference = pixels_to_patches_file.reference
    return {
        "index_select + permute": look_up,
        "torch.compile": compiled(reference, pixels, table, patch_size, dtype),
    }


def encoder_attention(qkv: Tensor, num_heads: int) -> Rivals:
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # [batch, heads, tokens, head_dim]
    return with_each_backend(lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1))


def add_layernorm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, x_bias: Tensor | None = None
) -> Rivals:
    def separate() -> tuple[Tensor, Tensor]:
        total = x + residual if x_bias is None else x + x_bias + residual
        return total, F.layer_norm(total, weight.shape, weight, bias, eps)

    return {
        "add + layer_norm": separate,
        "torch.compile": compiled(add_layernorm_file.reference, x, residual, weight, bias, eps, x_bias),
    }


def bias_gelu(x: Tensor, bias: Tensor, activation: str) -> Rivals:
    return {
        f"add + {activation}": lambda: ACTIVATIONS[activation](x + bias),
        "torch.compile": compiled(bias_gelu_file.reference, x, bias, activation),
    }


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Rivals:
    """cuBLAS, then the activation; for ReLU also cuBLASLt with it at its end (its GELU is another one, by tanh)."""
    if activation is None:
        return {"linear": lambda: F.linear(x, weight, bias)}
    rivals: Rivals = {f"linear + {activation}": lambda: ACTIVATIONS[activation](F.linear(x, weight, bias))}
    if activation == "relu" and bias is not None:
        rivals["_addmm_activation"] = lambda: torch._addmm_activation(bias, x, weight.T)
    return rivals


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Rivals:
    """Those of `linear_activation`; for one row also the product of a matrix and a vector."""
    rivals = linear_activation(x, weight, bias, activation)
    if x.shape[0] == 1 and bias is not None:

        def vector() -> Tensor:
            out = torch.addmv(bias, weight, x[0]).unsqueeze(0)
            return out if activation is None else ACTIVATIONS[activation](out)

        rivals["addmv" if activation is None else f"addmv + {activation}"] = vector
    return rivals


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    slot_mapping: Tensor,
) -> Rivals:
    """Store the new token, gather the rows' tokens into dense tensors, attend. All indices are prepared outside."""
    block_size = memory.shape[3]
    lengths = context_lens.unsqueeze(1)
    tokens = torch.arange(int(lengths.max()), device=q.device)
    there = tokens < lengths  # [rows, tokens]
    to_block, to_offset = slot_mapping // block_size, slot_mapping % block_size
    # What is not there is read from the new token's slot, which holds a number, and masked.
    blocks = torch.where(there, block_tables[:, tokens // block_size].long(), to_block.unsqueeze(1))
    offsets = torch.where(there, tokens % block_size, to_offset.unsqueeze(1))
    mask = there[:, None, None, :]
    new = torch.stack([k, v], dim=1)  # [rows, 2, heads, head_dim]; in a model they lie side by side
    cache = memory[:, layer].transpose(1, 2)  # [blocks, block_size, 2, heads, head_dim]
    query = q.unsqueeze(2)  # [rows, heads, 1, head_dim]

    def dense() -> tuple[Tensor, Tensor]:
        cache[to_block, to_offset] = new
        keys, values = cache[blocks, offsets].unbind(2)  # [rows, tokens, heads, head_dim]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def attend() -> Tensor:
        keys, values = dense()
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1.0).flatten(1)

    def products() -> Tensor:
        keys, values = dense()
        scores = torch.matmul(query, keys.transpose(2, 3)).masked_fill(~mask, -torch.inf)
        return torch.matmul(scores.softmax(-1), values).flatten(1)

    return {**with_each_backend(attend, "gather + "), "gather + matmul + softmax + matmul": products}


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Rivals:
    """All beams of a line as the queries of one picture."""
    rows = q.shape[0]
    grouped = q.unflatten(0, (k.shape[0], -1)).transpose(1, 2)  # [lines, heads, beams, head_dim]

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(grouped, k, v, scale=1.0).transpose(1, 2).reshape(rows, -1)

    def products() -> Tensor:
        probabilities = torch.matmul(grouped, k.transpose(2, 3)).softmax(-1)
        return torch.matmul(probabilities, v).transpose(1, 2).reshape(rows, -1)

    return {**with_each_backend(attend), "matmul + softmax + matmul": products}


def latent_cross_attention(latent_q: Tensor, states: Tensor) -> Rivals:
    """All heads of all beams of a line as the queries of one picture and a single wide head."""

    def grouped() -> Tensor:  # a copy where there are several beams, since the heads come first in memory
        return latent_q.unflatten(0, (states.shape[0], -1)).flatten(1, 2)  # [lines, beams * heads, width]

    def attend() -> Tensor:
        key = states.unsqueeze(1)  # [lines, 1, keys, width], and the value, too
        return F.scaled_dot_product_attention(grouped().unsqueeze(1), key, key, scale=1.0).view(latent_q.shape)

    def products() -> Tensor:
        probabilities = torch.matmul(grouped(), states.transpose(1, 2)).softmax(-1)
        return torch.matmul(probabilities, states).view(latent_q.shape)

    return {**with_each_backend(attend), "matmul + softmax + matmul": products}


def lm_head(x: Tensor, weight: Tensor) -> Rivals:
    def separate(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        best, tokens = (logits := F.linear(x, weight)).max(-1)
        return tokens, best.float() - logits.float().logsumexp(-1)

    return {
        "linear + max + logsumexp": lambda: separate(x, weight),
        "torch.compile": compiled(separate, x, weight),
    }


def beam_topk(logits: Tensor, scores: Tensor, beams: int, count: int) -> Rivals:
    lines, vocab = logits.shape[0] // beams, logits.shape[1]

    def together(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """As transformers does it."""
        totals = scores.unsqueeze(1) + logits.float().log_softmax(-1)
        values, indices = totals.view(lines, -1).topk(count)
        return values, indices

    def by_row(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The best of each row first: no fp32 copy of the logits has to be ordered."""
        best, tokens = logits.topk(min(count, vocab))
        totals = (scores - logits.float().logsumexp(-1)).unsqueeze(1) + best
        values, places = totals.view(lines, -1).topk(count)
        tokens = tokens + (torch.arange(lines * beams, device=logits.device) % beams * vocab).unsqueeze(1)
        return values, tokens.view(lines, -1).gather(1, places)

    return {
        "log_softmax + topk": lambda: together(logits, scores),
        "topk + logsumexp + topk": lambda: by_row(logits, scores),
        "torch.compile": compiled(together, logits, scores),
    }


RIVALS: dict[str, Callable[..., Rivals]] = {
    "pixels_to_patches": pixels_to_patches,
    "encoder_attention": encoder_attention,
    "add_layernorm": add_layernorm,
    "bias_gelu": bias_gelu,
    "linear_activation": linear_activation,
    "linear_persistent": linear_activation,
    "paged_attention": paged_attention,
    "cross_attention": cross_attention,
    "latent_cross_attention": latent_cross_attention,
    "skinny_linear": skinny_linear,
    "lm_head": lm_head,
    "beam_topk": beam_topk,
}
