"""Compiles the device code with no GPU and shows what it uses: `python -m bench.compile [NAME...] [--hot]`.

Every Triton kernel for every real shape (`cases()`) in bf16 and fp32, and the CUDA kernels of csrc, for sm_80 and
sm_90: registers a thread, bytes on the stack (what spills), shared memory. Exits 1 if anything does not compile,
or spills and is not listed in SPILLING with a reason. `--hot` takes the first case of each kernel, in bf16 for sm_90
alone.
"""

import argparse
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import report

ARCHITECTURES = (80, 90)
DTYPES = (torch.bfloat16, torch.float32)
CUDA_SOURCE = report.ROOT / "csrc" / "kv_memory_cuda.cu"
SPILLING: dict[str, str] = {}  # kernel: why it may spill

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


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


def compile_triton(name: str, hot: bool) -> Iterator[Usage]:
    """Every kernel of a file for every case, dtype and architecture."""
    module = importlib.import_module(f"trocr_fast.kernels.{name}")
    for case in module.cases()[:1] if hot else module.cases():
        for dtype in DTYPES[:1] if hot else DTYPES:
            for launch in module.launches(*module.inputs(case, dtype, "meta")):
                for architecture in ARCHITECTURES[-1:] if hot else ARCHITECTURES:
                    text = f"{case} {str(dtype).removeprefix('torch.')}"
                    yield Usage(launch.kernel.__name__, text, architecture, *compiled(launch, architecture))


def compiled(launch: Any, architecture: int) -> tuple[int, int, int]:
    """Registers, stack bytes and shared bytes of a launch on an architecture."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    for place, parameter in enumerate(launch.kernel.arg_names):
        if parameter in launch.constants:
            signature[parameter] = "constexpr"
            continue
        value = launch.arguments[parameter]
        if value is None or (isinstance(value, int) and value == 1):  # as Triton itself specialises
            signature[parameter], constants[parameter] = "constexpr", value
            continue
        divisible = not isinstance(value, float)
        if isinstance(value, Tensor):
            signature[parameter] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[parameter] = "fp32"
        else:
            signature[parameter] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(found[1]) for found in (re.search(r"REG:(\d+)", shown), re.search(r"STACK:(\d+)", shown)))
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


def usages(names: list[str], hot: bool) -> Iterator[Usage]:
    """Of the files named, or of everything."""
    for name in names or kernel_names():
        yield from compile_triton(name, hot)
    if names:
        return
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        yield from compile_csrc(nvcc)
    else:
        print("no nvcc on PATH: the CUDA part of csrc was not compiled")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="files of kernels/; all of them")
    parser.add_argument("--hot", action="store_true")
    arguments = parser.parse_args()
    print(f"{'kernel':<26}{'case':<34}{'sm':>4}{'registers':>11}{'stack':>7}{'shared':>8}")
    count, spilling = 0, []
    try:
        for usage in usages(arguments.names, arguments.hot):
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
