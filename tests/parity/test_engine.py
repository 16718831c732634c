"""Lines that join and leave a small decode batch give the tokens of transformers, which decodes them all together."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import VisionEncoderDecoderModel

from tests.parity.models import MAX_LENGTH, NUM_PICTURES, Case, cut, lively_reference
from trocr_fast.config import Architecture
from trocr_fast.engine import Engine
from trocr_fast.model import Network
from trocr_fast.search import Hypothesis, SearchSettings

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = {
    "A": Case("A"),
    "A, start is end": Case("A", eos=2),
    "B": Case("B", use_cache=False),
    "B, pad fed": Case("B", pad=5, use_cache=False, width=33, heads=3),
    "C": Case("C", encoder="deit", qkv_bias=True, eos=[3, 9], pad=0, start=1),
}
SEARCHES: list[dict[str, Any]] = [
    {},
    {"num_beams": 2, "early_stopping": True},
    {"num_beams": 4, "num_return_sequences": 3},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 3, "length_penalty": 0.0},
    {"num_beams": 10, "length_penalty": -1.0, "early_stopping": True},
]


@cache
def reference(name: str) -> tuple[VisionEncoderDecoderModel, Tensor]:
    model, pixels, _ = lively_reference(CASES[name])
    return model, pixels


def network(name: str, device: str = "cpu", kind: str = "auto") -> Network:
    model, _ = reference(name)
    weights = {key: tensor.to(device) for key, tensor in model.state_dict().items()}
    return Network(Architecture.from_dict(model.config.to_dict(), name), weights, kind)


def settings_of(name: str, **search: Any) -> SearchSettings:
    eos = reference(name)[0].generation_config.eos_token_id
    return SearchSettings(CASES[name].start, tuple(eos) if isinstance(eos, list) else (eos,), MAX_LENGTH, **search)


def assert_holds_nothing(engine: Engine) -> None:
    assert engine.is_idle and engine.lanes._kv.cache.num_free == engine.lanes.num_blocks
    held = (engine._pixels, engine._states, engine._limits, engine._swapped, engine._lane_of)
    assert not any(held), held


def run(engine: Engine, pictures: Tensor) -> list[list[Hypothesis]]:
    """All that is found, the engine checked at every step."""
    lines = [engine.add(picture) for picture in pictures]
    found = {}
    while not engine.is_idle:
        found.update(engine.step())
        engine.check_integrity()
    assert_holds_nothing(engine)
    return [found[line] for line in lines]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_tokens_and_scores_equal_transformers(name: str, search: dict[str, Any], device: str) -> None:
    model, pixels = reference(name)
    expected = model.generate(pixels, max_length=MAX_LENGTH, return_dict_in_generate=True, output_scores=True, **search)
    settings = settings_of(name, **search)
    rows = [cut(row, list(settings.end_tokens)) for row in expected.sequences.tolist()]
    penalty = search.get("length_penalty", 1.0)
    assert len({tuple(row) for row in rows}) > len(rows) / 2 or penalty <= 0  # then the shortest is best
    assert len({len(row) for row in rows}) > 3 or penalty != 1
    num_swaps = 0
    for kind, lanes, encode_batch, num_blocks in (
        ("kv", 7, 7, None),
        ("latent", 5, 2, 5 * settings.num_beams * MAX_LENGTH // 3),
        ("kv", 1, 1, settings.num_beams * MAX_LENGTH),
    ):
        engine = Engine(
            network(name, device, kind),
            settings,
            lanes,
            encode_batch,
            count_pads=CASES[name].use_cache,
            num_blocks=num_blocks,
        )
        some = pixels if lanes > 1 else pixels[:5]
        found = [hypothesis for found in run(engine, some.to(device)) for hypothesis in found]
        num_swaps += engine.num_swaps
        assert [hypothesis.tokens for hypothesis in found] == rows[: len(found)], (kind, lanes)
        if settings.num_beams > 1:
            scores = torch.tensor([hypothesis.score for hypothesis in found])
            torch.testing.assert_close(scores, expected.sequences_scores[: len(found)], rtol=1e-5, atol=1e-5)
    assert num_swaps or search  # greedy lines are many and long enough to be swapped out


@pytest.mark.parametrize("search", [SEARCHES[0], SEARCHES[3]], ids=str)
def test_a_line_does_not_depend_on_its_neighbours_nor_on_when_it_comes(search: dict[str, Any]) -> None:
    _, pixels = reference("A")
    net, settings = network("A"), settings_of("A", **search)
    alone = [run(Engine(net, settings, 1), picture.unsqueeze(0))[0] for picture in pixels]
    order = torch.randperm(NUM_PICTURES, generator=torch.Generator().manual_seed(3))
    for lanes, num_blocks in ((3, None), (NUM_PICTURES, None), (6, 6 * settings.num_beams * 9)):
        engine = Engine(net, settings, lanes, num_blocks=num_blocks)
        for row, found in zip(order.tolist(), run(engine, pixels[order]), strict=True):
            assert [one.tokens for one in found] == [one.tokens for one in alone[row]]
            assert [one.confidence for one in found] == pytest.approx([one.confidence for one in alone[row]], 1e-5)
        assert (engine.num_swaps > 0) == (num_blocks is not None)


@pytest.mark.parametrize("search", [{}, {"num_beams": 4}], ids=str)
def test_confidence_is_the_mean_log_probability_under_the_plain_softmax(search: dict[str, Any]) -> None:
    model, pixels = reference("A")
    lines = run(Engine(network("A"), settings_of("A", **search), 8), pixels[:8])
    for picture, (found,) in zip(pixels, lines, strict=False):
        tokens = torch.tensor([found.tokens])
        with torch.no_grad():
            logits = model(picture.unsqueeze(0), decoder_input_ids=tokens[:, :-1]).logits
        log_probs = logits.log_softmax(-1)[0].gather(1, tokens[0, 1:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(found.log_probs), log_probs, rtol=1e-4, atol=1e-4)
        assert found.confidence == pytest.approx(log_probs.mean().exp().item(), rel=1e-4)


def test_results_come_in_order_and_pictures_are_taken_as_they_are_needed() -> None:
    _, pixels = reference("A")
    engine = Engine(network("A"), settings_of("A"), 4, 2)
    expected = [found[0].tokens for found in run(Engine(network("A"), settings_of("A"), 40), pixels)]
    taken = 0

    def pictures():
        nonlocal taken
        for number in range(200):
            taken += 1
            yield None if number % 5 == 2 else pixels[number % NUM_PICTURES]

    for number, found in enumerate(engine.decode(pictures())):
        assert found == [] if number % 5 == 2 else found[0].tokens == expected[number % NUM_PICTURES]
        assert len(engine._pixels) <= 2 and len(engine._states) <= 2 + 2  # whatever has been taken, and is held back
    assert number == 199
    assert_holds_nothing(engine)

    taken = 0
    results = engine.decode(pictures())
    next(results)
    assert taken < 100 and not engine.is_idle
    results.close()  # early
    assert_holds_nothing(engine)


def test_a_long_line_holds_up_results_but_not_the_batch() -> None:
    _, pixels = reference("A")
    engine = Engine(network("A"), settings_of("A"), 4, 2)
    expected = run(Engine(network("A"), settings_of("A"), 40), pixels)
    by_length = sorted(range(NUM_PICTURES), key=lambda row: len(expected[row][0].tokens))
    long, short = by_length[-1], by_length[5]
    busy = []
    step = engine._decode

    def counted(num_lanes: int) -> list[int]:
        busy.append(num_lanes)
        return step(num_lanes)

    engine._decode = counted
    found = list(engine.decode([pixels[long], *[pixels[short]] * 60]))
    assert [one[0].tokens for one in found] == [expected[row][0].tokens for row in [long, *[short] * 60]]
    assert min(busy[2 : len(expected[long][0].tokens) - 2]) > 1  # it is never alone


def test_a_cancelled_line_leaves_at_once_and_nobody_else_notices() -> None:
    _, pixels = reference("A")
    net, settings = network("A"), settings_of("A", num_beams=3)
    expected = run(Engine(net, settings, 40), pixels[:12])
    for cancel_at in range(0, 30, 3):
        engine = Engine(net, settings, 3, 2, num_blocks=3 * 3 * 9)
        lines = [engine.add(picture) for picture in pixels[:12]]
        cancelled, found, step = [], {}, 0
        while not engine.is_idle:
            if step >= cancel_at and len(cancelled) < 3:
                line = next(line for line in lines[step % 5 :] if line not in found and line not in cancelled)
                engine.cancel(line)
                cancelled.append(line)
                engine.check_integrity()
            found.update(engine.step())
            step += 1
        assert_holds_nothing(engine)
        assert sorted([*found, *cancelled]) == lines
        assert all(found[line][0].tokens == expected[line][0].tokens for line in found)
    with pytest.raises(ValueError, match="expected one that was added and has not ended, got 3"):
        engine.cancel(3)


@pytest.mark.parametrize("search", [{}, {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0}], ids=str)
def test_each_line_may_have_its_own_limit(search: dict[str, Any]) -> None:
    model, pixels = reference("A")
    engine = Engine(network("A"), settings_of("A", **search), 5)
    limits = {engine.add(picture, max_length=2 + row % 13): row for row, picture in enumerate(pixels[:26])}
    found = {}
    while not engine.is_idle:
        found.update(engine.step())
    for line, row in limits.items():
        (tokens,) = model.generate(pixels[row : row + 1], max_length=2 + row % 13, **search).tolist()
        assert found[line][0].tokens == tokens
    with pytest.raises(ValueError, match="max_length: expected at least 2, got 1"):
        engine.add(pixels[0], max_length=1)


@pytest.mark.parametrize("device_memory", [True, False])
def test_a_step_that_fails_leaves_the_engine_usable(device_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pixels = reference("A")
    net, settings = network("A"), settings_of("A")
    engine = Engine(net, settings, 4)
    expected = run(Engine(net, settings, 4), pixels[:6])
    before = [engine.add(picture) for picture in pixels[:8]]
    engine.step()
    engine.step()
    error = torch.OutOfMemoryError if device_memory else RuntimeError
    with monkeypatch.context() as broken, pytest.raises(error, match="by the test"):

        def fail(*_: object) -> None:
            raise error("by the test")

        broken.setattr(net.decoder, "step", fail)
        engine.step()
    assert_holds_nothing(engine)
    after = engine.add(pixels[0])
    assert after not in before  # an old number means nobody else now
    engine.cancel(after)
    assert [one.tokens for (one,) in run(engine, pixels[:6])] == [one.tokens for (one,) in expected]


def test_what_cannot_be_decoded_is_refused_before_anything_is_done() -> None:
    _, pixels = reference("A")
    net, settings = network("A"), settings_of("A")
    engine = Engine(net, settings, 2)
    for wrong in (torch.zeros(3, 4, 4), torch.zeros(3, 16, 16, dtype=torch.uint8), pixels[:1]):
        with pytest.raises(ValueError, match=r"pixels: expected floating-point \[3, 16, 16\], got torch"):
            engine.add(wrong)
    with pytest.raises(ValueError, match=r"pixels: expected uint8 \[3, 16, 16\], got torch.float32"):
        Engine(net, settings, 2, table=torch.zeros(3, 256)).add(pixels[0])
    assert_holds_nothing(engine)
    with pytest.raises(ValueError, match="free_blocks: expected at least 1 for the next step of line 0, got 0"):
        run(Engine(net, settings, 2, num_blocks=3), pixels[:2])
