"""What is installed works away from the repository, and the folder `kernels` does not get in transformers' way."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_is_no_package_of_its_own() -> None:
    # transformers asks for a package `kernels` and imports what it finds; one of ours would break it.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "trocr_fast" / "kernels").is_symlink()
    assert os.readlink(ROOT / "trocr_fast" / "kernels") == "../kernels"


def test_transformers_imports_beside_our_kernels() -> None:
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "from transformers import TrOCRForCausalLM, ViTModel, DeiTModel, VisionEncoderDecoderModel\n"
        "from trocr_fast.kernels.add_layernorm import add_layernorm\n"
        "assert 'kernels.add_layernorm' not in sys.modules\n"
    )
    run("-c", script, cwd=ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel made from the source distribution, as someone far away would make it."""
    folder = tmp_path_factory.mktemp("dist")
    build = "import sys; from setuptools import build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
    run("-c", build, "sdist", folder, cwd=ROOT)
    [sdist] = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    run("-c", build, "wheel", folder, cwd=unpacked)
    [wheel] = folder.glob("*.whl")
    return wheel


def test_wheel_holds_everything(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trocr_fast").glob("*.py")}
    here |= {f"trocr_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    here |= {f"trocr_fast/builtin/{path.name}" for path in (ROOT / "trocr_fast" / "builtin").iterdir()}
    assert here <= names, here - names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "examples/", "bench/"))]


def test_wheel_reads_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    sample = ROOT / "examples" / "lines" / "total.png"
    script = (
        "import trocr_fast, sys; sys.argv[0] = 'x'; from trocr_fast.cli import main; print(trocr_fast.__file__); main()"
    )
    out = run("-c", script, "read", sample, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    where, row = out.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert row.startswith(f"{sample}\t")
