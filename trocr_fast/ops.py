"""The one door between the model and its arithmetic.

Encoder, cross memory, decoder and search call nothing below this module. Each operation has an implementation in
PyTorch (`trocr_fast.torch_ops`) and one in Triton (`trocr_fast.triton_ops`), most attention one in C++ as well
(`trocr_fast.cpp_ops`), and `backend` says which one computes it: on a CPU PyTorch's, or C++ in fp32; on a GPU Triton's
but for those of `LEFT_TO_PYTORCH`. `use`, or the environment variable TROCR_FAST_OPS
("encoder_attention=torch,linear=triton", "all=torch"), chooses otherwise, so that a kernel can be left out, or the
whole model be run through Triton's interpreter on a CPU (TRITON_INTERPRET=1).

Softmax and statistics are computed in fp32 whatever the dtype.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from trocr_fast import cpp_ops, torch_ops
from trocr_fast.errors import UsageError
from trocr_fast.paged_cache import PagedStep

OPERATIONS = (
    "pixels_to_patches",
    "linear",
    "linear_activation",
    "skinny_linear",
    "add_layernorm",
    "encoder_attention",
    "paged_attention",
    "cross_attention",
    "latent_cross_attention",
    "greedy_token",
)
BACKENDS = {"torch": OPERATIONS, "cpp": cpp_ops.OPERATIONS, "triton": OPERATIONS}  # and what each can compute
PRODUCTS = ("linear", "linear_activation", "skinny_linear", "greedy_token")  # that take a `packed` weight
FEW_ROWS = 16  # up to which a linear layer is `skinny_linear`
PACKED_FROM = 3 << 16  # values of a weight for few rows: a smaller one is faster as it is (bench.packed_linear)

# On a GPU these stay with PyTorch, until they are measured. A plain product has nothing to fuse. In fp32 Triton
# multiplies without matrix units, and the libraries use registers better, so what is bound by arithmetic stays there.
LEFT_TO_PYTORCH = {
    torch.float32: {"linear", "linear_activation", "encoder_attention", "latent_cross_attention"},
    torch.float16: {"linear"},
    torch.bfloat16: {"linear"},
}


def parse(text: str) -> dict[str, str]:
    """The choices in a text like "encoder_attention=torch,linear=triton"; later ones win.

    "all" is every operation that the backend can compute.

    Raises:
        UsageError: an operation or backend that does not exist.
    """
    chosen: dict[str, str] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        operation, _, name = part.partition("=")
        if operation not in (*OPERATIONS, "all"):
            raise UsageError(f"operation: expected one of {', '.join(OPERATIONS)} or all, got {operation!r}")
        able = [backend for backend, operations in BACKENDS.items() if operation in (*operations, "all")]
        if name not in able:
            raise UsageError(f"{operation}: expected one of {', '.join(able)}, got {name!r}")
        chosen.update(dict.fromkeys(BACKENDS[name] if operation == "all" else (operation,), name))
    return chosen


_chosen = parse(os.environ.get("TROCR_FAST_OPS", ""))


def chosen() -> tuple[tuple[str, str], ...]:
    """What `use` and TROCR_FAST_OPS have chosen, as (operation, backend)."""
    return tuple(sorted(_chosen.items()))


@contextmanager
def use(text: str) -> Iterator[None]:
    """Choose backends, as TROCR_FAST_OPS does, for the time of a `with` block, in all threads.

    Models that were loaded before keep their `packed` weights, and PyTorch for them.

    Raises:
        UsageError: see `parse`.
    """
    global _chosen
    before, _chosen = _chosen, _chosen | parse(text)
    try:
        yield
    finally:
        _chosen = before


def backend(operation: str, device: torch.device, dtype: torch.dtype) -> str:
    """Which implementation computes an operation on tensors of this device and dtype."""
    if operation in _chosen:
        return _chosen[operation]
    if device.type == "cpu" and dtype == torch.float32 and cpp_ops.is_best(operation):
        return "cpp"
    kept = LEFT_TO_PYTORCH.get(dtype, OPERATIONS)
    return "triton" if device.type == "cuda" and operation not in kept and _has_triton(device) else "torch"


@cache
def _has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and the chip one that it compiles bf16 for: NVIDIA's since Ampere."""
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def _of(operation: str, x: Tensor) -> ModuleType:
    name = backend(operation, x.device, x.dtype)
    if name == "torch":
        return torch_ops
    if name == "cpp":
        if x.device.type != "cpu" or x.dtype != torch.float32:
            raise UsageError(f"{operation}: C++ computes in float32 on a CPU; got {x.dtype} on {x.device}")
        return cpp_ops
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError(f"{operation}: Triton computes on a GPU, or on a CPU with TRITON_INTERPRET=1 set; got neither")
    from trocr_fast import triton_ops  # late: importing Triton takes time that a CPU has no use for

    return triton_ops


def normalise_pixels(pixels: Tensor, table: Tensor) -> Tensor:
    """Normalised value of each uint8 pixel, by look-up.

    Args:
        pixels: uint8 [batch, channels, H, W].
        table: fp32 [channels, 256], the normalised value of each of the 256 values.

    Returns:
        fp32 [batch, channels, H, W].
    """
    return torch_ops.normalise_pixels(pixels, table)


def cut_patches(pixels: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut pictures into patches, row by row; what is left over at the right and bottom edge is dropped.

    Args:
        pixels: [batch, channels, H, W].
        patch_size: (height, width).

    Returns:
        [batch, (H // height) * (W // width), channels * height * width].
    """
    return torch_ops.cut_patches(pixels, patch_size)


def pixels_to_patches(pixels: Tensor, table: Tensor, patch_size: tuple[int, int], weight: Tensor) -> Tensor:
    """`cut_patches` of the normalised pixels, in the dtype of `weight`.

    Args:
        pixels, table: as of `normalise_pixels`.
        patch_size: (height, width).
        weight: of the layer that takes the patches.
    """
    return _of("pixels_to_patches", weight).pixels_to_patches(pixels, table, patch_size, weight.dtype)


def packed(weight: Tensor, few_rows: bool = False) -> Tensor:
    """A weight for `linear` and `greedy_token`, in the layout of their fastest implementation.

    On a CPU in fp32 it is oneDNN's, in which products are 1.2 to 4 times as fast (docs/decisions.md) and which nothing
    else can read; elsewhere, or where Triton is chosen for any such operation, the weight as it is.

    Args:
        weight: [out, in].
        few_rows: it is for the few rows of a decode step.
    """
    if few_rows and weight.numel() < PACKED_FROM:
        return weight
    chosen = {backend(operation, weight.device, weight.dtype) for operation in PRODUCTS}
    return torch_ops.packed(weight) if chosen == {"torch"} else weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """`activation(x @ weight.T + bias)`; x [..., in], weight [out, in], bias [out] -> [..., out].

    The weight may be `packed`; the bias is then contiguous.

    Three operations to `backend`: `skinny_linear` of few rows, `linear_activation` and `linear` of more.
    """
    if weight.is_mkldnn:
        return torch_ops.linear(x, weight, bias, activation)
    if x.numel() <= FEW_ROWS * x.shape[-1]:
        return _of("skinny_linear", x).skinny_linear(x, weight, bias, activation)
    if activation is not None:
        return _of("linear_activation", x).linear_activation(x, weight, bias, activation)
    return _of("linear", x).linear(x, weight, bias, None)


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension; x [..., width], weight and bias [width]."""
    return torch_ops.layernorm(x, weight, bias, eps)


def add_layernorm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`sum = x + residual`, and LayerNorm of the sum; all [..., width]. Returns (sum, normalised)."""
    return _of("add_layernorm", x).add_layernorm(x, residual, weight, bias, eps)


def encoder_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Non-causal self-attention over all tokens of a picture.

    Args:
        qkv: [batch, tokens, 3 * width], contiguous: queries, keys and values side by side, each `num_heads` heads.

    Returns:
        [batch, tokens, width].
    """
    return _of("encoder_attention", qkv).encoder_attention(qkv, num_heads)


def paged_attention(q: Tensor, k: Tensor, v: Tensor, layer: int, step: PagedStep) -> Tensor:
    """Store the new tokens' keys and values in the cache, and attend over those of each row, the new one included.

    Args:
        q, k, v: [rows, heads, head_dim], q scaled; the first stride is free.
        layer: whose part of the cache.
        step: of these rows.

    Returns:
        [rows, heads * head_dim]; zeros for a row of length 0.
    """
    return _of("paged_attention", q).paged_attention(q, k, v, layer, step)


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a decode step over the cached keys and values of each row's line.

    Args:
        q: [rows, heads, head_dim], already scaled; the rows of a line, its beams, side by side.
        k, v: [lines, heads, keys, head_dim]; the first stride is free.

    Returns:
        [rows, heads * head_dim].
    """
    return _of("cross_attention", q).cross_attention(q, k, v)


def latent_cross_attention(q: Tensor, states: Tensor, k_weight: Tensor, v_weight: Tensor) -> Tensor:
    """Cross-attention over the encoder states themselves, without projected keys and values.

    With `K = E Wk^T + bk`, `q K^T = (q Wk) E^T + q bk`, whose last term is the same for all keys and drops out of the
    softmax; and with probabilities P that sum to one `P V = (P E) Wv^T + bv`, whose bias the caller adds.

    Args:
        q: [rows, heads, head_dim], already scaled; the rows of a line, its beams, side by side.
        states: [lines, keys, cross_width], contiguous, at least one key: E, the encoder's output, which all heads and
            layers share.
        k_weight, v_weight: [heads, head_dim, cross_width].

    Returns:
        [rows, heads * head_dim], without the bias of V.
    """
    return _of("latent_cross_attention", q).latent_cross_attention(q, states, k_weight, v_weight)


def greedy_token(x: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """The token of the greatest logit in each row of `x @ head.T`, the first of equals, and its log-probability.

    Args:
        x: [rows, width].
        head: [vocab_size, width], maybe `packed`.

    Returns:
        int64 [rows] and fp32 [rows].
    """
    return (torch_ops if head.is_mkldnn else _of("greedy_token", x)).greedy_token(x, head)
