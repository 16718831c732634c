"""The operations of `trocr_fast.ops` that csrc/ computes: attention in fp32 on a CPU.

Each function is the one of that name in `trocr_fast.ops`, which has the contracts.
"""

import torch
from torch import Tensor

from trocr_fast import _csrc
from trocr_fast.paged_cache import PagedStep

OPERATIONS = ("encoder_attention", "paged_attention", "latent_cross_attention")
# Slower than PyTorch with short vectors: a CPU without AVX2, or one whose vectors are not compiled for.
NEED_LONG_VECTORS = ("encoder_attention", "latent_cross_attention")


def is_best(operation: str) -> bool:
    """Whether an operation is faster than PyTorch's on this CPU (bench.cpu_attention)."""
    return operation in OPERATIONS and (operation not in NEED_LONG_VECTORS or _csrc.LANES >= 8)


def encoder_attention(qkv: Tensor, num_heads: int) -> Tensor:
    out = qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))
    _csrc.encoder_attention(qkv, num_heads, out, torch.get_num_threads())
    return out


def paged_attention(q: Tensor, k: Tensor, v: Tensor, layer: int, step: PagedStep) -> Tensor:
    return step.cache.attend(layer, q, k, v, step.block_tables, step.context_lens, step.slot_mapping)


def latent_cross_attention(q: Tensor, states: Tensor, k_weight: Tensor, v_weight: Tensor) -> Tensor:
    latent_q = torch.matmul(q.transpose(0, 1), k_weight).transpose(0, 1)  # [rows, heads, width]
    context = torch.empty_like(latent_q, memory_format=torch.contiguous_format)
    _csrc.latent_cross_attention(latent_q, states, context, torch.get_num_threads())
    out = torch.matmul(context.transpose(0, 1), v_weight.transpose(1, 2))  # [heads, rows, head_dim]
    return out.transpose(0, 1).flatten(1)
