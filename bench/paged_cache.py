"""The paged KV cache against its rivals: `python -m bench.paged_cache`. Results: bench/results/paged_cache.json.

host    µs of a step's bookkeeping for 256 rows, against a block manager in plain Python
beam    µs of a beam step (64 lines of 4 beams) at growing lengths: ours (reserve, permute, block copies), the same
        bookkeeping in plain Python, and dense keys and values reordered with index_select, as transformers does;
        and the bytes that are copied
today   µs a layer and step of appending and reading on this device: paged (write, gather) against a dense tensor
device  GB/s of write, block copy and swap, on a GPU; memory is read and written once, so both count
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench import report
from trocr_fast import _csrc
from trocr_fast.paged_cache import PagedKV, StepBuffers

LINES, BEAMS = 64, 4
ROWS = LINES * BEAMS
LAYERS, HEADS, HEAD_DIM = 12, 16, 64  # base and large
BLOCK_SIZES = (1, 2, 4, 8, 16)
STEPS = 30


def micros(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median, 20th and 80th percentile of a call, in µs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        work()
        times.append((time.perf_counter_ns() - start) / 1e3)
    low, median, high = np.percentile(times, [20, 50, 80])
    return {"median": round(median, 2), "p20": round(low, 2), "p80": round(high, 2)}


class PythonCache:
    """The same bookkeeping in plain Python: the rival, written as one would without a native part."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.free = list(range(num_blocks - 1, -1, -1))
        self.references = [0] * num_blocks
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def add(self) -> int:
        sequence = len(self.tables)
        self.tables[sequence], self.lengths[sequence] = [], 0
        return sequence

    def fork(self, parent: int) -> int:
        child = self.add()
        self.tables[child], self.lengths[child] = list(self.tables[parent]), self.lengths[parent]
        for block in self.tables[child]:
            self.references[block] += 1
        return child

    def _allocate(self) -> int:
        block = self.free.pop()
        self.references[block] = 1
        return block

    def _release(self, block: int) -> None:
        self.references[block] -= 1
        if self.references[block] == 0:
            self.free.append(block)

    def reserve(self, sequences: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        slots, copies = [], []
        for sequence in sequences:
            table, length = self.tables[sequence], self.lengths[sequence]
            if length % self.block_size == 0:
                table.append(self._allocate())
            elif self.references[table[-1]] > 1:
                own = self._allocate()
                copies.append((table[-1], own))
                self._release(table[-1])
                table[-1] = own
            slots.append(table[-1] * self.block_size + length % self.block_size)
            self.lengths[sequence] = length + 1
        return slots, copies

    def permute(self, sequences: list[int], parents: list[int]) -> None:
        tables = [list(self.tables[sequences[parent]]) for parent in parents]
        lengths = [self.lengths[sequences[parent]] for parent in parents]
        for table in tables:
            for block in table:
                self.references[block] += 1
        for sequence, table, length in zip(sequences, tables, lengths, strict=True):
            for block in self.tables[sequence]:
                self._release(block)
            self.tables[sequence], self.lengths[sequence] = table, length


def beam_parents(rng: np.random.Generator) -> np.ndarray:
    """Parents of one step, int64 [rows]: each beam goes on from some beam of its own line."""
    first = np.repeat(np.arange(LINES) * BEAMS, BEAMS)
    return first + rng.integers(0, BEAMS, ROWS)


def host() -> dict[str, Any]:
    """Bookkeeping of one greedy step for 256 rows."""
    found = {}
    for block_size in BLOCK_SIZES:
        cache = _csrc.PagedCache(ROWS * 512, block_size, 512)
        python = PythonCache(ROWS * 512, block_size)
        rows = np.array([cache.add() for _ in range(ROWS)])
        python_rows = [python.add() for _ in range(ROWS)]
        tables, lengths = np.zeros((ROWS, 512), np.int32), np.zeros(ROWS, np.int32)
        buffers, slots = StepBuffers(ROWS, 512, torch.device("cpu")), np.zeros(ROWS, np.int64)
        found[block_size] = {
            "reserve": micros(lambda c=cache, r=rows: c.reserve(r), 300),
            "fill_tables": micros(lambda c=cache, r=rows, t=tables, n=lengths: c.fill_tables(r, t, n), 300),
            "step_buffers": micros(lambda b=buffers, c=cache, r=rows, s=slots: b.fill(c, r, s), 300),
            "python_reserve": micros(lambda p=python, r=python_rows: p.reserve(r), 300),
        }
    return found


def beam(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A beam step at lengths 1 to STEPS, medians over the lengths; the bytes are sums over all steps and all layers."""
    found: dict[str, Any] = {}
    token_bytes = LAYERS * 2 * HEADS * HEAD_DIM * dtype.itemsize
    for block_size in BLOCK_SIZES:
        rng = np.random.default_rng(1)
        kv = PagedKV(LAYERS, HEADS, HEAD_DIM, 4 * ROWS * STEPS // block_size, STEPS, dtype, device, block_size)
        python = PythonCache(4 * ROWS * STEPS // block_size, block_size)
        firsts = [kv.cache.add() for _ in range(LINES)]
        rows = np.array(
            [beam for first in firsts for beam in [first, *(kv.cache.fork(first) for _ in range(BEAMS - 1))]]
        )
        python_rows = [python.add() for _ in range(ROWS)]
        times: dict[str, list[float]] = {"bookkeeping": [], "python_bookkeeping": [], "with_copies": []}
        copied = 0
        for _ in range(STEPS):
            parents = beam_parents(rng)
            start = time.perf_counter_ns()
            kv.cache.permute(rows, parents)
            _, pairs = kv.cache.reserve(rows)
            times["bookkeeping"].append((time.perf_counter_ns() - start) / 1e3)
            if len(pairs):
                kv.copy_blocks(torch.from_numpy(pairs))
            synchronize(device)
            times["with_copies"].append((time.perf_counter_ns() - start) / 1e3)
            copied += len(pairs) * block_size * token_bytes
            listed = parents.tolist()
            start = time.perf_counter_ns()
            python.permute(python_rows, listed)
            python.reserve(python_rows)
            times["python_bookkeeping"].append((time.perf_counter_ns() - start) / 1e3)
        found[f"block_size_{block_size}"] = {
            **{name: round(statistics.median(values), 1) for name, values in times.items()},
            "copied_mb": round(copied / 1e6, 2),
        }
    found["dense_index_select"] = dense_beam(device, dtype)
    return found


def dense_beam(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What transformers does at a beam step: every layer's keys and values are put in the order of the parents."""
    rng = np.random.default_rng(1)
    times, copied = [], 0
    for length in range(1, STEPS + 1):
        shape = (ROWS, HEADS, length, HEAD_DIM)
        sides = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * LAYERS)]
        parents = torch.from_numpy(beam_parents(rng)).to(device)
        synchronize(device)
        start = time.perf_counter_ns()
        sides = [side.index_select(0, parents) for side in sides]
        synchronize(device)
        times.append((time.perf_counter_ns() - start) / 1e3)
        copied += sum(side.nbytes for side in sides)
    return {"median": round(statistics.median(times), 1), "copied_mb": round(copied / 1e6, 2)}


def today(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Appending one token a row and reading all, one layer: paged against a dense tensor of fixed room."""
    found = {}
    for rows in (1, 8, 32):
        for length in (20, 200):
            times = {f"paged_{size}": paged_step(rows, length, size, device, dtype) for size in (1, 16)}
            found[f"rows_{rows}_tokens_{length}"] = {**times, "dense": dense_step(rows, length, device, dtype)}
    return found


def paged_step(rows: int, length: int, block_size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Median µs of a write and a gather."""
    k = torch.randn(rows, HEADS, HEAD_DIM, dtype=dtype, device=device)
    out = torch.empty(rows, HEADS, length, HEAD_DIM, dtype=dtype, device=device)
    kv = PagedKV(1, HEADS, HEAD_DIM, rows * length, length, dtype, device, block_size)
    sequences = np.array([kv.cache.add() for _ in range(rows)])
    slots = torch.from_numpy(kv.reserve(sequences, length).reshape(rows, length)[:, -1].copy()).to(device)
    tables, lengths = np.zeros((rows, kv.cache.max_blocks), np.int32), np.zeros(rows, np.int32)
    kv.cache.fill_tables(sequences, tables, lengths)
    block_tables, context_lens = (torch.from_numpy(array).to(device) for array in (tables, lengths))

    def step() -> None:
        kv.write(0, k, k, slots)
        kv.gather(0, block_tables, context_lens, out, out)
        synchronize(device)

    return micros(step, 50)["median"]


def dense_step(rows: int, length: int, device: torch.device, dtype: torch.dtype) -> float:
    """Median µs of writing into the dense tensor, of which attention can read a view."""
    k = torch.randn(rows, HEADS, HEAD_DIM, dtype=dtype, device=device)
    cache = torch.zeros(2, rows, HEADS, length, HEAD_DIM, dtype=dtype, device=device)

    def step() -> None:
        cache[0][:, :, length - 1], cache[1][:, :, length - 1] = k, k
        synchronize(device)

    return micros(step, 50)["median"]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def device_rates(dtype: torch.dtype) -> dict[str, Any]:
    """GB/s on a GPU, by CUDA events around ten launches each, far more bytes than its L2 holds."""
    device = torch.device("cuda")
    num_slots, num_moved = 65536, 4096
    kv = PagedKV(LAYERS, HEADS, HEAD_DIM, num_slots, num_slots, dtype, device, 1)
    block_bytes = kv.memory[0].numel() * dtype.itemsize

    def seconds(work: Callable[[], object], launches: int = 10, repeats: int = 7) -> float:
        work()
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(launches):
                work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / launches)
        return statistics.median(times)

    order = torch.randperm(num_slots, device=device)
    k, v = (torch.randn(num_slots, HEADS, HEAD_DIM, dtype=dtype, device=device) for _ in range(2))
    pairs = order[: 2 * num_moved].int().view(num_moved, 2).contiguous()
    neighbours = np.arange(num_moved, dtype=np.int32)
    shuffled = order[:num_moved].int().cpu().numpy()
    host = torch.empty((num_moved, *kv.memory.shape[1:]), dtype=dtype, pin_memory=True)
    memory = _csrc.KVMemory(kv.memory)
    stream = torch.cuda.current_stream().cuda_stream
    plain = torch.empty_like(kv.memory[:num_moved])
    moved = {
        "write": (2 * (k.nbytes + v.nbytes), lambda: memory.write(0, k, v, order, stream)),
        "copy_blocks": (2 * num_moved * block_bytes, lambda: memory.copy_blocks(pairs, stream)),
        "torch_copy": (2 * num_moved * block_bytes, lambda: plain.copy_(kv.memory[:num_moved])),
        "swap_out_neighbours": (num_moved * block_bytes, lambda: memory.swap_out(neighbours, host, stream)),
        "swap_out_shuffled": (num_moved * block_bytes, lambda: memory.swap_out(shuffled, host, stream)),
        "swap_in_neighbours": (num_moved * block_bytes, lambda: memory.swap_in(neighbours, host, stream)),
    }
    return {name: round(num_bytes / seconds(work) / 1e9, 1) for name, (num_bytes, work) in moved.items()}


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.set_num_threads(1)
    measurements: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "build": _csrc.BUILD,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": ROWS,
        "host_us": host(),
        "beam_us": beam(device, dtype),
        "today_us": today(device, dtype),
    }
    if on_gpu and _csrc.BUILD == "cuda":
        measurements["device_gb_s"] = device_rates(dtype)
    path = report.write("paged_cache_gpu" if on_gpu else "paged_cache", measurements)
    print(path.read_text())


if __name__ == "__main__":
    main()
