"""A call may take the engine of the call before, and is none the wiser."""

import threading
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.models import MAX_LENGTH, Case, lively_reference
from tests.recorder import Recorder
from trocr_fast import TrOCR, accelerate, kept_engine
from trocr_fast.config import Architecture
from trocr_fast.engine import Engine
from trocr_fast.kept_engine import MOST_LANES, KeptEngine
from trocr_fast.model import Network
from trocr_fast.search import SearchSettings


@pytest.fixture(scope="module")
def case() -> tuple[Network, Tensor, SearchSettings]:
    reference, pixels, eos = lively_reference(Case("A"))
    network = Network(Architecture.from_dict(reference.config.to_dict(), "A"), dict(reference.state_dict()))
    return network, pixels, SearchSettings(Case("A").start, (eos,), MAX_LENGTH)


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Engine]]:
    """The engines that were made to be lent, which record as on a GPU."""
    made: list[weakref.ref[Engine]] = []

    def recording(*arguments: Any, **more: Any) -> Engine:
        engine = Engine(*arguments, **more, late=True, make_recorder=Recorder)
        made.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(kept_engine, "Engine", recording)
    return made


def test_an_engine_is_kept_for_a_call_like_the_last_one(case: tuple[Network, Tensor, SearchSettings]) -> None:
    network, _, settings = case
    beams = replace(settings, num_beams=2)
    table = torch.zeros(3, 256)
    engines = KeptEngine(network)

    def lent(*arguments: Any) -> Engine:
        with engines.lend(*arguments) as engine:
            assert engine.is_idle
        return engine

    first = lent(settings, 3, True)
    assert lent(replace(settings), 3, True) is first
    others = [
        lent(beams, 3, True),
        lent(settings, 2, True),
        lent(settings, 2, False),
        lent(settings, 2, False, table),
        lent(settings, 2, False, table + 1),
    ]
    assert len({id(engine) for engine in [first, *others]}) == 6
    assert lent(settings, 2, False, table + 1) is others[-1]
    with engines.lend(settings, 2, False, table + 1) as mine:
        assert lent(settings, 2, False, table + 1) is not mine is others[-1]  # it was not there
    assert lent(settings, MOST_LANES + 1, True) is not lent(settings, MOST_LANES + 1, True)
    processed = replace(settings, processors=(lambda tokens, scores: scores,))
    assert lent(processed, 2, True) is not lent(processed, 2, True)


def test_an_engine_that_records_nothing_is_not_kept(
    case: tuple[Network, Tensor, SearchSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU, where it would only hold memory."""
    network, _, settings = case
    monkeypatch.setattr(kept_engine, "Engine", Engine)
    engines = KeptEngine(network)
    with engines.lend(settings, 2, True) as first, engines.lend(settings, 2, True):
        pass
    with engines.lend(settings, 2, True) as engine:
        assert engine is not first


def test_an_engine_that_was_left_in_the_middle_or_with_long_lines_is_not_kept(
    case: tuple[Network, Tensor, SearchSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, pixels, settings = case
    monkeypatch.setattr(kept_engine, "MOST_TOKENS", 40)
    engines = KeptEngine(network)
    with pytest.raises(KeyError), engines.lend(settings, 2, True) as failed:
        raise KeyError
    with engines.lend(settings, 2, True) as busy:
        assert busy is not failed
        busy.add(pixels[0])
        busy.step()
    with engines.lend(settings, 2, True) as engine:
        assert engine is not busy
    long = replace(settings, end_tokens=(), max_length=60)
    for max_length, is_kept in ((20, True), (None, False)):
        with engines.lend(long, 2, True) as engine:
            engine.add(pixels[0], max_length)
            while not engine.is_idle:
                engine.step()
        with engines.lend(long, 2, True) as next_one:
            assert (next_one is engine) == is_kept


def test_generate_gives_the_same_with_an_engine_that_was_used(made: list[weakref.ref[Engine]]) -> None:
    model, pixels, _ = lively_reference(Case("A"))
    batches = [pixels[:3], pixels[3:6], pixels[4:7]]
    expected = [model.generate(batch, max_length=MAX_LENGTH) for batch in batches]
    acceleration = accelerate(model)
    for batch, rows in zip(batches, expected, strict=True):
        assert torch.equal(model.generate(batch, max_length=MAX_LENGTH), rows)
    assert len(made) == 1

    weight = model.decoder.model.decoder.embed_tokens.weight.data
    weight.copy_(weight.roll(1, 0))
    acceleration.undo()
    assert made[0]() is None  # with the weights of before
    changed = model.generate(batches[0], max_length=MAX_LENGTH)
    accelerate(model)
    found = model.generate(batches[0], max_length=MAX_LENGTH)
    assert torch.equal(found, changed) and not torch.equal(found, expected[0])
    with torch.no_grad():  # which is noticed
        model.decoder.model.decoder.embed_tokens.weight.copy_(weight.roll(-1, 0))
    assert torch.equal(model.generate(batches[0], max_length=MAX_LENGTH), expected[0])
    assert len(made) == 3 and made[1]() is None


def test_many_threads_may_generate_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Keepable(Engine):
        """Unrecorded: the stand-in for graphs notes what all threads do."""

        has_recordings = True

    monkeypatch.setattr(kept_engine, "Engine", Keepable)
    model, pixels, _ = lively_reference(Case("A"))
    expected = [model.generate(one, max_length=MAX_LENGTH) for one in pixels[:16].split(1)]
    accelerate(model)
    found: dict[int, Tensor] = {}

    def generate(rows: range) -> None:
        for row in rows:
            found[row] = model.generate(pixels[row : row + 1], max_length=MAX_LENGTH)

    threads = [threading.Thread(target=generate, args=(range(first, 16, 4),)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[row], rows) for row, rows in enumerate(expected))


def test_a_picture_after_the_other_is_read_by_one_engine(made: list[weakref.ref[Engine]]) -> None:
    ocr = TrOCR.from_pretrained(device="cpu")
    paths = ["examples/lines/total.png", "examples/lines/hello.jpg"]
    together = [line.text for line in ocr.read(paths)]
    assert [ocr(path)[0]["generated_text"] for path in paths] == together
    assert [engine() is None for engine in made] == [True, False]  # of 16 lanes, and of one
