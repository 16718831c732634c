"""The operations of `trocr_fast.ops` that csrc/ computes: attention in fp32 on a CPU.

Each function is the one of that name in `trocr_fast.ops`, which has the contracts.
"""

import torch
from torch import Tensor

from trocr_fast import _csrc, torch_ops
from trocr_fast.paged_cache import PagedStep

OPERATIONS = ("encoder_attention", "paged_attention", "latent_cross_attention")
# Slower than PyTorch's with vectors of 4 floats, which is what a CPU without AVX2 gets.
NEED_LONG_VECTORS = ("encoder_attention", "latent_cross_attention")


def is_best(operation: str) -> bool:
    """Whether to leave an operation to C++ on this CPU rather than to PyTorch (`python -m bench.cpu_attention`)."""
    return operation in OPERATIONS and (operation not in NEED_LONG_VECTORS or _csrc.LANES >= 8)


def encoder_attention(qkv: Tensor, num_heads: int) -> Tensor:
    out = qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))
    _csrc.encoder_attention(qkv, num_heads, out, torch.get_num_threads(), _csrc.LANES)
    return out


def paged_attention(q: Tensor, k: Tensor, v: Tensor, layer: int, step: PagedStep) -> Tensor:
    return step.cache.attend(layer, q, k, v, step.block_tables, step.context_lens, step.slot_mapping)


def attend_latent(q: Tensor, states: Tensor) -> Tensor:
    out = torch.empty(q.shape)
    _csrc.latent_cross_attention(q, states, out, torch.get_num_threads(), _csrc.LANES)
    return out


def latent_cross_attention(q: Tensor, states: Tensor, k_weight: Tensor, v_weight: Tensor) -> Tensor:
    return torch_ops.latent_cross_attention(q, states, k_weight, v_weight, attend_latent)
