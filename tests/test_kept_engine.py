"""A call may take the engine of the call before, and is none the wiser."""

import threading
import weakref

import pytest
import torch
from torch import Tensor

from tests.parity.models import MAX_LENGTH, Case, build, lively_reference
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


def test_an_engine_is_kept_for_a_call_like_the_last_one(case: tuple[Network, Tensor, SearchSettings]) -> None:
    network, _, settings = case
    beams = SearchSettings(settings.start_token, settings.end_tokens, MAX_LENGTH, num_beams=2)
    table = torch.zeros(3, 256)
    engines = KeptEngine()

    def lent(*arguments: object, **more: object) -> Engine:
        with engines.lend(network, *arguments, **more) as engine:
            assert engine.is_idle
        return engine

    first = lent(settings, 3, count_pads=True)
    assert lent(settings, 3, count_pads=True) is first
    others = [
        lent(beams, 3, count_pads=True),
        lent(settings, 2, count_pads=True),
        lent(settings, 2, count_pads=False),
        lent(settings, 2, count_pads=False, table=table),
    ]
    assert len({id(engine) for engine in [first, *others]}) == 5
    assert lent(settings, 2, count_pads=False, table=table) is others[-1]
    with engines.lend(network, settings, 2, count_pads=False, table=table) as mine:
        assert lent(settings, 2, count_pads=False, table=table) is not mine is others[-1]  # it was not there
    assert lent(settings, MOST_LANES + 1) is not lent(settings, MOST_LANES + 1)
    processed = SearchSettings(settings.start_token, (), MAX_LENGTH, processors=(lambda tokens, scores: scores,))
    assert lent(processed, 2) is not lent(processed, 2)


def test_an_engine_of_another_network_is_not_lent(case: tuple[Network, Tensor, SearchSettings]) -> None:
    network, _, settings = case
    model = build(Case("A"), seed=6)
    other = Network(Architecture.from_dict(model.config.to_dict(), "A"), dict(model.state_dict()))
    engines = KeptEngine()
    for wanted in (network, other, network):
        with engines.lend(wanted, settings, 2) as engine:
            assert engine.network is wanted


def test_an_engine_that_was_left_in_the_middle_is_not_kept(case: tuple[Network, Tensor, SearchSettings]) -> None:
    network, pixels, settings = case
    engines = KeptEngine()
    with pytest.raises(KeyError), engines.lend(network, settings, 2) as failed:
        raise KeyError
    with engines.lend(network, settings, 2) as busy:
        assert busy is not failed
        busy.add(pixels[0])
        busy.step()
    with engines.lend(network, settings, 2) as engine:
        assert engine is not busy


def test_generate_gives_the_same_with_an_engine_that_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels, _ = lively_reference(Case("A"))
    made = []

    def counted(*arguments: object, **more: object) -> Engine:
        made.append(weakref.ref(engine := Engine(*arguments, **more)))
        return engine

    monkeypatch.setattr(kept_engine, "Engine", counted)
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


def test_many_threads_may_generate_at_once() -> None:
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


def test_a_picture_after_the_other_is_read_by_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*arguments: object, **more: object) -> Engine:
        made.append(Engine(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(kept_engine, "Engine", counted)
    ocr = TrOCR.from_pretrained(device="cpu")
    paths = ["examples/lines/total.png", "examples/lines/hello.jpg"]
    together = [line.text for line in ocr.read(paths)]
    assert [ocr(path)[0]["generated_text"] for path in paths] == together
    assert len(made) == 2  # of 16 lanes, and of one
