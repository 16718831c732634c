"""Plants each bug of tests/mutants/*.patch in a copy of the repository; the tests must find every one.

    python tests/mutants/run.py [NAME...]

NAME is a patch's name or a part of it; without one all patches are tried, after the tests were seen to pass without
any. The first line of a patch says what is wrong. A line "Tests: PATH..." below it says which tests have to find that,
by default tests/csrc. Exit status 1 if a bug is not found, or a patch does not apply, build or run.
"""

import filecmp
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
COPIED = ["csrc", "examples", "kernels", "pyproject.toml", "setup.py", "tests", "trocr_fast"]
SOURCES = [*runpy.run_path(str(ROOT / "setup.py"))["NAMES"], "kv_memory_no_cuda"]
EXTENSION = f"trocr_fast/_csrc{sysconfig.get_config_var('EXT_SUFFIX')}"
LIMIT_S = 300  # of one run of the tests


class DoesNotBuild(Exception):
    pass


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise DoesNotBuild(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def copy_tree(folder: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, folder / name)


def build(folder: Path, unchanged: Path | None = None) -> None:
    """Compiles csrc without optimisation; takes from `unchanged`, a folder built before, what would be the same."""
    headers = [path.name for path in (folder / "csrc").glob("*.h")]
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    options = ["-std=c++17", "-O0", "-fopenmp", "-Wno-psabi", "-fPIC", "-fvisibility=hidden", *includes]
    objects = []
    for name in SOURCES:
        needed = [f"csrc/{name}.cpp", *(f"csrc/{header}" for header in headers)]
        if unchanged and all(filecmp.cmp(folder / path, unchanged / path, shallow=False) for path in needed):
            objects.append(str(unchanged / f"{name}.o"))
        else:
            run([compiler(), *options, "-c", f"csrc/{name}.cpp", "-o", f"{name}.o"], folder)
            objects.append(f"{name}.o")
    run([compiler(), "-shared", "-pthread", "-fopenmp", *objects, "-o", EXTENSION], folder)


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def failing(folder: Path, tests: list[str]) -> tuple[str, str]:
    """What the tests of a folder say, "green", "red" or "broken", and the first failure."""
    environment = os.environ | {"PYTHONPATH": str(folder), "TROCR_FAST_UNSHRUNK": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--tb=short", *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return "red", f"no end within {LIMIT_S} s"
    if done.returncode == 0:
        return "green", ""
    if done.returncode < 0:
        return "red", f"killed by signal {-done.returncode}"
    failed = re.search(r"^FAILED (?:\S*/)?([^\s\[]+)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or failed is None:
        return "broken", done.stdout[-3000:] + done.stderr[-3000:]
    return "red", failed[1]


def tests_of(patch: str) -> list[str]:
    named = re.search(r"^Tests: (.+)$", patch, re.MULTILINE)
    return named[1].split() if named else ["tests/csrc"]


def try_patch(built: Path, patch: Path) -> tuple[str, float, str]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder)
        try:
            run(["git", "apply", str(patch)], folder)
            build(folder, unchanged=built)
        except DoesNotBuild as error:
            return "broken", time.monotonic() - start, str(error)
        verdict, detail = failing(folder, tests_of(patch.read_text()))
        return verdict, time.monotonic() - start, detail


def main() -> int:
    wanted = sys.argv[1:]
    patches = sorted(Path(__file__).parent.glob("*.patch"))
    chosen = [path for path in patches if not wanted or any(part in path.stem for part in wanted)]
    if not chosen:
        print(f"expected names of patches, found none for {' '.join(wanted)}", file=sys.stderr)
        return 1
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        built = Path(name)
        copy_tree(built)
        build(built)
        where = run([sys.executable, "-c", "import trocr_fast._csrc as m; print(m.__file__)"], built).strip()
        if Path(where) != (built / EXTENSION).resolve():
            print(f"expected to test {built / EXTENSION}, Python imports {where}", file=sys.stderr)
            return 1
        if not wanted:
            start = time.monotonic()
            verdict, detail = failing(built, sorted({test for path in chosen for test in tests_of(path.read_text())}))
            print(f"{'no bug':34} {verdict:6} {time.monotonic() - start:4.0f} s", flush=True)
            if verdict != "green":
                print(detail)
                return 1
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for path, (verdict, took_s, detail) in zip(
                chosen, pool.map(partial(try_patch, built), chosen), strict=True
            ):
                print(f"{path.stem:34} {verdict:6} {took_s:4.0f} s  {detail}", flush=True)
                if verdict != "red":
                    survivors.append(path.stem)
    if survivors:
        print(f"not found: {', '.join(survivors)}")
        return 1
    print(f"all {len(chosen)} bugs found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
