"""The one door between the model and its arithmetic.

Encoder, cross memory, decoder and search call nothing below this module, so that an operation can be computed by
another implementation without touching them. Softmax and statistics are computed in fp32 whatever the dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS = {
    "gelu": F.gelu,  # the exact one, by erf
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def normalise_pixels(pixels: Tensor, table: Tensor) -> Tensor:
    """Normalised value of each uint8 pixel, by look-up.

    Args:
        pixels: uint8 [batch, channels, H, W].
        table: fp32 [channels, 256], the normalised value of each of the 256 values.

    Returns:
        fp32 [batch, channels, H, W].
    """
    offsets = torch.arange(table.shape[0], device=pixels.device, dtype=torch.int32) * 256
    index = pixels.int() + offsets.view(1, -1, 1, 1)
    return table.flatten().index_select(0, index.flatten()).view(pixels.shape)


def pixels_to_patches(pixels: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut pictures into patches, row by row; what is left over at the right and bottom edge is dropped.

    Args:
        pixels: [batch, channels, H, W].
        patch_size: (height, width).

    Returns:
        [batch, (H // height) * (W // width), channels * height * width].
    """
    batch, channels, image_height, image_width = pixels.shape
    height, width = patch_size
    rows, columns = image_height // height, image_width // width
    pixels = pixels[:, :, : rows * height, : columns * width]
    patches = pixels.reshape(batch, channels, rows, height, columns, width)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * height * width)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """`activation(x @ weight.T + bias)`; x [..., in], weight [out, in], bias [out] -> [..., out]."""
    out = F.linear(x, weight, bias)
    return out if activation is None else _ACTIVATIONS[activation](out)


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension; x [..., width], weight and bias [width]."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layernorm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`sum = x + residual`, and LayerNorm of the sum; all [..., width]. Returns (sum, normalised)."""
    total = x + residual
    return total, layernorm(total, weight, bias, eps)


def encoder_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Non-causal self-attention over all tokens of a picture.

    Args:
        qkv: [batch, tokens, 3 * width]: queries, keys and values side by side, each `num_heads` heads.

    Returns:
        [batch, tokens, width].
    """
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # [batch, heads, tokens, head_dim]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)


def decode_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query a row, over the row's own keys or over the cached ones of its picture.

    Args:
        q: [rows, heads, head_dim], already scaled.
        k, v: [rows, heads, keys, head_dim].

    Returns:
        [rows, heads * head_dim].
    """
    scores = torch.matmul(q.unsqueeze(2), k.transpose(2, 3))  # [rows, heads, 1, keys]
    probabilities = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return torch.matmul(probabilities, v).flatten(1)


def latent_cross_attention(q: Tensor, states: Tensor, k_weight: Tensor, v_weight: Tensor) -> Tensor:
    """Cross-attention over the encoder states themselves, without projected keys and values.

    With `K = E Wk^T + bk`, `q K^T = (q Wk) E^T + q bk`, whose last term is the same for all keys and drops out of the
    softmax; and with probabilities P that sum to one `P V = (P E) Wv^T + bv`, whose bias the caller adds.

    Args:
        q: [rows, heads, head_dim], already scaled.
        states: [rows, keys, cross_width]: E, the encoder's output; all heads and layers share it.
        k_weight, v_weight: [heads, head_dim, cross_width].

    Returns:
        [rows, heads * head_dim], without the bias of V.
    """
    latent_q = torch.matmul(q.transpose(0, 1), k_weight).transpose(0, 1)  # [rows, heads, cross_width]
    scores = torch.matmul(latent_q, states.transpose(1, 2))  # [rows, heads, keys]
    probabilities = scores.softmax(-1, dtype=torch.float32).to(states.dtype)
    context = torch.matmul(probabilities, states)  # [rows, heads, cross_width]
    out = torch.matmul(context.transpose(0, 1), v_weight.transpose(1, 2))  # [heads, rows, head_dim]
    return out.transpose(0, 1).flatten(1)


def greedy_token(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The best token of each row, the first of equals, and its log-probability.

    Args:
        logits: [rows, vocab_size].

    Returns:
        int64 [rows] and fp32 [rows].
    """
    logits = logits.float()
    best = logits.argmax(-1)
    return best, logits.gather(1, best.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)
