"""The Triton kernels against PyTorch and against the chip: `python -m bench.kernels [NAME...]`, on a CUDA device.

For every kernel file and each of its `cases()`: first the result is compared with the reference, on random inputs and
with poisoned outputs; what is wrong gets no number. Then ours and its rivals (`bench/rivals.py`) are timed with a cold
L2 cache: each call is captured into a CUDA graph, so that Python's launches are not what is measured, and replayed
between two events behind a read of a large buffer.

The floor of a case is the larger of two times: its bytes at the memory's rate and its operations at the matrix units'
rate in that dtype, both from the kernel's `work()`. The rates are this chip's, measured first: a large copy (bytes read
and written), a large square product. Where a product is bound by arithmetic, its rate is that of the library's bare
product of the very same shape. Such a floor can be beaten.

Writes kernels.csv (a row a provider, as soon as it is measured; rows of the kernel `ceiling` hold the rates) and
kernels.png, or with another dtype than bf16 kernels_DTYPE. The first cases of all kernels come before the second ones,
so that a run cut short has something of each.
Exits 1 if a result of ours is wrong or the time did not suffice, 2 without a CUDA device.
"""

import argparse
import functools
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import report
from bench.compile import DTYPES, kernel_names
from bench.kernel_results import CEILING, OURS, CsvFile, Row, plot, table
from bench.rivals import RIVALS
from trocr_fast.kernels.launch import Work

PRODUCTS = ("linear_activation", "linear_persistent", "lm_head", "skinny_linear")  # x and weight come first
OUTPUTS = {"add_layernorm": ("total", "out"), "lm_head": ("tokens", "log_probs"), "beam_topk": ("values", "indices")}
REFUSALS = ("No available kernel", "No viable backend")  # sdpa's words where a backend does not take the shape
SQUARE = 8192  # rows, columns and depth of the product that shows the matrix units' rate
COPIED = 2**31  # bytes of the copy that shows the memory's
SECONDS = 0.1  # of repeats of one call


class Timing(NamedTuple):
    """µs of a call, and how they were taken: "graph", or "events" with the reason, where launches count, too."""

    median: float
    p20: float
    p80: float
    how: str


Timer = Callable[[Callable[[], Any]], Timing]


class Ceilings(NamedTuple):
    """What this chip reaches."""

    bytes_s: float
    flop_s: float


class GpuTimer:
    """Times calls on the current CUDA device with a cold L2 cache."""

    def __init__(self) -> None:
        size = max(2 * torch.cuda.get_device_properties().L2_cache_size, 2**28)
        # Read, not written: lines that were written would go to memory under the measured call. And reading takes
        # longer than the launches of a repeat, so that the device never waits for Python.
        self.buffer = torch.ones(size // 4, device="cuda")
        self.unused = torch.empty((), device="cuda")

    def __call__(self, work: Callable[[], Any]) -> Timing:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as capture asks for: libraries prepare themselves
            for _ in range(3):
                work()
        torch.cuda.synchronize()
        graph, call, how = torch.cuda.CUDAGraph(), work, "graph"
        try:
            with torch.cuda.graph(graph):
                work()
            call = graph.replay
        except RuntimeError as error:
            how = f"events: {first_line(error)}"
        torch.cuda.synchronize()
        estimate = np.median(self.repeat(call, 5)) / 1e6
        times = self.repeat(call, int(min(200, max(20, SECONDS / (estimate + 1e-4)))))
        p20, median, p80 = np.percentile(times, [20, 50, 80])
        return Timing(float(median), float(p20), float(p80), how)

    def repeat(self, call: Callable[[], Any], repeats: int) -> list[float]:
        """µs of each call."""
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            torch.sum(self.buffer, dim=0, out=self.unused)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in pairs]


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def ceilings(dtype: torch.dtype, timer: Timer, device: str) -> tuple[Ceilings, list[Row]]:
    """This chip's rates; and the rows that tell them, and what a launch takes at least."""
    source, target = (torch.ones(COPIED // 4, device=device) for _ in range(2))
    copy = timer(lambda: target.copy_(source))
    a, b = (torch.randn(SQUARE, SQUARE, device=device, dtype=dtype) for _ in range(2))
    product = timer(lambda: F.linear(a, b))
    one = torch.zeros(1, device=device)
    launch = timer(lambda: one.add_(1))
    limits = Ceilings(2 * COPIED / copy.median * 1e6, 2 * SQUARE**3 / product.median * 1e6)

    def row(case: str, timing: Timing, gb_s: float = math.nan, tflop_s: float = math.nan) -> Row:
        median, p20, p80, *rates = rounded(*timing[:3], gb_s, tflop_s)
        return Row(CEILING, case, name_of(dtype), "torch", median, p20, p80, rates[0], rates[1], timing=timing.how)

    return limits, [
        row(f"copy of {COPIED} bytes", copy, gb_s=limits.bytes_s / 1e9),
        row(f"product of {SQUARE} cubed", product, tflop_s=limits.flop_s / 1e12),
        row("one number", launch),
    ]


def floor_of(name: str, arguments: tuple, work: Work, limits: Ceilings, timer: Timer) -> tuple[float, str]:
    """µs that a case takes at least, and what bounds it."""
    memory, arithmetic = 1e6 * work.num_bytes / limits.bytes_s, 1e6 * work.flops / limits.flop_s
    if memory >= arithmetic:
        return memory, "memory"
    if name in PRODUCTS:
        x, weight = arguments[:2]
        arithmetic = max(memory, timer(lambda: F.linear(x, weight)).median)
    return arithmetic, "arithmetic"


def error_of(name: str, arguments: tuple, got: Any, expected: Any) -> float:
    """The largest relative error of a row of an output, as a norm; NaN if there is one, or another shape."""
    errors = []
    for ours, theirs in zip(*(comparable(name, arguments, outputs) for outputs in (got, expected)), strict=True):
        if ours.shape != theirs.shape:
            return math.nan
        difference = (ours.double() - theirs.double()).norm(dim=-1) / theirs.double().norm(dim=-1)
        errors.append(difference.max().item())
    return float(np.max(errors))


def comparable(name: str, arguments: tuple, outputs: Any) -> list[Tensor]:
    """The outputs, but instead of indices the values that they point at: of equal ones any may be chosen."""
    if name == "lm_head":
        x, weight = arguments
        tokens, log_probs = outputs
        return [log_probs, pointed_at(F.linear(x.float(), weight.float()), tokens.unsqueeze(1))]
    if name == "beam_topk":
        logits, scores, *_ = arguments
        values, indices = outputs
        totals = scores.unsqueeze(1) + logits.float().log_softmax(-1)
        return [values, pointed_at(totals.view(len(values), -1), indices)]
    return as_list(outputs)


def pointed_at(values: Tensor, indices: Tensor) -> Tensor:
    """NaN for an index outside."""
    inside = (indices >= 0) & (indices < values.shape[1])
    return values.gather(1, indices.where(inside, 0)).where(inside, torch.nan)


def ours(launcher: Callable[..., Any], names: tuple[str, ...], arguments: tuple) -> Callable[[], Any]:
    """The launcher's call, into outputs of its own that hold nothing yet."""
    outputs: dict[str, Tensor] = {}

    def call() -> Any:
        if not outputs:
            outputs.update(zip(names, as_list(launcher(*arguments)), strict=True))
            for tensor in outputs.values():
                tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)
        return launcher(*arguments, **outputs)

    return call


def measure(
    name: str, case: tuple, dtype: torch.dtype, limits: Ceilings, timer: Timer, device: str = "cuda"
) -> Iterator[Row]:
    """The rows of one case: ours first, then the rivals that accept its shape."""
    module = importlib.import_module(f"trocr_fast.kernels.{name}")
    arguments = module.inputs(case, dtype, device)
    expected = module.reference(*map(more_precise, arguments))
    work = module.work(case, dtype)
    floor, bound = floor_of(name, arguments, work, limits, timer)
    calls = {OURS: ours(getattr(module, name), OUTPUTS.get(name, ("out",)), arguments), **RIVALS[name](*arguments)}
    for provider, call in calls.items():
        row = functools.partial(
            Row, name, case_text(case), name_of(dtype), provider, floor_us=rounded(floor)[0], bound=bound
        )
        # The rivals also round what lies between their operations.
        allowed = max(1e-5, torch.finfo(dtype).eps) * (1 if provider == OURS else 4)
        try:
            error = error_of(name, arguments, call(), expected)
            if not error <= allowed:
                yield row(correct="no", note=f"error {error:.2g}, allowed {allowed:.2g}")
                continue
            timing = timer(call)
        except Exception as error:  # whatever it is, the others shall be measured
            if not any(words in str(error) for words in REFUSALS):
                yield row(correct="no", note=f"{type(error).__name__}: {first_line(error)}")
            if device == "cuda":
                torch.cuda.synchronize()  # raises where the device is lost: nothing can be measured then
            continue
        median, p20, p80, gb_s, tflop_s, share = rounded(
            *timing[:3],
            work.num_bytes / timing.median / 1e3,
            work.flops / timing.median / 1e6,
            floor / timing.median,
        )
        yield row(
            median_us=median,
            p20_us=p20,
            p80_us=p80,
            gb_s=gb_s,
            tflop_s=tflop_s,
            share_of_floor=share,
            correct="yes",
            timing=timing.how,
        )


def more_precise(value: Any) -> Any:
    """For the reference: fp64 instead of fp32, fp32 instead of the half precisions."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.double() if value.dtype == torch.float32 else value.float()


def as_list(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, one in DTYPES.items() if one == dtype)


def rounded(*numbers: float) -> list[float]:
    """To four digits."""
    return [float(f"{number:.4g}") for number in numbers]


def case_text(case: tuple) -> str:
    """Sizes with their names, where they have names."""
    values = ["x".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in case]
    if isinstance(names := getattr(case, "_fields", None), tuple):
        values = [f"{name}={value}" for name, value in zip(names, values, strict=True)]
    return " ".join(values)


def run(names: list[str], dtype: torch.dtype, out: Path, budget: float, timer: Timer, device: str = "cuda") -> int:
    """Measure, write and print; the exit status."""
    deadline = time.monotonic() + budget
    path = out / ("kernels.csv" if dtype == torch.bfloat16 else f"kernels_{name_of(dtype)}.csv")
    file = CsvFile(path)
    limits, rows = ceilings(dtype, timer, device)
    for row in rows:
        file.add(row)
    memory, matrix, launch = rows
    reached = f"memory {memory.gb_s:g} GB/s, products {matrix.tflop_s:g} TFLOP/s, a launch {launch.median_us:g} us"
    print(reached, flush=True)
    cases = []
    for name in names:
        module = importlib.import_module(f"trocr_fast.kernels.{name}")
        cases += [(index, name, case) for index, case in enumerate(module.cases())]
    cases.sort(key=lambda item: item[0])
    measured = 0
    for _, name, case in cases:
        if time.monotonic() > deadline:
            break
        for row in measure(name, case, dtype, limits, timer, device):
            rows.append(row)
            file.add(row)
        torch.cuda.empty_cache()
        measured += 1
    print(table(rows))
    try:
        plot(rows, path.with_suffix(".png"), f"{file.more['gpu']}, {name_of(dtype)}, commit {file.more['commit']}")
    except ImportError:
        print("no plot: expected matplotlib (pip install -e '.[bench]')", file=sys.stderr)
    if measured < len(cases):
        print(f"{measured} of {len(cases)} cases measured in {budget:.0f} s", file=sys.stderr)
    wrong = [row for row in rows if row.correct == "no"]
    for row in wrong:
        print(f"{row.kernel} {row.case} {row.provider}: {row.note}", file=sys.stderr)
    return int(measured < len(cases) or any(row.provider == OURS for row in wrong))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="files of kernels/; all of them")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="a folder; bench/results")
    parser.add_argument("--budget-seconds", type=float, default=480, help="no case begins later; 480")
    options = parser.parse_args(arguments)
    names = kernel_names()
    if unknown := [name for name in options.names if name not in names]:
        parser.error(f"NAME: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print(f"bench.kernels: expected a CUDA device, found none with torch {torch.__version__}", file=sys.stderr)
        return 2
    return run(options.names or names, DTYPES[options.dtype], options.out, options.budget_seconds, GpuTimer())


if __name__ == "__main__":
    sys.exit(main())
