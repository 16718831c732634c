"""The microbenchmark of the kernels: that what it compares is the same, and what it makes of the times."""

import csv
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime import driver

from bench import kernels
from bench.compile import Absent, build, kernel_names
from bench.kernel_results import OURS, CsvFile, Row, plot, results, table
from bench.kernels import Ceilings, GpuTimer, Timing, case_text, error_of, floor_of, measure, more_precise
from bench.rivals import RIVALS
from trocr_fast.kernels.launch import Work

# Cases as each kernel's own, but tiny.
TINY: dict[str, tuple] = {
    "add_layernorm": (5, 40),
    "beam_topk": (2, 3, 4, 50),
    "bias_gelu": (5, 24, "gelu"),
    "cross_attention": (3, 2, 2, 16, 19),
    "encoder_attention": (2, 19, 2, 16),
    "latent_cross_attention": (3, 2, 2, 24, 19),
    "linear_activation": (5, 24, 40, "gelu"),
    "linear_persistent": (5, 24, 40, "relu"),
    "lm_head": (3, 50, 24),
    "paged_attention": (6, 2, 16, 7, 2, 2),
    "pixels_to_patches": (2, 3, 20, 37, (4, 8)),
    "skinny_linear": (1, 40, 24, "gelu"),
}
LIMITS = Ceilings(bytes_s=4e12, flop_s=8e14)


def tiny(name: str) -> tuple:
    kind = type(importlib.import_module(f"trocr_fast.kernels.{name}").cases()[0])
    return kind(*TINY[name]) if hasattr(kind, "_fields") else TINY[name]


def calls_once(work: Callable[[], Any]) -> Timing:
    """A timer that takes no time: 10 µs for everything."""
    work()
    return Timing(10.0, 9.0, 12.0, "made up")


def test_every_kernel_has_rivals_and_a_tiny_case() -> None:
    assert sorted(RIVALS) == sorted(TINY) == kernel_names()


@pytest.mark.parametrize("name", TINY)
def test_ours_and_the_rivals_give_the_result_of_the_reference(name: str) -> None:
    with torch.compiler.set_stance("force_eager"):  # what is compiled, not how: a compiler takes seconds a function
        rows = list(measure(name, tiny(name), torch.float32, LIMITS, calls_once, device="cpu"))
    assert rows[0].provider == OURS
    assert len(rows) > 1, "no rival ran"
    assert [(row.provider, row.note) for row in rows if row.correct != "yes"] == []
    assert all(row.timed and row.kernel == name and row.dtype == "fp32" for row in rows)


@pytest.mark.parametrize("name", ["lm_head", "beam_topk"])
def test_rivals_choose_the_indices_of_the_reference(name: str) -> None:
    """`measure` compares what they point at, since in half precision several are equal."""
    module = importlib.import_module(f"trocr_fast.kernels.{name}")
    arguments = module.inputs(tiny(name), torch.float32, "cpu")
    place = {"lm_head": 0, "beam_topk": 1}[name]
    with torch.compiler.set_stance("force_eager"):
        for call in RIVALS[name](*arguments).values():
            assert torch.equal(call()[place], module.reference(*arguments)[place])


@pytest.mark.parametrize("provider", ["gather + sdpa math", "gather + matmul + softmax + matmul"])
def test_rivals_of_paged_attention_store_the_new_token(provider: str) -> None:
    """Which `measure` does not see, since ours has stored it before."""
    module = importlib.import_module("trocr_fast.kernels.paged_attention")
    arguments = module.inputs(tiny("paged_attention"), torch.float32, "cpu")
    _, k, v, memory, layer, *_, slots = arguments
    expected = memory.clone()
    for row, slot in enumerate(slots.tolist()):
        block, offset = divmod(slot, memory.shape[3])
        expected[block, layer, 0, offset], expected[block, layer, 1, offset] = k[row], v[row]
    assert not torch.equal(memory.nan_to_num(), expected.nan_to_num())
    RIVALS["paged_attention"](*arguments)[provider]()
    torch.testing.assert_close(memory, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", TINY)
def test_a_wrong_result_is_seen(name: str) -> None:
    """One element of one output that is off, or was never written."""
    module = importlib.import_module(f"trocr_fast.kernels.{name}")
    arguments = module.inputs(tiny(name), torch.float32, "cpu")
    expected = kernels.as_list(module.reference(*map(more_precise, arguments)))
    assert error_of(name, arguments, module.reference(*arguments), tuple(expected)) < 1e-6
    for place, output in enumerate(expected):
        poison = (
            [math.nan, 2.0 + output.max().item()] if output.is_floating_point() else [-1, torch.iinfo(torch.int64).min]
        )
        if name == "lm_head" and place == 0:
            poison.append((int(output.flatten()[-1]) + 1) % 50)  # another token
        for value in poison:
            wrong = [one.clone() for one in expected]
            wrong[place].view(-1)[-1] = value
            assert not error_of(name, arguments, tuple(wrong), tuple(expected)) <= 1e-3


def test_wrong_results_get_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("trocr_fast.kernels.bias_gelu")
    monkeypatch.setattr(module, "bias_gelu", lambda x, bias, activation, out=None: torch.zeros_like(x))

    def fails(x: torch.Tensor, bias: torch.Tensor, activation: str) -> dict[str, Callable[[], Any]]:
        def refuse() -> None:
            raise RuntimeError("No available kernel. Aborting execution.")

        def break_down() -> None:
            raise ValueError("out of order\nand more")

        return {"right": lambda: module.reference(x, bias, activation), "refuses": refuse, "fails": break_down}

    monkeypatch.setitem(RIVALS, "bias_gelu", fails)
    rows = {
        row.provider: row
        for row in measure("bias_gelu", tiny("bias_gelu"), torch.float32, LIMITS, calls_once, device="cpu")
    }
    assert list(rows) == [OURS, "right", "fails"]
    assert [row.correct for row in rows.values()] == ["no", "yes", "no"]
    assert [row.timed for row in rows.values()] == [False, True, False]
    assert "error 1, allowed 1e-05" in rows[OURS].note
    assert rows["fails"].note == "ValueError: out of order"


def test_floor_is_the_larger_of_bytes_and_operations() -> None:
    limits = Ceilings(bytes_s=1e12, flop_s=1e14)
    x = torch.ones(2, 2)

    def bare_product(work: Callable[[], Any]) -> Timing:
        assert torch.equal(work(), x @ x.T)
        return Timing(7.0, 7.0, 7.0, "made up")

    never: Any = None
    assert floor_of("add_layernorm", (x,), Work(5_000_000, 100), limits, never) == (5.0, "memory")
    assert floor_of("encoder_attention", (x,), Work(100, 600_000_000), limits, never) == (6.0, "arithmetic")
    # of a product the library's rate at that shape, where arithmetic bounds it; never less than its bytes take
    assert floor_of("lm_head", (x, x), Work(100, 600_000_000), limits, bare_product) == (7.0, "arithmetic")
    assert floor_of("lm_head", (x, x), Work(5_000_000, 100), limits, never) == (5.0, "memory")


ROWS = [
    Row("ceiling", "copy of 8 bytes", "bf16", "torch", 1.0, 1.0, 1.0, gb_s=4300.0, timing="graph"),
    Row("lm_head", "64 50265 1024", "bf16", OURS, 30.0, 29.0, 31.0, 3400.0, 220.0, 24.0, 0.8, "memory", "yes", "graph"),
    Row(
        "lm_head", "64 50265 1024", "bf16", "slow", 90.0, 89.0, 91.0, 1100, 70.0, 24.0, 0.267, "memory", "yes", "graph"
    ),
    Row("lm_head", "64 50265 1024", "bf16", "fast", 60.0, 59.0, 61.0, 1700, 110.0, 24.0, 0.4, "memory", "yes", "graph"),
    Row(
        "bias_gelu", "1 4096 gelu", "bf16", OURS, floor_us=0.004, bound="memory", correct="no", note="error 1, so wrong"
    ),
    Row("bias_gelu", "1 4096 gelu", "bf16", "torch.compile", 2.0, 2.0, 2.0, 8.0, 0.1, 0.004, 0.002, "memory", "yes"),
]


def test_csv_has_a_row_each_as_soon_as_it_is_added(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kernels.csv"
    file = CsvFile(path)
    for count, row in enumerate(ROWS, 1):
        file.add(row)
        assert len(path.read_text().splitlines()) == 1 + count
    read = list(csv.DictReader(path.open()))
    assert read[1]["median_us"] == "30.0" and read[1]["provider"] == OURS and read[1]["torch"] == torch.__version__
    assert read[4]["median_us"] == "" and read[4]["correct"] == "no" and read[4]["note"] == "error 1, so wrong"
    assert {"gpu", "triton", "commit", "date"} <= set(read[0])


def test_table_shows_the_best_rival_and_what_is_wrong() -> None:
    _, wrong, right = table(ROWS).splitlines()
    assert right.split() == ["lm_head", "64", "50265", "1024", "fast", "60", "30", "24", "80%", "2.00x", "memory"]
    assert wrong.split() == [
        "bias_gelu",
        "1",
        "4096",
        "gelu",
        "torch.compile",
        "2",
        "WRONG",
        "0.004",
        "-",
        "-",
        "memory",
    ]
    assert [result.kernel for result in results(ROWS)] == ["bias_gelu", "lm_head"]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra [bench]")
    plot(ROWS, tmp_path / "kernels.png", "made up")
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_cases_read_alike() -> None:
    assert case_text(tiny("cross_attention")) == "lines=3 beams=2 heads=2 head_dim=16 keys=19"
    assert case_text((5, 24, (4, 8), "gelu")) == "5 24 4x8 gelu"


def small_run(monkeypatch: pytest.MonkeyPatch, out: Path, budget: float) -> int:
    """A whole run over two cases of each of two kernels, on the CPU."""
    for constant, size in (("COPIED", 64), ("SQUARE", 4)):
        monkeypatch.setattr(kernels, constant, size)
    cases = {"bias_gelu": [TINY["bias_gelu"], (3, 8, "silu")], "lm_head": [TINY["lm_head"], (2, 7, 8)]}
    for name, given in cases.items():
        module = importlib.import_module(f"trocr_fast.kernels.{name}")
        monkeypatch.setattr(module, "cases", given.copy)
    with torch.compiler.set_stance("force_eager"):
        return kernels.run(["bias_gelu", "lm_head"], torch.float32, out, budget, calls_once, device="cpu")


def test_a_run_writes_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small_run(monkeypatch, tmp_path, budget=60) == 0
    read = list(csv.DictReader((tmp_path / "kernels_fp32.csv").open()))
    order = [(row["kernel"], row["case"]) for row in read if row["provider"] == OURS]
    cases = {"bias_gelu": ["5 24 gelu", "3 8 silu"], "lm_head": ["3 50 24", "2 7 8"]}
    assert order == [(name, cases[name][place]) for place in (0, 1) for name in cases]
    assert [row["case"] for row in read[:3]] == ["copy of 64 bytes", "product of 4 cubed", "one number"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + 1 + 4


def test_a_run_out_of_time_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small_run(monkeypatch, tmp_path, budget=-1) == 1
    assert "0 of 4 cases measured" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_expected(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["add_layernorm"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("bench.kernels: expected a CUDA device, found none") and not out


def test_unknown_kernel_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        kernels.main(["add_layernorm", "add_layer"])
    assert "expected some of add_layernorm, " in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY)
def test_ours_on_a_gpu(name: str) -> None:
    """Small enough for compute-sanitizer, which `bench/gpu.sh tests` runs it under."""
    module = importlib.import_module(f"trocr_fast.kernels.{name}")
    on_gpu, on_cpu = (module.inputs(tiny(name), torch.bfloat16, device) for device in ("cuda", "cpu"))
    call = kernels.ours(getattr(module, name), kernels.OUTPUTS.get(name, ("out",)), on_gpu)
    got = tuple(output.cpu() for output in kernels.as_list(call()))
    assert error_of(name, on_cpu, got, module.reference(*map(more_precise, on_cpu))) < 8e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY)
def test_what_is_compiled_ahead_is_what_a_launch_looks_for(name: str) -> None:
    """By the hash under which Triton caches it."""
    major, minor = torch.cuda.get_device_capability()
    module = importlib.import_module(f"trocr_fast.kernels.{name}")
    hashes = []
    try:
        for device, its_driver in (("meta", Absent(10 * major + minor)), ("cuda", driver.default)):
            driver.set_active(its_driver)
            launches = module.launches(*module.inputs(tiny(name), torch.bfloat16, device))
            hashes.append([build(launch).hash for launch in launches])
    finally:
        driver.reset_active()
    assert hashes[0] == hashes[1]


@pytest.mark.gpu
def test_times_on_a_gpu() -> None:
    rows = list(measure("add_layernorm", (300, 768), torch.bfloat16, LIMITS, GpuTimer()))
    assert [row.provider for row in rows] == [OURS, "add + layer_norm", "torch.compile"]
    assert all(row.correct == "yes" and row.timing == "graph" for row in rows), rows
    assert all(0 < row.p20_us <= row.median_us <= row.p80_us < 1000 for row in rows)
