"""Which native part is built: setup.py's reading of the environment."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("setup_script", Path(__file__).parent.parent / "setup.py")
assert spec is not None and spec.loader is not None
setup_script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_script)


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An executable by that name, alone on the PATH."""
    for name in ("TROCR_FAST_CUDA", "TROCR_FAST_CUDA_ARCHITECTURES", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "toolkit" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    return path


def test_nvcc_on_the_path_is_used_unless_it_is_not_wanted(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup_script.find_nvcc() == str(nvcc)
    monkeypatch.setenv("TROCR_FAST_CUDA", "1")
    assert setup_script.find_nvcc() == str(nvcc)
    monkeypatch.setenv("TROCR_FAST_CUDA", "0")
    assert setup_script.find_nvcc() is None


def test_cuda_home_comes_before_the_path(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert setup_script.find_nvcc() is None
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    assert setup_script.find_nvcc() == str(nvcc)


def test_cuda_that_is_wanted_and_missing_is_an_error(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TROCR_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="expected nvcc in CUDA_HOME/bin or on PATH, found none"):
        setup_script.find_nvcc()
    monkeypatch.setenv("TROCR_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="TROCR_FAST_CUDA: expected 0 or 1, got 'yes'"):
        setup_script.find_nvcc()


def test_architectures(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [code for code in setup_script.architectures() if code != "-gencode"]
    assert codes == [
        *(f"arch=compute_{name},code=sm_{name}" for name in ("80", "86", "89", "90")),
        "arch=compute_90,code=compute_90",
    ]
    monkeypatch.setenv("TROCR_FAST_CUDA_ARCHITECTURES", "90a")
    assert setup_script.architectures()[1::2] == ["arch=compute_90a,code=sm_90a", "arch=compute_90a,code=compute_90a"]
    monkeypatch.setenv("TROCR_FAST_CUDA_ARCHITECTURES", "hopper")
    with pytest.raises(SystemExit, match="expected numbers such as 80;90, got 'hopper'"):
        setup_script.architectures()


def test_the_runtime_is_looked_for_where_nvcc_lives(nvcc: Path) -> None:
    assert setup_script.runtime_folders(str(nvcc)) == []
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={nvcc.parent}/..' >&2\n")
    assert setup_script.runtime_folders(str(nvcc)) == []
    (nvcc.parent.parent / "lib64").mkdir()
    (nvcc.parent.parent / "lib64" / "libcudart_static.a").touch()
    assert setup_script.runtime_folders(str(nvcc)) == [f"{nvcc.parent}/../lib64"]
