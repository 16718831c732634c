"""Linear layers on a CPU with packed and with plain weights: `python -m bench.packed_linear`.

The layers of TrOCR base in fp32, in the encoder over the tokens of one and of eight pictures, in the decoder for some
numbers of rows; and layers of smaller decoders, around the size from which packing pays. The two take turns. Writes
bench/results/packed_linear.json.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import report
from trocr_fast import torch_ops

LAYERS: dict[str, tuple[int, int, str | None]] = {  # in, out, activation
    "encoder qkv": (768, 2304, None),
    "encoder out": (768, 768, None),
    "encoder fc1": (768, 3072, "gelu"),
    "encoder fc2": (3072, 768, None),
    "decoder out": (1024, 1024, None),
    "decoder fc1": (1024, 4096, "gelu"),
    "decoder fc2": (4096, 1024, None),
    "head": (1024, 50265, None),
    "small decoder 192": (192, 192, None),
    "small decoder 192 fc1": (192, 768, "gelu"),
    "small decoder 256": (256, 256, None),
    "small decoder 256 fc1": (256, 1024, "relu"),
    "small decoder 512": (512, 512, None),
}
ENCODER_ROWS = (577, 8 * 577)
DECODER_ROWS = (1, 8, 16, 80)
TURNS = 9
TURNS_OF_SMALL = 200


def median_ms(
    forms: dict[str, Callable[[], Tensor]], turns: int = TURNS, before: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Milliseconds by form, which take turns after one turn that does not count; without what is done `before` each."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(turns + 1):
        for name, form in forms.items():
            before()
            start = time.perf_counter()
            form()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(f"{statistics.median(values):.4g}") for name, values in times.items()}


@torch.inference_mode()
def main() -> None:
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    print(f"{'layer':<23}{'rows':>6}{'plain ms':>10}{'packed ms':>11}{'gain':>7}")
    for name, (width, out, activation) in LAYERS.items():
        weight = 0.02 * torch.randn(out, width, generator=generator)
        bias = None if name == "head" else torch.randn(out, generator=generator)
        packed = torch_ops.packed(weight)
        if packed is weight:
            raise SystemExit("packed_linear: expected a PyTorch with oneDNN, whose layout this measures; got none")
        for num_rows in ENCODER_ROWS if name.startswith("encoder") else DECODER_ROWS:
            x = torch.randn(num_rows, width, generator=generator)
            found = median_ms(
                {
                    "plain": lambda: torch_ops.linear(x, weight, bias, activation),  # noqa: B023  # called right here
                    "packed": lambda: torch_ops.linear(x, packed, bias, activation),  # noqa: B023
                },
                TURNS_OF_SMALL if name.startswith("small") else TURNS,
            )
            rows.append({"layer": name, "rows": num_rows, **{f"{form}_ms": ms for form, ms in found.items()}})
            gain = found["plain"] / found["packed"]
            print(f"{name:<23}{num_rows:>6}{found['plain']:>10.3f}{found['packed']:>11.3f}{gain:>6.2f}x", flush=True)
    print(f"written to {report.write('packed_linear', rows).relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
