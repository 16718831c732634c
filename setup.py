"""The C++/CUDA extension `trocr_fast._csrc`; everything else about the package is in pyproject.toml.

Settings, as environment variables:
    TROCR_FAST_CUDA              1: build the CUDA part, an error without nvcc. 0: don't. Unset: if nvcc is there.
    TROCR_FAST_CUDA_ARCHITECTURES  by default "80;86;89;90": compute capabilities; the last one is kept as PTX too.
    CUDA_HOME                    where bin/nvcc is looked for before PATH.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pybind11
from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

NAMES = (
    "block_allocator",
    "paged_cache",
    "kv_memory_cpu",
    "paged_attention",
    "encoder_attention",
    "latent_cross_attention",
    "attention_bindings",
    "bindings",
)
SOURCES = [f"csrc/{name}.cpp" for name in NAMES]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror", "-isystem", pybind11.get_include()]
# psabi: how a call passes vectors, of which there is none, since all that takes one is inlined
OPTIONS = ["-O3", "-fopenmp", "-Wno-psabi", *WARNINGS]


def find_nvcc() -> str | None:
    """Path of nvcc, or None if the CUDA part is not to be built."""
    wanted = os.environ.get("TROCR_FAST_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"TROCR_FAST_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        raise SystemExit("TROCR_FAST_CUDA=1: expected nvcc in CUDA_HOME/bin or on PATH, found none")
    return nvcc


def runtime_folders(nvcc: str) -> list[str]:
    """Where this nvcc keeps libcudart_static.a, if not where the linker looks anyway.

    nvcc says where it lives, since what is on the PATH may be a script that calls the real one.
    """
    shown = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = [line.removeprefix("#$ TOP=") for line in shown.splitlines() if line.startswith("#$ TOP=")]
    parts = (("lib64",), ("lib",), ("targets", f"{platform.machine()}-linux", "lib"))
    folders = [Path(top, *part) for top in tops for part in parts]
    return [str(folder) for folder in folders if (folder / "libcudart_static.a").exists()]


def architectures() -> list[str]:
    """-gencode options: machine code for each architecture, and PTX of the last for newer chips."""
    value = os.environ.get("TROCR_FAST_CUDA_ARCHITECTURES", "80;86;89;90")
    names = [name.strip() for name in value.split(";")]
    if not all(name.removesuffix("a").isdigit() for name in names):
        raise SystemExit(f"TROCR_FAST_CUDA_ARCHITECTURES: expected numbers such as 80;90, got {value!r}")
    codes = [f"arch=compute_{name},code=sm_{name}" for name in names]
    codes.append(f"arch=compute_{names[-1]},code=compute_{names[-1]}")
    return [option for code in codes for option in ("-gencode", code)]


class BuildExtension(build_ext):
    """Compiles the .cu file with nvcc, which setuptools does not know, and links it with the rest."""

    def build_extension(self, extension: Pybind11Extension) -> None:
        # setuptools compares the sources' times alone: not the headers', and not which of the two builds is wanted
        self.force = True
        nvcc = find_nvcc()
        if nvcc is None:
            extension.sources.append("csrc/kv_memory_no_cuda.cpp")
            print("building trocr_fast._csrc: CPU only")
        else:
            folder = Path(self.build_temp)
            folder.mkdir(parents=True, exist_ok=True)
            compiled = folder / "kv_memory_cuda.o"
            options = ["-std=c++17", "-O3", "-cudart", "static", "--threads", "0", "-Werror", "all-warnings"]
            host = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Werror"]
            print("building trocr_fast._csrc: CUDA")
            command = [nvcc, *options, *host, *architectures(), "-c", "csrc/kv_memory_cuda.cu", "-o", str(compiled)]
            if subprocess.run(command).returncode != 0:
                raise SystemExit(
                    f"{nvcc} failed, see above: TROCR_FAST_CUDA_ARCHITECTURES chooses the chips, "
                    "TROCR_FAST_CUDA=0 builds for the CPU alone"
                )
            extension.extra_objects.append(str(compiled))
            extension.library_dirs += runtime_folders(nvcc)
            extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
        super().build_extension(extension)


if __name__ == "__main__":
    extension = Pybind11Extension(
        "trocr_fast._csrc", SOURCES, cxx_std=17, extra_compile_args=OPTIONS, extra_link_args=["-fopenmp"]
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
