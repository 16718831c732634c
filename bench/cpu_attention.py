"""Attention in fp32 on a CPU, by C++ and by PyTorch: `python -m bench.cpu_attention`.

One layer of each kind: of the encoder; of a decode step over the paged cache, which PyTorch has to gather first; and of
a decode step over the encoder states. They take turns, and before each turn other memory is read, as the weights are
between layers. C++ also with vectors of 8 floats, as on a CPU with AVX2 but no AVX-512. Writes
bench/results/cpu_attention.json.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import report
from bench.packed_linear import median_ms
from trocr_fast import _csrc, cpp_ops, torch_ops
from trocr_fast.paged_cache import PagedKV, PagedStep

TURNS = 20
OTHER_MEMORY = 64 << 20  # bytes: larger than the caches

# pictures, tokens, heads, head_dim: the built-in model, base, large
ENCODER = ((1, 129, 6, 32), (8, 129, 6, 32), (1, 577, 12, 64), (2, 577, 12, 64), (8, 577, 12, 64), (1, 577, 16, 64))
# rows, heads, head_dim, tokens of a row: the built-in model, base, four beams of eight lines, formulas
PAGED = ((1, 8, 32, 12), (8, 8, 32, 12), (1, 16, 64, 12), (8, 16, 64, 12), (32, 16, 64, 12), (8, 16, 64, 500))
# rows, lines, heads, head_dim, keys, width: base, beams of it, large
LATENT = (
    (1, 1, 16, 64, 577, 768),
    (8, 8, 16, 64, 577, 768),
    (32, 8, 16, 64, 577, 768),
    (40, 4, 16, 64, 577, 768),
    (8, 8, 16, 64, 577, 1024),
)

Case = tuple[str, str, Callable[[Any], Tensor]]  # operation, its sizes in words, and the call of torch_ops or cpp_ops


def encoder() -> Iterator[Case]:
    for pictures, tokens, heads, head_dim in ENCODER:
        qkv = torch.randn(pictures, tokens, 3 * heads * head_dim)
        sizes = f"{pictures} of {tokens} tokens, {heads} x {head_dim}"
        yield "encoder_attention", sizes, lambda ops, qkv=qkv, heads=heads: ops.encoder_attention(qkv, heads)


def paged() -> Iterator[Case]:
    for rows, heads, head_dim, tokens in PAGED:
        tables = torch.randperm(rows * tokens, generator=torch.Generator().manual_seed(0)).view(rows, tokens).int()
        kv = PagedKV(1, heads, head_dim, rows * tokens, tokens, torch.float32, torch.device("cpu"))
        kv.memory.normal_()
        lengths = torch.full((rows,), tokens, dtype=torch.int32)
        step = PagedStep(kv, tables[:, -1].long(), lengths, tables, tokens, torch.zeros(rows, dtype=torch.int64))
        q, k, v = torch.randn(rows, 3, heads, head_dim).unbind(1)
        sizes = f"{rows} of {tokens} tokens, {heads} x {head_dim}"
        yield "paged_attention", sizes, lambda ops, q=q, k=k, v=v, step=step: ops.paged_attention(q, k, v, 0, step)


def latent() -> Iterator[Case]:
    for rows, lines, heads, head_dim, keys, width in LATENT:
        q, states = torch.randn(rows, heads, head_dim), 0.1 * torch.randn(lines, keys, width)
        k_weight, v_weight = 0.1 * torch.randn(2, heads, head_dim, width)
        given = (q, states, k_weight, v_weight)
        sizes = f"{rows} of {lines} lines, {heads} x {head_dim}, {keys} keys of {width}"
        yield "latent_cross_attention", sizes, lambda ops, given=given: ops.latent_cross_attention(*given)


@torch.inference_mode()
def main() -> None:
    other = torch.ones(OTHER_MEMORY // 4)
    torch.manual_seed(0)
    most, rows = _csrc.LANES, []

    def cpp(call: Callable[[Any], Tensor], lanes: int) -> Tensor:
        _csrc.LANES = lanes
        return call(cpp_ops)

    print(f"{'operation':<24}{'rows':<46}{'PyTorch ms':>11}{f'C++ {most} ms':>12}{'C++ 8 ms':>10}")
    for make in (encoder, paged, latent):
        for operation, sizes, call in make():
            torch.testing.assert_close(call(cpp_ops), call(torch_ops), rtol=1e-3, atol=1e-4)
            forms = {"pytorch": lambda call=call: call(torch_ops)}
            for lanes in {most, min(most, 8)}:
                forms[f"cpp_{lanes}_lanes"] = lambda call=call, lanes=lanes: cpp(call, lanes)
            found = median_ms(forms, TURNS, before=other.sum)
            rows.append({"operation": operation, "rows": sizes, **{f"{name}_ms": ms for name, ms in found.items()}})
            times = [found["pytorch"], found[f"cpp_{most}_lanes"], found[f"cpp_{min(most, 8)}_lanes"]]
            print(f"{operation:<24}{sizes:<46}{times[0]:>11.3f}{times[1]:>12.3f}{times[2]:>10.3f}", flush=True)
    print(f"written to {report.write('cpu_attention', rows).relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
