"""kv against latent cross memory: `python -m bench.cross_memory [CHECKPOINT_CONFIG_FOLDER...]`.

For each configuration (by default the built-in one and those of tests/checkpoints, random weights): the time to make
the memory of a batch from its encoder states, the time of one decode step, and what both add up to for lines of 20
tokens. The two take turns, so that a machine that slows down slows both. On a GPU if there is one. Writes
bench/results/cross_memory.json, or cross_memory_gpu.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import report
from trocr_fast.checkpoint import BUILTIN
from trocr_fast.config import CheckpointConfig
from trocr_fast.cross_memory import KINDS, CrossMemory, Lines, make_cross_memory
from trocr_fast.decoder import Decoder
from trocr_fast.lanes import Lanes
from trocr_fast.weights import expected_shapes

TOKENS = 20
ROUNDS = 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCHES = (1, 64) if DEVICE.type == "cuda" else (1, 8)


def random_decoder(config: CheckpointConfig, dtype: torch.dtype) -> Decoder:
    """A decoder of this configuration; its speed does not depend on its weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for name, shape in expected_shapes(config).items() if name.startswith("decoder.")}
    weights = {name: (torch.randn(s, generator=generator) * 0.02).to(DEVICE, dtype) for name, s in shapes.items()}
    return Decoder(config.decoder, weights)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(config: CheckpointConfig, dtype: torch.dtype, batch: int) -> dict[str, dict[str, float]]:
    """Median seconds by kind of memory."""
    decoder = random_decoder(config, dtype)
    states = torch.randn(batch, config.encoder.num_tokens, config.decoder.cross_width).to(DEVICE, dtype)
    positions = decoder.positions(count_pads=True)
    tokens, slots = torch.full((batch,), 5, device=DEVICE), torch.arange(batch, device=DEVICE)
    times: dict[str, dict[str, list[float]]] = {kind: {"make": [], "step": []} for kind in KINDS}
    megabytes = {}
    for _ in range(ROUNDS):
        for kind in KINDS:
            memory = make_cross_memory(kind, decoder.cross_weights, batch, states.shape[1])
            memory.write(slots, states)  # the first touches new memory
            megabytes[kind] = memory.num_bytes / 1e6
            lanes = Lanes(decoder.config, batch, 1, dtype, DEVICE)
            for lane in range(batch):
                lanes.admit(lane)

            def step(lanes: Lanes = lanes, memory: CrossMemory = memory) -> Tensor:
                return decoder.logits(decoder.step(tokens, lanes.begin_step(batch), Lines(memory, batch), positions))

            times[kind]["make"].append(seconds(lambda memory=memory: memory.write(slots, states)))  # type: ignore[misc]
            step()  # the first touches new memory
            times[kind]["step"].append(min(seconds(step) for _ in range(4)))
    found = {}
    for kind in KINDS:
        make, step_time = (statistics.median(times[kind][part]) for part in ("make", "step"))
        found[kind] = {
            "make_s": round(make, 5),
            "step_s": round(step_time, 5),
            f"line_of_{TOKENS}_tokens_s": round((make + TOKENS * step_time) / batch, 5),
            "megabytes_a_line": round(megabytes[kind], 3),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    folders = parser.parse_args().folders
    folders = folders or [BUILTIN, *sorted((report.ROOT / "tests" / "checkpoints").iterdir())]
    rows = []
    print(f"{'configuration':<18}{'dtype':<10}{'batch':>5}  {'memory':<7}{'make ms':>9}{'step ms':>9}{'ms a line':>10}")
    for folder in folders:
        config = CheckpointConfig.from_folder(folder)
        for dtype in (torch.float32, torch.bfloat16):
            for batch in BATCHES:
                found = measure(config, dtype, batch)
                name = str(dtype).removeprefix("torch.")
                rows.append({"configuration": folder.name, "dtype": name, "batch": batch, **found})
                for kind, times in found.items():
                    print(
                        f"{folder.name:<18}{name:<10}{batch:>5}  {kind:<7}{1e3 * times['make_s']:>9.1f}"
                        f"{1e3 * times['step_s']:>9.1f}{1e3 * times[f'line_of_{TOKENS}_tokens_s']:>10.1f}"
                    )
    name = "cross_memory_gpu" if DEVICE.type == "cuda" else "cross_memory"
    print(f"written to {report.write(name, rows).relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
