"""What decoding needs of a picture: written once after encoding, read at every step by every layer.

Two forms with the same results but for rounding. `kv` holds the projected keys and values of every layer; `latent`
holds the encoder's output alone and moves the projections to the query's side (`ops.latent_cross_attention`), which
takes a fraction of the memory and of the bytes read a step, for more arithmetic.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trocr_fast import ops
from trocr_fast.config import DecoderConfig

KINDS = ("kv", "latent")

# Between TrOCR small, where the two are equal on a CPU, and base, where latent is the faster.
LATENT_ABOVE_FLOPS = 4e9


@dataclass(frozen=True)
class CrossWeights:
    """Key and value projections of the cross-attention of all layers."""

    weight: Tensor  # [layers, 2, width, cross_width], keys before values
    bias: Tensor  # [layers, 2, width]
    num_heads: int


class CrossMemory(Protocol):
    """The pictures of a decode batch, one a row."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q, scaled, [rows, heads, head_dim] -> [rows, heads * head_dim]."""
        ...

    def remove(self, row: int) -> None:
        """Drop a row; the last row takes its place."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes held for one picture."""
        ...


def choose_kind(decoder: DecoderConfig, num_keys: int, device: torch.device) -> str:
    """The kind that measured faster for lines of some 20 tokens (docs/decisions.md); on CUDA, not measured yet, `kv`.

    Args:
        num_keys: tokens of the encoder's output.
    """
    projection_flops = 2 * num_keys * decoder.cross_width * 2 * decoder.d_model * decoder.num_layers  # of one picture
    return "latent" if device.type == "cpu" and projection_flops > LATENT_ABOVE_FLOPS else "kv"


def make_cross_memory(kind: str, states: Tensor, weights: CrossWeights) -> CrossMemory:
    """Cross memory of the given kind for encoder states [rows, keys, cross_width]."""
    if kind == "kv":
        return KVMemory(states, weights)
    if kind == "latent":
        return LatentMemory(states, weights)
    raise ValueError(f"cross_memory: expected one of {', '.join(KINDS)}, got {kind!r}")


class KVMemory:
    """Projected keys and values of all layers, made in one product."""

    def __init__(self, states: Tensor, weights: CrossWeights) -> None:
        rows, keys, _ = states.shape
        layers, _, width, cross_width = weights.weight.shape
        projected = ops.linear(states, weights.weight.view(-1, cross_width), weights.bias.view(-1))
        projected = projected.view(rows, keys, layers, 2, weights.num_heads, width // weights.num_heads)
        # [layers, 2, rows, heads, keys, head_dim]: what a head reads at a step is contiguous
        self._kv = projected.permute(2, 3, 0, 4, 1, 5).contiguous()

    def attend(self, layer: int, q: Tensor) -> Tensor:
        k, v = self._kv[layer]
        return ops.cross_attention(q, k, v)

    def remove(self, row: int) -> None:
        last = self._kv.shape[2] - 1
        self._kv[:, :, row] = self._kv[:, :, last]
        self._kv = self._kv[:, :, :last]

    @property
    def num_bytes(self) -> int:
        return self._kv[:, :, :1].numel() * self._kv.element_size()


class LatentMemory:
    """The encoder's output, once for all layers.

    In half precision it is stored less its mean over the tokens, taken in fp32 before the one rounding, which keeps
    the rounding error small: scores do not see the mean, since it shifts all keys of a query alike, and values get it
    back, carried through the value projection.
    """

    def __init__(self, states: Tensor, weights: CrossWeights) -> None:
        layers, _, width, cross_width = weights.weight.shape
        # [layers, 2, heads, head_dim, cross_width]
        self._weight = weights.weight.view(layers, 2, weights.num_heads, width // weights.num_heads, cross_width)
        v_weight, v_bias = weights.weight[:, 1], weights.bias[:, 1]
        if states.dtype == torch.float32:
            self._states = states.contiguous()
            # [layers, rows, width], the same for every row
            self._v_offset = v_bias.unsqueeze(1).expand(-1, states.shape[0], -1).contiguous()
        else:
            mean = states.float().mean(dim=1, keepdim=True)  # [rows, 1, cross_width]
            self._states = (states.float() - mean).to(states.dtype)
            offset = torch.matmul(mean.squeeze(1), v_weight.float().transpose(1, 2))
            self._v_offset = (offset + v_bias.float().unsqueeze(1)).to(states.dtype)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        out = ops.latent_cross_attention(q, self._states, *self._weight[layer])
        return out + self._v_offset[layer]

    def remove(self, row: int) -> None:
        last = self._states.shape[0] - 1
        self._states[row] = self._states[last]
        self._states = self._states[:last]
        self._v_offset[:, row] = self._v_offset[:, last]
        self._v_offset = self._v_offset[:, :last]

    @property
    def num_bytes(self) -> int:
        per_row = self._states[:1].numel() + self._v_offset[:, :1].numel()
        return per_row * self._states.element_size()
