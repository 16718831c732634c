"""Compiles the device code with no GPU and shows what it uses: `python -m bench.compile [NAME...] [--hot]`.

Every Triton kernel for every real shape (`cases()`) in bf16 and fp32, and the CUDA kernels of csrc, for sm_80 and
sm_90: registers a thread, bytes on the stack (what spills), shared memory. Exits 1 if anything does not compile,
or spills and is not listed in SPILLING with a reason. `--hot` takes the first case of each kernel, in bf16 for sm_90
alone.

Triton compiles as for a launch, so what it leaves in its cache is what a launch of these cases looks for.
`--native --jobs N` fills that cache for the GPU of this machine, in N processes.
"""

import argparse
import importlib
import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench import report

ARCHITECTURES = (80, 90)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CUDA_SOURCE = report.ROOT / "csrc" / "kv_memory_cuda.cu"
SPILLING: dict[str, str] = {}  # kernel: why it may spill


class Usage(NamedTuple):
    """What the assembler says of one kernel."""

    kernel: str
    case: str
    architecture: int
    registers: int
    stack: int  # bytes; what spilled
    shared: int  # bytes


def kernel_names() -> list[str]:
    """The files of kernels/ that hold a kernel."""
    return sorted(path.stem for path in (report.ROOT / "kernels").glob("*.py") if path.stem != "launch")


class Task(NamedTuple):
    """One case of a kernel, for one architecture."""

    kernel: str
    case: int
    dtype: str
    architecture: int


class Absent:
    """In place of Triton's driver: a device of an architecture, whether it is there or not."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps what it compiled by the device's number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def tasks(names: list[str], dtypes: list[str], architectures: list[int], hot: bool) -> Iterator[Task]:
    """Every case, or the first one, of every kernel."""
    for name in names:
        for case in range(1 if hot else len(_file(name).cases())):
            for dtype in dtypes:
                yield from (Task(name, case, dtype, architecture) for architecture in architectures)


def compile_triton(task: Task) -> list[Usage]:
    """All launches of a case."""
    module, dtype = _file(task.kernel), DTYPES[task.dtype]
    case = module.cases()[task.case]
    text = f"{case} {str(dtype).removeprefix('torch.')}"
    return [
        Usage(launch.kernel.__name__, text, task.architecture, *compiled(launch, task.architecture))
        for launch in module.launches(*module.inputs(case, dtype, "meta"))
    ]


def _file(name: str) -> Any:
    return importlib.import_module(f"trocr_fast.kernels.{name}")


def build(launch: Any) -> Any:
    """What Triton makes of a launch for the device of its driver; it is not launched."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return launch.kernel.warmup(**launch.arguments, **launch.constants, **options, grid=launch.grid)


def compiled(launch: Any, architecture: int) -> tuple[int, int, int]:
    """Registers, stack bytes and shared bytes of a launch on an architecture."""
    driver.set_active(Absent(architecture))
    built = build(launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", shown)[0]) for name in ("REG", "STACK"))
    return registers, stack, built.metadata.shared


def compile_csrc(nvcc: str) -> Iterator[Usage]:
    """Every CUDA kernel of csrc. Raises CalledProcessError with nvcc's words in `stderr`."""
    targets = [option for arch in ARCHITECTURES for option in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "--resource-usage", "-Werror", "all-warnings", *targets]
        command += ["-c", str(CUDA_SOURCE), "-o", str(Path(folder) / "out.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    pattern = (
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)\w*'"
        r".*?(?P<stack>\d+) bytes stack frame"
        r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
    )
    for match in re.finditer(pattern, done.stderr + done.stdout, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        numbers = int(match["arch"]), int(match["registers"]), int(match["stack"]), int(shared[1]) if shared else 0
        yield Usage(*_demangled(match["name"]), *numbers)


def _demangled(name: str) -> tuple[str, str]:
    """The function's own name and its template argument."""
    done = subprocess.run(["c++filt", name], capture_output=True, text=True)
    short = re.search(r"(\w+_kernel)(?:<([^>]*)>)?\(", done.stdout)
    return (short[1], short[2] or "") if short else (name, "")


def usages(todo: list[Task], jobs: int, csrc: bool) -> Iterator[Usage]:
    """Of the kernels, in `jobs` processes, then of csrc."""
    if jobs > 1:
        # spawned: a process that has used a GPU must not be forked
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            for found in pool.map(compile_triton, todo):
                yield from found
    else:
        for task in todo:
            yield from compile_triton(task)
    nvcc = shutil.which("nvcc")
    if csrc and nvcc is not None:
        yield from compile_csrc(nvcc)
    elif csrc:
        print("no nvcc on PATH: the CUDA part of csrc was not compiled")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="files of kernels/; all of them")
    parser.add_argument("--hot", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; bf16 and fp32")
    parser.add_argument("--native", action="store_true", help="for the GPU of this machine, and without csrc")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes; 1")
    arguments = parser.parse_args()
    names, dtypes = arguments.names or kernel_names(), arguments.dtype or ["bf16", "fp32"]
    architectures = list(ARCHITECTURES)
    if arguments.hot:
        dtypes, architectures = arguments.dtype or dtypes[:1], architectures[-1:]
    if arguments.native:
        if not torch.cuda.is_available():
            print("--native: expected a CUDA device, found none", file=sys.stderr)
            return 2
        major, minor = torch.cuda.get_device_capability()
        architectures = [10 * major + minor]
    todo = list(tasks(names, dtypes, architectures, arguments.hot))
    print(f"{'kernel':<26}{'case':<34}{'sm':>4}{'registers':>11}{'stack':>7}{'shared':>8}")
    count, spilling = 0, []
    try:
        for usage in usages(todo, arguments.jobs, csrc=not (arguments.names or arguments.native)):
            count += 1
            print(
                f"{usage.kernel:<26}{usage.case:<34}{usage.architecture:>4}{usage.registers:>11}"
                f"{usage.stack:>7}{usage.shared:>8}",
                flush=True,
            )
            if usage.stack and usage.kernel not in SPILLING:
                spilling.append(usage)
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        return 1
    for usage in spilling:
        print(f"{usage.kernel} {usage.case} sm_{usage.architecture}: {usage.stack} bytes spill", file=sys.stderr)
    if not count:
        print("expected kernels to compile, found none", file=sys.stderr)
    return int(bool(spilling) or not count)


if __name__ == "__main__":
    sys.exit(main())
