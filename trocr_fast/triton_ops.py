"""The operations of `trocr_fast.ops` through the Triton kernels.

Each function is the one of that name in `trocr_fast.ops`, which has the contracts; here tensors get the shapes that the
launchers take, and where an operation has several kernels, the one for its shape is chosen.
"""

import torch
from torch import Tensor

from trocr_fast import torch_ops
from trocr_fast.kernels.add_layernorm import add_layernorm
from trocr_fast.kernels.cross_attention import cross_attention
from trocr_fast.kernels.encoder_attention import encoder_attention
from trocr_fast.kernels.latent_cross_attention import latent_cross_attention as attend_latent
from trocr_fast.kernels.linear_activation import linear_activation as linear_plain
from trocr_fast.kernels.linear_persistent import linear_persistent
from trocr_fast.kernels.lm_head import lm_head as greedy_token
from trocr_fast.kernels.paged_attention import paged_attention as attend_paged
from trocr_fast.kernels.pixels_to_patches import pixels_to_patches
from trocr_fast.kernels.skinny_linear import skinny_linear as linear_skinny
from trocr_fast.paged_cache import PagedStep

__all__ = [
    "add_layernorm",
    "cross_attention",
    "encoder_attention",
    "greedy_token",
    "latent_cross_attention",
    "linear",
    "linear_activation",
    "paged_attention",
    "pixels_to_patches",
    "skinny_linear",
]

PERSISTENT_ABOVE = 1024  # rows: fewer do not give every multiprocessor a tile
ALIGNMENT = 16  # bytes, of rows that go by tensor descriptor


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    lengths = [size * x.element_size() for size in weight.shape]  # of the rows of out, and of x and weight
    aligned = all(number % ALIGNMENT == 0 for number in (*lengths, rows.data_ptr(), weight.data_ptr()))
    launch = linear_persistent if len(rows) > PERSISTENT_ABOVE and aligned and _has_descriptors(x) else linear_plain
    return launch(rows, weight, bias, activation).view(*x.shape[:-1], -1)


linear = linear_activation


def _has_descriptors(x: Tensor) -> bool:
    """Whether the chip copies tiles by itself and holds the kernel's: those of data centres since Hopper.

    And Triton's interpreter, which does as told.
    """
    return x.device.type == "cpu" or torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return linear_skinny(rows, weight, bias, activation).view(*x.shape[:-1], -1)


def paged_attention(q: Tensor, k: Tensor, v: Tensor, layer: int, step: PagedStep) -> Tensor:
    return attend_paged(q, k, v, step.cache.memory, layer, step.block_tables, step.context_lens, step.slot_mapping)


def latent_cross_attention(q: Tensor, states: Tensor, k_weight: Tensor, v_weight: Tensor) -> Tensor:
    return torch_ops.latent_cross_attention(q, states, k_weight, v_weight, attend_latent)
