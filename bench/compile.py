"""Compiles the device code with no GPU and shows what it uses: `python -m bench.compile`.

For each kernel of csrc and each of sm_80 and sm_90: registers a thread, spilled bytes, static shared memory. Exits 1 if
anything spills or does not compile, and says so if there is no nvcc.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench import report

ARCHITECTURES = ("80", "90")
SOURCE = report.ROOT / "csrc" / "kv_memory_cuda.cu"


class Usage(NamedTuple):
    """What ptxas says of one kernel."""

    architecture: str
    kernel: str
    registers: int
    spilled: int  # bytes stored and loaded
    shared: int  # bytes


def compile_csrc(nvcc: str) -> list[Usage]:
    """Every kernel of csrc for every architecture. Raises CalledProcessError with nvcc's words in `stderr`."""
    targets = [option for arch in ARCHITECTURES for option in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "--resource-usage", "-Werror", "all-warnings", *targets]
        command += ["-c", str(SOURCE), "-o", str(Path(folder) / "out.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return list(parse(done.stderr + done.stdout))


def parse(text: str) -> list[Usage]:
    """ptxas' lines, three a kernel, as rows."""
    found = []
    pattern = (
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'"
        r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
        r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
    )
    for match in re.finditer(pattern, text, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spilled = int(match["stores"]) + int(match["loads"])
        name = demangled(match["name"])
        found.append(Usage(match["arch"], name, int(match["registers"]), spilled, int(shared[1]) if shared else 0))
    return found


def demangled(name: str) -> str:
    """The function's own name and its template argument, without namespaces and parameters."""
    done = subprocess.run(["c++filt", name], capture_output=True, text=True)
    short = re.search(r"(\w+_kernel(?:<[^>]*>)?)\(", done.stdout)
    return short[1] if short else name


def main() -> int:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("no nvcc on PATH: the CUDA part of csrc was not compiled")
        return 0
    try:
        usages = compile_csrc(nvcc)
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        return 1
    print(f"{'kernel':<32}{'sm':>4}{'registers':>11}{'spilled':>9}{'shared':>8}")
    for usage in sorted(usages, key=lambda usage: (usage.kernel, usage.architecture)):
        print(f"{usage.kernel:<32}{usage.architecture:>4}{usage.registers:>11}{usage.spilled:>9}{usage.shared:>8}")
    spilling = [usage for usage in usages if usage.spilled]
    if spilling or not usages:
        print(f"expected kernels without spills, got {len(usages)} kernels, {len(spilling)} with", file=sys.stderr)
    return int(bool(spilling) or not usages)


if __name__ == "__main__":
    sys.exit(main())
