"""Milliseconds for one line, greedy: `python -m bench.latency [--config small base builtin] [--new-tokens 20]`.

Batch 1, from a uint8 picture in host memory to token ids: the engine with one lane against transformers as shipped and
with a cache, taking turns. Random weights with so many new tokens, or the built-in model on one of its sample pictures.
The time to the first token is that of a call that asks for one token only. Results are added to
bench/results/latency_cpu.json (or _gpu.json).
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import torch

from bench.generation import (
    DTYPES,
    FOLDERS,
    Subject,
    Workload,
    builtin_workload,
    choose_device,
    choose_dtype,
    contestants,
    load_subject,
    random_workload,
    reference_rows,
)
from bench.throughput import Entrant, significant, write
from trocr_fast.trocr import TrOCR

REPEATS = 30
SECONDS = 30.0  # of a contestant and length, and three turns at least
LEAST = 3


def measure(
    subject: Subject,
    workload: Workload,
    repeats: int = REPEATS,
    seconds: float = SECONDS,
    deadline: float = float("inf"),
) -> list[dict[str, Any]]:
    """A row for each contestant, on a workload of one line."""
    first = dataclasses.replace(workload, max_new_tokens=1, new_tokens=[1])
    expected = reference_rows(subject, workload, 1, 1)
    makers = contestants(subject, workload, 1, [1])
    whole, only_first = ([Entrant(maker, 1) for maker in makers] for _ in range(2))
    for entrant, one_token in zip(whole, only_first, strict=True):
        entrant.try_to(lambda e=entrant: e.warm_up(workload), deadline)  # type: ignore[misc]
        one_token.contestant, one_token.failure = entrant.contestant, entrant.failure
    for turn in range(repeats):
        for entrants, work in ((whole, workload), (only_first, first)):
            for entrant in entrants:
                if turn < LEAST or sum(entrant.seconds) < seconds:
                    entrant.try_to(lambda e=entrant, w=work: e.take_turn(w), deadline)  # type: ignore[misc]
    rows = []
    for entrant, one_token in zip(whole, only_first, strict=True):
        row: dict[str, Any] = {"contestant": entrant.name}
        if entrant.seconds and one_token.seconds:
            row |= {
                "median_ms": milliseconds(statistics.median(entrant.seconds)),
                "p90_ms": milliseconds(percentile(entrant.seconds, 0.9)),
                "first_token_ms": milliseconds(statistics.median(one_token.seconds)),
                "runs": len(entrant.seconds),
                "equal": entrant.rows == expected,
            }
        else:
            row["failed"] = entrant.failure or one_token.failure
        rows.append(row)
    return rows


def percentile(values: list[float], share: float) -> float:
    """The least of the values that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def milliseconds(seconds: float) -> float:
    return significant(1e3 * seconds)


def table(entry: dict[str, Any]) -> str:
    """One entry; `ours is` says how many times as fast as this contestant."""
    rows = entry["rows"]
    width = max(len(row["contestant"]) for row in rows)
    ours = rows[0].get("median_ms")
    lines = [f"{entry['configuration']}, {entry['dtype']}, {entry['workload']}, one line, greedy"]
    lines.append(f"  {'':<{width}}{'median ms':>11}{'p90 ms':>9}{'first token':>13}{'ours is':>9}  equal  runs")
    for row in rows:
        start = f"  {row['contestant']:<{width}}"
        if "failed" in row:
            lines.append(f"{start}   {row['failed']}")
            continue
        ratio = f"{row['median_ms'] / ours:.2f}x" if ours else "-"
        numbers = f"{row['median_ms']:>11.4g}{row['p90_ms']:>9.4g}{row['first_token_ms']:>13.4g}{ratio:>9}"
        lines.append(f"{start}{numbers}  {'yes' if row['equal'] else 'no':<5}{row['runs']:>6}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default CUDA where there is one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="by default float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--config", nargs="+", choices=tuple(FOLDERS), default=["builtin", "small", "base"])
    parser.add_argument("--new-tokens", type=int, default=20, help="by default 20; not for builtin")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="for each contestant, twice; three runs at least"
    )
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="begin nothing after so long")
    chosen = parser.parse_args(arguments)
    for name in ("new_tokens", "repeats"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(chosen, name)}")
    device = choose_device(chosen.device)
    dtype = choose_dtype(chosen.dtype, device)
    deadline = time.perf_counter() + chosen.budget_seconds
    for configuration in chosen.config:
        subject = load_subject(configuration, device, dtype)
        if configuration == "builtin":
            workload, what = builtin_workload(TrOCR.from_pretrained(device=device, dtype=dtype), 1), "a sample picture"
        else:
            workload, what = random_workload(subject, 1, chosen.new_tokens), f"{chosen.new_tokens} new tokens"
        entry = {
            "configuration": configuration,
            "workload": what,
            "dtype": str(dtype).removeprefix("torch."),
            "num_beams": 1,
            "batches": [1],
            "num_lines": 1,
            "as_shipped": {"use_cache": subject.as_shipped},
            "threads": torch.get_num_threads(),
            "rows": measure(subject, workload, chosen.repeats, chosen.seconds, deadline),
        }
        write("latency_gpu" if device.type == "cuda" else "latency_cpu", entry)
        print(table(entry), flush=True)


if __name__ == "__main__":
    main()
