"""The benchmarks of whole decoding: that all contestants do the same work, and what is made of their times."""

import dataclasses
import json
import math
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import generation, latency, report, throughput
from bench.generation import (
    ACCELERATED,
    CACHED,
    COMPILED,
    NO_GRAPHS,
    OURS,
    SHIPPED,
    STATIC_CACHE,
    WHOLE_BATCHES,
    Contestant,
    Maker,
    Subject,
    Workload,
    contestants,
    iam_lengths,
    random_workload,
    reference_rows,
)
from tests.parity.models import MAX_LENGTH, Case, build, lively_reference

CASES = {
    "A": Case("A", use_cache=False),
    # With use_cache=False the two position rules would differ, and transformers with a cache from itself as shipped.
    "B": Case("B", use_cache=True),
    "C": Case("C", encoder="deit", qkv_bias=True, use_cache=False),
}
CPU = torch.device("cpu")


@cache
def subject_of(family: str) -> Subject:
    return Subject.of(family, build(CASES[family], seed=3), CPU, torch.float32)


def workload_of(subject: Subject, lengths: list[int], num_beams: int = 1) -> Workload:
    whole = random_workload(subject, len(lengths), 1, num_beams)
    return dataclasses.replace(whole, new_tokens=lengths, max_new_tokens=max(lengths))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", CASES)
def test_all_contestants_give_the_same_tokens_of_the_lengths_asked_for(family: str, num_beams: int) -> None:
    subject = subject_of(family)
    lengths = [7, 1, 12, 3, 3, 9, 2]
    workload = workload_of(subject, lengths, num_beams)
    expected = reference_rows(subject, workload, 7, 7)
    assert [len(tokens) - 1 for tokens in expected] == lengths
    assert len({tuple(tokens) for tokens in expected}) >= 5
    with torch.compiler.set_stance("force_eager"):
        found = {maker.name: maker()(workload) for maker in contestants(subject, workload, 3, lengths, everything=True)}
    assert list(found) == [OURS, WHOLE_BATCHES, NO_GRAPHS, ACCELERATED, CACHED, SHIPPED, STATIC_CACHE, COMPILED]
    assert [name for name, rows in found.items() if rows != expected] == []


def test_each_row_of_a_prescribed_length_is_that_of_the_line_alone() -> None:
    subject = subject_of("A")
    lengths = [5, 2, 8, 1]
    workload = workload_of(subject, lengths)
    for line, tokens in enumerate(reference_rows(subject, workload, 4, 4)):
        pixels = generation.ops.normalise_pixels(workload.pictures[[line]], workload.table)
        alone = subject.model.generate(pixels, max_new_tokens=lengths[line])
        assert tokens == alone[0].tolist()


def test_without_prescribed_lengths_lines_end_at_their_end_tokens() -> None:
    model, _, eos = lively_reference(CASES["A"])
    subject = Subject.of("lively", model, CPU, torch.float32)
    assert subject.end_tokens == (eos,)
    pictures = workload_of(subject, [1] * 12)
    workload = dataclasses.replace(pictures, new_tokens=None, max_new_tokens=MAX_LENGTH - 1)
    found = throughput.measure(subject, workload, [4], repeats=1)
    assert found["distinct_lines"] >= 4 and found["mean_new_tokens"] < found["max_new_tokens"]
    assert {row["contestant"]: row.get("equal_share") for row in found["rows"]} == dict.fromkeys(
        (OURS, WHOLE_BATCHES, ACCELERATED, CACHED, SHIPPED), 1.0
    )


def test_a_static_batch_waits_for_its_longest_line() -> None:
    subject = subject_of("A")
    lengths = [1, 12, 12, 1, 12, 1]
    workload = workload_of(subject, lengths)
    steps = {}
    for maker in contestants(subject, workload, 2, lengths)[:2]:
        ours = maker()
        assert isinstance(ours, generation.Ours)
        ours(workload.first(1, 1))
        assert ours.engine is not None
        ours.engine.start_counting()
        assert [len(tokens) - 1 for tokens in ours(workload)] == lengths
        assert ours.engine.num_lines_fed == sum(lengths)
        steps[maker.name] = ours.engine.num_steps
    assert steps[WHOLE_BATCHES] == 36  # three batches of 12
    assert steps[OURS] < 28


def test_lengths_as_on_iam_are_what_is_said_of_them() -> None:
    lengths = iam_lengths(3140)
    assert statistics.mean(lengths) == pytest.approx(11.0, abs=0.02)
    assert statistics.median(lengths) == 10
    assert sum(length > 20 for length in lengths) == pytest.approx(len(lengths) / 18, rel=0.05)
    assert sum(length > 30 for length in lengths) == pytest.approx(len(lengths) / 157, rel=0.05)
    assert min(lengths) >= 1 and max(lengths) == 50
    assert statistics.stdev([math.log(length) for length in lengths]) == pytest.approx(0.45, rel=0.05)
    for number in ("mean 11", "sigma 0.45", "median 10", "in 18 past 20", "in 157 past 30"):
        assert number in generation.IAM_LENGTHS
    assert statistics.mean(iam_lengths(32)) == pytest.approx(11.0, abs=0.2)
    assert iam_lengths(32) == iam_lengths(32) != sorted(iam_lengths(32)) != iam_lengths(32, seed=1)


class Broken(Contestant):
    def __call__(self, workload: Workload) -> list[list[int]]:
        raise RuntimeError("does not work here\nfor a reason")


class Wrong(Contestant):
    def __call__(self, workload: Workload) -> list[list[int]]:
        return [[2] * 3] * len(workload.pictures)


def measured(**more: Any) -> dict[str, Any]:
    subject = subject_of("A")
    workload = workload_of(subject, [2, 4, 2, 1])
    others = [Maker("broken", lambda: Broken("broken", subject, 2)), Maker("wrong", lambda: Wrong("wrong", subject, 2))]
    return {
        "configuration": "tiny",
        "workload": "ragged",
        "dtype": "float32",
        "num_beams": 1,
        "batches": [2, 4],
        "num_lines": 4,
        **throughput.measure(subject, workload, [2, 4], more=lambda batch: others if batch == 2 else [], **more),
    }


def test_rows_carry_speed_agreement_and_what_failed() -> None:
    entry = measured(repeats=2, skip=[ACCELERATED])
    rows = {(row["contestant"], row["batch"]): row for row in entry["rows"]}
    assert len(rows) == len(entry["rows"]) == 2 * 4 + 2
    assert rows["broken", 2]["failed"] == "RuntimeError: does not work here"
    assert rows["wrong", 2]["equal_share"] == 0.0
    for batch in (2, 4):
        for name in (OURS, WHOLE_BATCHES, CACHED, SHIPPED):
            row = rows[name, batch]
            assert row["equal_share"] == 1.0 and len(row["seconds"]) == 2
            assert row["lines_s"] == pytest.approx(4 / statistics.median(row["seconds"]), rel=1e-2)
            assert row["tokens_s"] == pytest.approx(9 / 4 * row["lines_s"], rel=1e-2)
        shares = rows[OURS, batch]["share_of_time"]
        assert min(shares.values()) > 0 and sum(shares.values()) <= 1.001
        steps = rows[WHOLE_BATCHES, batch]["decode_steps"]
        assert steps == {2: 4 + 2, 4: 4}[batch] and rows[WHOLE_BATCHES, batch]["lines_a_step"] == round(9 / steps, 2)
    assert (entry["mean_new_tokens"], entry["max_new_tokens"], entry["compared_lines"]) == (2.25, 4, 4)

    lines = throughput.table(entry).splitlines()
    assert lines[0] == "tiny, float32, ragged, greedy, 4 lines" and len(lines) == 2 + len(rows) + 1
    assert "RuntimeError: does not work here" in next(line for line in lines if "broken" in line)
    for name in (CACHED, SHIPPED):  # at its own best batch
        ours, rival = (throughput.best(entry["rows"], who) for who in (OURS, name))
        assert ours and rival
        assert f"{ours['lines_s'] / rival['lines_s']:.2f}x {name} (batch {rival['batch']})" in lines[-1]


def test_a_slow_rival_runs_twice_and_out_of_time_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "SLOW_S", 0.0)
    runs = {row["contestant"]: len(row["seconds"]) for row in measured(repeats=3)["rows"] if "seconds" in row}
    assert runs == {OURS: 3, WHOLE_BATCHES: 3, ACCELERATED: 2, CACHED: 2, SHIPPED: 2, "wrong": 2}
    late = measured(deadline=0.0)
    assert {row["failed"] for row in late["rows"]} == {throughput.NO_TIME}
    assert throughput.NO_TIME in throughput.table(late)


def test_several_runs_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    entry = measured(repeats=1)
    throughput.write("some", entry | {"note": "first"})
    throughput.write("some", entry | {"num_beams": 4})
    throughput.write("some", entry | {"batches": [2]})
    entries = throughput.write("some", entry | {"note": "again"})
    assert [(one["num_beams"], one["batches"], one.get("note")) for one in entries] == [
        (4, [2, 4], None),
        (1, [2], None),
        (1, [2, 4], "again"),
    ]
    written = json.loads((tmp_path / "some.json").read_text())
    assert written["measurements"] == entries and written["versions"] == entries[0]["circumstances"]["versions"]

    pytest.importorskip("matplotlib")
    throughput.plot(entries, tmp_path / "some.png", "a machine")
    assert (tmp_path / "some.png").stat().st_size > 10_000
    nothing = entry | {"rows": [{"contestant": OURS, "batch": 2, "failed": "for a reason"}]}
    throughput.plot([nothing], tmp_path / "none.png", "a machine")
    assert not (tmp_path / "none.png").exists()


def test_latency_of_one_line() -> None:
    subject = subject_of("C")
    rows = latency.measure(subject, workload_of(subject, [6]), repeats=4)
    assert [row["contestant"] for row in rows] == [OURS, ACCELERATED, CACHED, SHIPPED]
    for row in rows:
        assert row["equal"] and row["runs"] == 4
        assert row["first_token_ms"] > 0 and 0 < row["median_ms"] <= row["p90_ms"]
    entry = {"configuration": "tiny", "dtype": "float32", "workload": "6 new tokens", "rows": rows}
    assert len(latency.table(entry).splitlines()) == 2 + len(rows)
    late = latency.measure(subject, workload_of(subject, [6]), deadline=0.0)
    assert {row["failed"] for row in late} == {throughput.NO_TIME}
    assert throughput.NO_TIME in latency.table(entry | {"rows": late})


def test_percentiles() -> None:
    values = [float(value) for value in range(10, 0, -1)]
    assert [latency.percentile(values, share) for share in (0.0, 0.5, 0.9, 0.91, 1.0)] == [1.0, 5.0, 9.0, 10.0, 10.0]
    assert latency.percentile([7.0], 0.9) == 7.0


def test_the_built_in_model_from_memory_and_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    throughput.main("--device cpu --config builtin --batch 2 --lines 3 --repeats 1".split())
    (entry,) = json.loads((tmp_path / "throughput_cpu.json").read_text())["measurements"]
    rows = {row["contestant"]: row for row in entry["rows"]}
    assert list(rows) == [
        *(OURS, WHOLE_BATCHES, ACCELERATED, CACHED, SHIPPED),
        *(f"{OURS}, {throughput.FROM_FILES}", f"{CACHED}, {throughput.FROM_FILES}"),
    ]
    assert [row.get("equal_share") for row in rows.values()] == [1.0] * 7
    assert throughput.table(entry) in capsys.readouterr().out

    latency.main("--device cpu --config builtin --repeats 1".split())
    (entry,) = json.loads((tmp_path / "latency_cpu.json").read_text())["measurements"]
    assert all(row["equal"] for row in entry["rows"])


def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("--batch 0", "--beams 0", "--repeats 0", "--config huge", "--lengths iam --new-tokens 3"):
        with pytest.raises(SystemExit):
            throughput.main(wrong.split())
        assert "error:" in capsys.readouterr().err
