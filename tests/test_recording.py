"""Work that is recorded and replayed, with a stand-in for CUDA graphs (tests/recorder.py), gives what it gives anew."""

import gc
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.models import Case, build, pictures
from tests.recorder import Recorder
from trocr_fast import ops
from trocr_fast.config import Architecture
from trocr_fast.engine import Engine
from trocr_fast.lanes import Lanes
from trocr_fast.model import Network
from trocr_fast.picture_encoder import MOST_RECORDED, PictureEncoder
from trocr_fast.recording import Recordings, no_recorder, padded
from trocr_fast.search import Hypothesis, Sampling, SearchSettings, make_processors

START = 2
SEARCHES: list[dict[str, Any]] = [{}, {"num_beams": 3}]


@contextmanager
def replaying(least: int) -> Iterator[None]:
    """In here something is replayed, at least so often."""
    before = Recorder.num_replayed
    yield
    assert Recorder.num_replayed - before >= least


# Sizes


@pytest.mark.parametrize("most", [1, 5, 7, 8, 100, 512])
def test_sizes_are_few_and_waste_at_most_a_third(most: int) -> None:
    few = [size for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384) if size < most] + [most]
    for size in range(1, most + 1):
        assert padded(size, most) == min(one for one in few if one >= size)
        assert 3 * (padded(size, most) - size) <= padded(size, most)


# Recordings


class Doubled:
    """The first entries of a tensor twice."""

    def __init__(self) -> None:
        self.source = torch.arange(8.0)
        self.calls: list[int] = []  # with which size

    def __call__(self, size: int) -> Tensor:
        self.calls.append(size)
        return self.source[:size] * 2


def test_a_size_is_called_then_recorded_then_replayed() -> None:
    work, recordings = Doubled(), Recordings(Recorder(), most=7)
    assert recordings.is_on and [recordings.size(size) for size in (1, 5, 6, 7)] == [1, 6, 6, 7]
    recorded, calls = Recorder.num_recorded, []
    for size, is_called in ((3, True), (3, True), (3, False), (2, True), (3, False), (2, True), (2, False), (3, False)):
        work.source += 1
        assert torch.equal(recordings.run(work, size, "here"), work.source[:size] * 2)
        calls += [size] if is_called else []
        assert work.calls == calls
    assert Recorder.num_recorded - recorded == 2


def test_another_version_begins_anew_and_lets_the_old_memory_go() -> None:
    work, recordings = Doubled(), Recordings(Recorder(), most=8)
    for version in range(3):
        work.source, calls = torch.randn(8), len(work.calls)
        for _ in range(4):
            assert torch.equal(recordings.run(work, 4, version), work.source[:4] * 2)
        assert len(work.calls) - calls == 2
    old = weakref.ref(recordings.run(work, 4, version))
    assert old() is not None
    recordings.run(work, 4, version + 1)
    assert old() is None


def test_a_first_call_that_fails_does_not_count() -> None:
    """It may have ended before it had compiled all."""
    recordings, recorded = Recordings(Recorder(), most=8), Recorder.num_recorded
    x = torch.ones(4)

    def fail(size: int) -> Tensor:
        raise torch.OutOfMemoryError("by the test")

    with pytest.raises(torch.OutOfMemoryError):
        recordings.run(fail, 4, "here")
    recordings.run(lambda size: x[:size] * 2, 4, "here")
    assert Recorder.num_recorded == recorded
    recordings.run(lambda size: x[:size] * 2, 4, "here")
    assert Recorder.num_recorded == recorded + 1


def test_without_a_recorder_every_call_is_made_with_its_own_size() -> None:
    work, recordings = Doubled(), Recordings[Tensor](None, most=8)
    assert not recordings.is_on and recordings.size(5) == 5
    for _ in range(3):
        assert torch.equal(recordings.run(work, 5, None), work.source[:5] * 2)
    assert work.calls == [5, 5, 5]


class Broken(Recorder):
    """Cannot record, which it finds out at the end."""

    def __call__(self, work: Callable[[], Any]) -> Any:
        super().__call__(work)
        raise RuntimeError("no graph")


def test_what_cannot_be_recorded_is_called_with_one_warning() -> None:
    work, recordings = Doubled(), Recordings(Broken(), most=8)
    recordings.run(work, 5, "here")
    with pytest.warns(UserWarning, match="CUDA graphs could not be recorded.*no graph"):
        assert torch.equal(recordings.run(work, 5, "here"), work.source[:5] * 2)
    assert not recordings.is_on and recordings.size(5) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in ("here", "there"):
            assert torch.equal(recordings.run(work, 5, version), work.source[:5] * 2)


def test_another_choice_of_backends_is_another_recording() -> None:
    work, recordings = Doubled(), Recordings(Recorder(), most=8)
    for _ in range(3):
        recordings.run(work, 4, "here")
    assert len(work.calls) == 2
    with ops.use("linear=torch"):
        for _ in range(3):
            recordings.run(work, 4, "here")
    assert len(work.calls) == 4


# Pictures


@cache
def network(family: str = "A") -> tuple[Network, Tensor]:
    """A small model and pictures on which it reads different lines."""
    model = build(Case(family), seed=6)
    return Network(Architecture.from_dict(model.config.to_dict(), family), model.state_dict()), pictures(model, 12, 6)


@torch.inference_mode()
def test_pictures_encoded_by_recordings_have_the_states_of_a_plain_call() -> None:
    net, normalised = network()
    draw = random.Random(1)
    raw = torch.randint(256, normalised.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    table = torch.randn(3, 256, generator=torch.Generator().manual_seed(2))
    encoder = PictureEncoder(net, table, Recorder())
    found = []
    with replaying(least=60):
        for pixels in (raw, normalised, raw, normalised):
            counts = 4 * list(range(1, MOST_RECORDED + 3))
            draw.shuffle(counts)
            for count in counts:
                some = [pixels[draw.randrange(len(pixels))] for _ in range(count)]
                found.append((some, encoder.encode(some).take()))
    for some, states in found:  # none was overwritten by a later one
        torch.testing.assert_close(states, net.states(torch.stack(some), table), rtol=1e-5, atol=1e-5)


# The engine


def make_engine(settings: SearchSettings, make_recorder: Any, num_lanes: int = 5, family: str = "A") -> Engine:
    net, _ = network(family)
    return Engine(net, settings, num_lanes, count_pads=family != "B", late=True, make_recorder=make_recorder)


def run(engine: Engine, some: Tensor, max_length: int | None = None) -> list[Hypothesis]:
    lines = [engine.add(picture, max_length, seed) for seed, picture in enumerate(some)]
    found: dict[int, list[Hypothesis]] = {}
    while not engine.is_idle:
        found.update(engine.step())
        engine.check_integrity()
    return [found[line][0] for line in lines]


def assert_same(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_lines_may_outgrow_what_was_recorded(search: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Block tables (with the table of sinusoids), blocks and what the search holds move, each while the others stay."""
    monkeypatch.setattr("trocr_fast.search.FIRST_COLUMNS", 26)
    most, (_, pixels) = 130, network("B")
    settings = SearchSettings(START, (), most, **search)
    engine = make_engine(settings, Recorder, 4, "B")
    sizes = []  # at each step
    decode = engine._decode

    def watched(batch: tuple[int, ...]) -> None:
        decode(batch)
        if batch:
            num_columns = engine._search.lines["tokens"].shape[-1]
            sizes.append((engine.lanes.room, engine.lanes.num_blocks, num_columns))

    monkeypatch.setattr(engine, "_decode", watched)
    with replaying(least=most // 2):
        found = run(engine, pixels[:3])
    assert_same(found, run(make_engine(settings, no_recorder, 4, "B"), pixels[:3]))
    assert {len(one.tokens) for one in found} == {most} and len({tuple(one.tokens) for one in found}) == 3
    grown = [step for step in range(1, len(sizes)) if sizes[step] != sizes[step - 1]]
    assert all(len(set(each)) > 1 for each in zip(*sizes, strict=True)), sizes
    assert min(after - before for before, after in zip([0, *grown], grown, strict=False)) > 3, grown  # replayed between


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_lanes_without_a_line_stay_as_they_are(search: dict[str, Any]) -> None:
    """Recorded steps of 6 lanes for 5 lines: the sixth must not outgrow tensors that are wide enough for the five."""
    settings, (_, pixels) = SearchSettings(START, (), 100, **search), network("B")
    engine, plain = (make_engine(settings, make, 8, "B") for make in (Recorder, no_recorder))
    lines = [engine.add(picture) for picture in pixels[:6]]
    for _ in range(4):
        engine.step()
    for line in lines:  # they leave a picture in the sixth lane, and a line that is not done
        engine.cancel(line)
    with replaying(least=60):
        for start in range(0, 20, 2):
            some = pixels.roll(-start, 0)[:5]
            assert_same(run(engine, some, max_length=10), run(plain, some, max_length=10))


WARPERS: list[dict[str, Any]] = [
    {"temperature": 1.5, "top_k": 5},
    {"top_k": 0, "top_p": 0.9, "min_p": 0.01},
    {"top_k": 0, "typical_p": 0.9, "epsilon_cutoff": 0.02},
]


@pytest.mark.parametrize("sampling", WARPERS, ids=str)
def test_samples_are_the_same(sampling: dict[str, Any]) -> None:
    settings = SearchSettings(START, (3,), 30, sampling=Sampling(**sampling))
    _, pixels = network()
    with replaying(least=20):
        found = run(make_engine(settings, Recorder), pixels)
    assert_same(found, run(make_engine(settings, no_recorder), pixels))
    greedy = run(make_engine(SearchSettings(START, (3,), 30), no_recorder), pixels)
    assert sum(one.tokens != other.tokens for one, other in zip(found, greedy, strict=True)) > len(pixels) / 2


@pytest.mark.parametrize(
    "search",
    [{"processors": make_processors(1.2, 3)}, {"sampling": Sampling(eta_cutoff=0.1)}],
    ids=["processors", "eta"],
)
def test_a_search_that_needs_the_host_is_not_recorded(search: dict[str, Any]) -> None:
    settings, (_, pixels) = SearchSettings(START, (), 20, **search), network()
    recorded = Recorder.num_recorded
    found = run(make_engine(settings, Recorder, len(pixels)), pixels)  # too many to be encoded by a recording
    assert Recorder.num_recorded == recorded
    assert_same(found, run(make_engine(settings, no_recorder, len(pixels)), pixels))
    run(make_engine(SearchSettings(START, (), 20), Recorder, len(pixels)), pixels)
    assert Recorder.num_recorded > recorded


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_a_cancelled_line_leaves_and_nobody_else_notices(search: dict[str, Any]) -> None:
    settings, (_, pixels) = SearchSettings(START, (3,), 30, **search), network()
    expected = run(make_engine(settings, no_recorder), pixels)
    for cancel_at in range(2, 20, 4):
        engine = make_engine(settings, Recorder)
        lines = [engine.add(picture) for picture in pixels]
        cancelled: list[int] = []
        found: dict[int, list[Hypothesis]] = {}
        step = 0
        with replaying(least=15):
            while not engine.is_idle:
                if step >= cancel_at and len(cancelled) < 3:
                    cancelled.append(next(line for line in lines[step % 5 :] if line in engine))
                    engine.cancel(cancelled[-1])
                found.update(engine.step())
                engine.check_integrity()
                step += 1
        assert len(cancelled) == 3 and sorted([*found, *cancelled]) == lines
        assert_same([found[line][0] for line in sorted(found)], [expected[line] for line in sorted(found)])


def test_a_step_that_fails_leaves_the_engine_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, (_, pixels) = SearchSettings(START, (3,), 30, num_beams=3), network()
    engine = make_engine(settings, Recorder)
    expected = run(make_engine(settings, no_recorder), pixels)
    for picture in pixels:
        engine.add(picture)
    with replaying(least=5):
        for _ in range(12):
            engine.step()
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="by the test"):

        def fail(*_: object) -> None:
            raise RuntimeError("by the test")

        broken.setattr(Lanes, "reserve", fail)
        engine.step()
    assert engine.is_idle
    with replaying(least=20):
        assert_same(run(engine, pixels), expected)


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_steps_that_cannot_be_recorded_are_called(search: dict[str, Any]) -> None:
    settings, (_, pixels) = SearchSettings(START, (3,), 30, **search), network()
    engine = make_engine(settings, Broken, len(pixels))
    with pytest.warns(UserWarning, match="no graph") as warned:
        found = run(engine, pixels)
        engine._reset()  # as after an error
        assert_same(run(engine, pixels), found)
    assert len(warned) == 1
    assert_same(found, run(make_engine(settings, no_recorder, len(pixels)), pixels))


@pytest.mark.filterwarnings("ignore:CUDA graphs could not be recorded")
@pytest.mark.parametrize("make_recorder", [no_recorder, Recorder, Broken])
def test_an_engine_goes_with_its_last_reference(make_recorder: Any) -> None:
    """Without the garbage collector, which may come late for so much memory."""
    settings, (_, pixels) = SearchSettings(START, (3,), 40, num_beams=3), network()
    engine = make_engine(settings, make_recorder)
    run(engine, pixels)
    for picture in pixels:
        engine.add(picture)
    engine.step()
    engine.step()
    left = [weakref.ref(one) for one in (engine, engine.lanes, engine._memory, engine._search, engine._encoder)]
    gc.collect()
    gc.disable()
    try:
        del engine
        assert [one() for one in left] == [None] * len(left)
    finally:
        gc.enable()


# CUDA graphs themselves


@pytest.mark.gpu
@pytest.mark.filterwarnings("error")  # of what could not be recorded
@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_graphs_of_engines_side_by_side_and_one_after_another_do_not_disturb_each_other(search: dict[str, Any]) -> None:
    """More recordings than torch has streams, and memory that is given back between them."""
    settings, device = SearchSettings(START, (3,), 60, **search), torch.device("cuda")
    model = build(Case("A"), seed=6)
    weights = {name: weight.to(device) for name, weight in model.state_dict().items()}
    net = Network(Architecture.from_dict(model.config.to_dict(), "A"), weights)
    some = pictures(model, 12, 6)
    expected = run(Engine(net, settings, 12, make_recorder=no_recorder), some)
    free = []
    for turn in range(8):
        engines = [Engine(net, settings, lanes) for lanes in (5, 7)]
        lines = [[engine.add(picture) for picture in some] for engine in engines]
        found: list[dict[int, list[Hypothesis]]] = [{}, {}]
        while not all(engine.is_idle for engine in engines):
            for engine, rows in zip(engines, found, strict=True):
                if not engine.is_idle:
                    rows.update(engine.step())
            if turn % 2:
                torch.cuda.empty_cache()
        for engine, rows, numbers in zip(engines, found, lines, strict=True):
            assert engine._recordings.is_on and any(engine._recordings._recordings.values())
            assert_same([rows[number][0] for number in numbers], expected)
        del engine, engines
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[2] - free[-1] < 2**20  # the memory of the graphs before serves again
