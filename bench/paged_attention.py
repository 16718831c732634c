"""Self-attention of a decode step over the paged cache, on a CPU in fp32: `python -m bench.paged_attention`.

One layer: in one call of C++ (csrc/paged_attention.cpp), and as PyTorch does it, which half precision still needs:
store, gather into dense tensors, mask, attend. The two take turns. Writes bench/results/paged_attention.json.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import report
from bench.packed_linear import median_ms
from trocr_fast import torch_ops
from trocr_fast.paged_cache import PagedKV, PagedStep

# rows, heads, head_dim, tokens of a row: the built-in model, base, four beams of eight lines, formulas
CASES = ((1, 8, 32, 12), (8, 8, 32, 12), (1, 16, 64, 12), (8, 16, 64, 12), (32, 16, 64, 12), (8, 16, 64, 500))
TURNS = 100


class GatheringKV(PagedKV):
    """Leaves attention to PyTorch, as in half precision."""

    can_attend = False


def measure(rows: int, heads: int, head_dim: int, tokens: int) -> dict[str, Any]:
    """Median milliseconds of the two."""
    tables = torch.randperm(rows * tokens, generator=torch.Generator().manual_seed(0)).view(rows, tokens).int()
    lengths = torch.full((rows,), tokens, dtype=torch.int32)
    held = torch.randn(rows * tokens, 1, 2, 1, heads, head_dim)
    q, k, v = torch.randn(rows, 3, heads, head_dim).unbind(1)

    def attention(kind: type[PagedKV]) -> Callable[[], Tensor]:
        kv = kind(1, heads, head_dim, rows * tokens, tokens, torch.float32, torch.device("cpu"))
        kv.memory.copy_(held)
        step = PagedStep(kv, tables[:, -1].long(), lengths, tables, tokens, torch.zeros(rows, dtype=torch.int64))
        return lambda: torch_ops.paged_attention(q, k, v, 0, step)

    by_torch, native = attention(GatheringKV), attention(PagedKV)
    torch.testing.assert_close(native(), by_torch(), rtol=1e-4, atol=1e-4)
    found = median_ms({"pytorch": by_torch, "native": native}, TURNS)
    return {"rows": rows, "heads": heads, "head_dim": head_dim, "tokens": tokens, **found}


@torch.inference_mode()
def main() -> None:
    rows = [measure(*case) for case in CASES]
    print(f"{'rows':>5}{'heads':>7}{'head_dim':>10}{'tokens':>8}{'PyTorch ms':>12}{'C++ ms':>9}")
    for row in rows:
        print(
            f"{row['rows']:>5}{row['heads']:>7}{row['head_dim']:>10}{row['tokens']:>8}"
            f"{row['pytorch']:>12.3f}{row['native']:>9.3f}"
        )
    print(f"written to {report.write('paged_attention', rows).relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
