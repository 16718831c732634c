"""What decoding needs of a picture: written once after encoding, read at every step by every layer.

Two forms with the same results but for rounding. `kv` holds the projected keys and values of every layer; `latent`
holds the encoder's output alone and moves the projections to the query's side (`ops.latent_cross_attention`), which
takes a fraction of the memory and of the bytes read a step, for more arithmetic.

Pictures lie in slots. The beams of a picture share its slot.
"""

from dataclasses import dataclass
from functools import cached_property
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

    @cached_property
    def packed(self) -> Tensor:
        """The weight of the product that gives keys and values of all layers: `ops.packed`, of layers * 2 * width."""
        return ops.packed(self.weight.view(-1, self.weight.shape[-1]))


class CrossMemory(Protocol):
    """Slots for pictures. One that was never written holds no values, maybe not even numbers."""

    num_slots: int

    def write(self, slots: Tensor, states: Tensor) -> None:
        """Put pictures, encoder states [lines, keys, cross_width], into slots, int64 [lines]."""
        ...

    def take(self, slot: int) -> list[Tensor]:
        """What a slot holds."""
        ...

    def put(self, slot: int, taken: list[Tensor]) -> None:
        """Let a slot hold what was taken from any."""
        ...

    def attend(self, layer: int, q: Tensor, num_lines: int) -> Tensor:
        """Attention of rows over the pictures of their lines, which lie in the first slots in their order.

        Args:
            q: scaled, [rows, heads, head_dim]; the rows of a line, its beams, side by side.

        Returns:
            [rows, heads * head_dim].
        """
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of a slot."""
        ...


def choose_kind(decoder: DecoderConfig, num_keys: int, device: torch.device) -> str:
    """The kind that measured faster for lines of some 20 tokens (docs/decisions.md); on CUDA, not measured yet, `kv`.

    Args:
        num_keys: tokens of the encoder's output.
    """
    projection_flops = 2 * num_keys * decoder.cross_width * 2 * decoder.d_model * decoder.num_layers  # of one picture
    return "latent" if device.type == "cpu" and projection_flops > LATENT_ABOVE_FLOPS else "kv"


def make_cross_memory(kind: str, weights: CrossWeights, num_slots: int, num_keys: int) -> CrossMemory:
    """Empty slots of the given kind for pictures of `num_keys` encoder states."""
    if kind == "kv":
        return KVMemory(weights, num_slots, num_keys)
    if kind == "latent":
        return LatentMemory(weights, num_slots, num_keys)
    raise ValueError(f"cross_memory: expected one of {', '.join(KINDS)}, got {kind!r}")


class KVMemory:
    """Projected keys and values of all layers, made in one product."""

    def __init__(self, weights: CrossWeights, num_slots: int, num_keys: int) -> None:
        self._weights, self.num_slots = weights, num_slots
        layers, _, width, _ = weights.weight.shape
        shape = (layers, 2, num_slots, weights.num_heads, num_keys, width // weights.num_heads)
        self._kv = weights.weight.new_empty(shape)  # what a head reads at a step is contiguous

    def write(self, slots: Tensor, states: Tensor) -> None:
        layers, _, _, num_heads, keys, head_dim = self._kv.shape
        projected = ops.linear(states, self._weights.packed, self._weights.bias.view(-1))
        projected = projected.view(-1, keys, layers, 2, num_heads, head_dim)
        self._kv[:, :, slots] = projected.permute(2, 3, 0, 4, 1, 5)

    def take(self, slot: int) -> list[Tensor]:
        return [self._kv[:, :, slot].clone()]

    def put(self, slot: int, taken: list[Tensor]) -> None:
        (self._kv[:, :, slot],) = taken

    def attend(self, layer: int, q: Tensor, num_lines: int) -> Tensor:
        k, v = self._kv[layer, :, :num_lines]
        return ops.cross_attention(q, k, v)

    @property
    def num_bytes(self) -> int:
        return self._kv.nbytes // self.num_slots


class LatentMemory:
    """The encoder's output, once for all layers.

    In half precision it is stored less its mean over the tokens, taken in fp32 before the one rounding, which keeps
    the rounding error small: scores do not see the mean, since it shifts all keys of a query alike, and values get it
    back, carried through the value projection.
    """

    def __init__(self, weights: CrossWeights, num_slots: int, num_keys: int) -> None:
        self.num_slots = num_slots
        layers, _, width, cross_width = weights.weight.shape
        # [layers, 2, heads, head_dim, cross_width]
        self._weight = weights.weight.view(layers, 2, weights.num_heads, width // weights.num_heads, cross_width)
        self._v_weight, self._v_bias = weights.weight[:, 1], weights.bias[:, 1]
        self._states = weights.weight.new_empty((num_slots, num_keys, cross_width))
        self._v_offset = weights.weight.new_empty((layers, num_slots, width))  # added to what attention gives

    def write(self, slots: Tensor, states: Tensor) -> None:
        if states.dtype == torch.float32:
            self._states[slots] = states
            self._v_offset[:, slots] = self._v_bias.unsqueeze(1)
            return
        mean = states.float().mean(dim=1, keepdim=True)  # [lines, 1, cross_width]
        self._states[slots] = (states.float() - mean).to(states.dtype)
        offset = torch.matmul(mean.squeeze(1), self._v_weight.float().transpose(1, 2))  # [layers, lines, width]
        self._v_offset[:, slots] = (offset + self._v_bias.float().unsqueeze(1)).to(states.dtype)

    def take(self, slot: int) -> list[Tensor]:
        return [self._states[slot].clone(), self._v_offset[:, slot].clone()]

    def put(self, slot: int, taken: list[Tensor]) -> None:
        self._states[slot], self._v_offset[:, slot] = taken

    def attend(self, layer: int, q: Tensor, num_lines: int) -> Tensor:
        k_weight, v_weight = self._weight[layer]
        out = ops.latent_cross_attention(q, self._states[:num_lines], k_weight, v_weight)
        offset = self._v_offset[layer, :num_lines]  # [lines, width]
        return (out.view(len(offset), -1, offset.shape[1]) + offset.unsqueeze(1)).view_as(out)

    @property
    def num_bytes(self) -> int:
        return (self._states.nbytes + self._v_offset.nbytes) // self.num_slots


@dataclass(frozen=True)
class Lines:
    """The pictures that the rows of a decode step look at: those in the first slots."""

    memory: CrossMemory
    num_lines: int

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q, scaled, [rows, heads, head_dim] -> [rows, heads * head_dim]."""
        return self.memory.attend(layer, q, self.num_lines)
