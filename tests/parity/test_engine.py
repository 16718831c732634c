"""Lines that join and leave a small decode batch give the tokens of transformers, which decodes them all together."""

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import VisionEncoderDecoderModel

from tests.parity.models import MAX_LENGTH, NUM_PICTURES, Case, cut, lively_reference
from tests.recorder import Recorder
from trocr_fast import ops
from trocr_fast.config import Architecture
from trocr_fast.cross_memory import KVMemory
from trocr_fast.engine import Engine
from trocr_fast.model import Network
from trocr_fast.paged_cache import PagedKV
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


@pytest.fixture(autouse=True)
def packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's too, as those of large models are."""
    monkeypatch.setattr(ops, "PACKED_FROM", 0)


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
    held = (engine._pixels, engine._states, engine._own, engine._swapped, engine._lane_of)
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
    few_blocks = 5 * settings.num_beams * MAX_LENGTH // 3
    for kind, lanes, encode_batch, num_blocks, late, recorder in (
        ("kv", 7, 7, None, False, None),
        ("kv", 6, 2, None, True, None),
        ("latent", 5, 2, few_blocks, False, None),
        ("latent", 5, 3, few_blocks, True, Recorder),  # as on a GPU
        ("kv", 1, 1, (settings.num_beams + 1) * MAX_LENGTH, True, None),
        ("kv", 7, 3, None, True, Recorder),
    ):
        engine = Engine(
            network(name, device, kind),
            settings,
            lanes,
            encode_batch,
            count_pads=CASES[name].use_cache,
            num_blocks=num_blocks,
            late=late,
            make_recorder=recorder if device == "cpu" else None,  # on a GPU CUDA graphs
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
    few_blocks = 6 * settings.num_beams * 9
    for lanes, num_blocks, late in ((3, None, True), (NUM_PICTURES, None, False), (6, few_blocks, True)):
        engine = Engine(net, settings, lanes, num_blocks=num_blocks, late=late)
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


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_a_line_takes_as_many_steps_as_with_transformers(search: dict[str, Any]) -> None:
    """One whose running beams can't win any more leaves, though they have not ended."""
    model, pixels = reference("A")
    steps: list[int] = []
    with model.decoder.register_forward_hook(lambda *_: steps.append(1)):
        for picture in pixels[:10]:
            engine = Engine(network("A"), settings_of("A", **search), 1)
            engine.add(picture)
            model.generate(picture.unsqueeze(0), max_length=MAX_LENGTH, **search)
            expected = len(steps)
            steps.clear()
            engine.step()  # encodes
            while not engine.is_idle:
                engine.step()
                expected -= 1
            assert expected == 0


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

    def counted(batch: tuple[int, ...]) -> None:
        busy.append(len(batch))
        step(batch)

    engine._decode = counted
    found = list(engine.decode([pixels[long], *[pixels[short]] * 60]))
    assert [one[0].tokens for one in found] == [expected[row][0].tokens for row in [long, *[short] * 60]]
    assert min(busy[2 : len(expected[long][0].tokens) - 2]) > 1  # it is never alone


@pytest.mark.parametrize("late", [False, True])
def test_a_cancelled_line_leaves_at_once_and_nobody_else_notices(late: bool) -> None:
    _, pixels = reference("A")
    net, settings = network("A"), settings_of("A", num_beams=3)
    expected = run(Engine(net, settings, 40), pixels[:12])
    for cancel_at in range(0, 30, 3):
        engine = Engine(net, settings, 3, 2, num_blocks=3 * 3 * 9, late=late)
        lines = [engine.add(picture) for picture in pixels[:12]]
        cancelled, found, step = [], {}, 0
        while not engine.is_idle:
            if step >= cancel_at and len(cancelled) < 3:
                line = next(line for line in lines[step % 5 :] if line in engine)
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


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("search", [{}, {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0}], ids=str)
def test_each_line_may_have_its_own_limit(search: dict[str, Any], late: bool) -> None:
    model, pixels = reference("A")
    engine = Engine(network("A"), settings_of("A", **search), 5, late=late)
    limits = {engine.add(picture, max_length=2 + row % 13): row for row, picture in enumerate(pixels[:26])}
    found = {}
    while not engine.is_idle:
        found.update(engine.step())
    for line, row in limits.items():
        (tokens,) = model.generate(pixels[row : row + 1], max_length=2 + row % 13, **search).tolist()
        assert found[line][0].tokens == tokens
    with pytest.raises(ValueError, match="max_length: expected at least 2, got 1"):
        engine.add(pixels[0], max_length=1)


@pytest.mark.parametrize("late", [False, True])
def test_lines_may_end_where_the_position_table_does(late: bool) -> None:
    _, pixels = reference("A")
    net, settings = network("A"), settings_of("A")
    expected = [found.tokens for (found,) in run(Engine(net, settings, 8), pixels)]
    ended = [row for row, tokens in enumerate(expected) if tokens[-1] in settings.end_tokens]
    longest = max(len(expected[row]) for row in ended)
    assert longest > 5
    assert net.decoder._learned is not None
    net.decoder._learned = net.decoder._learned[: longest - 1 + 2]  # the last token is not fed
    some = [row for row in range(NUM_PICTURES) if len(expected[row]) <= longest]
    found = run(Engine(net, settings, 4, late=late), pixels[some])
    assert [one.tokens for (one,) in found] == [expected[row] for row in some]
    with pytest.raises(ValueError, match=f"expected rows of at most {longest - 1} tokens"):
        run(Engine(net, dataclasses.replace(settings, end_tokens=()), 4, late=late), pixels)


def test_a_row_that_has_ended_stays_in_the_table_of_sinusoids() -> None:
    _, pixels = reference("B")
    settings = SearchSettings(CASES["B"].start, (), max_length=63)  # two tables of 64 rows are nearly full
    rows = [run(Engine(network("B"), settings, 4, count_pads=False, late=late), pixels[:4]) for late in (False, True)]
    assert [one.tokens for (one,) in rows[0]] == [one.tokens for (one,) in rows[1]]
    assert {len(one.tokens) for (one,) in rows[0]} == {63}


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


@pytest.mark.parametrize("late", [False, True])
def test_a_line_without_enough_blocks_even_alone_ends_with_an_error_and_no_other(late: bool) -> None:
    _, pixels = reference("A")
    net, settings = network("A"), settings_of("A")
    expected = [found for (found,) in run(Engine(net, settings, 4), pixels)]
    lengths = sorted(len(one.tokens) for one in expected)
    engine = Engine(net, settings, 4, num_blocks=lengths[-1] - 2, late=late)
    found = [one for (one,) in run(engine, pixels)]
    failed = [one.error for one in found if one.failed]
    assert 0 < len(failed) == sum(len(one.tokens) > lengths[-1] - 1 for one in expected)
    assert all("free_blocks: expected at least" in error for error in failed)
    assert all(one.failed or one.tokens == other.tokens for one, other in zip(found, expected, strict=True))


@pytest.mark.timeout(60)  # lost pictures would never be done
def test_too_little_memory_makes_batches_smaller_and_fails_no_picture_but_what_does_not_fit_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, pixels = reference("A")
    net, settings = network("A"), settings_of("A", num_beams=2)
    expected = run(Engine(net, settings, 8), pixels)
    states, write, bad = net.states, KVMemory.write, 5

    def states_of_few(some: Tensor, table: Tensor | None) -> Tensor:
        if any(torch.equal(one, pixels[bad]) for one in some):
            raise torch.OutOfMemoryError("of the device")
        if len(some) > 3:
            raise MemoryError("std::bad_alloc")  # csrc's
        return states(some, table)

    def write_few(memory: KVMemory, slots: Tensor, some: Tensor) -> None:
        if len(slots) > 2:
            raise torch.OutOfMemoryError("of the device")
        write(memory, slots, some)

    def grow(*_: object) -> None:  # with the words of a CPU
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")

    monkeypatch.setattr(net, "states", states_of_few)
    monkeypatch.setattr(KVMemory, "write", write_few)
    monkeypatch.setattr(PagedKV, "grow", grow)
    monkeypatch.setattr("trocr_fast.lanes.FIRST_TOKENS", 6)
    engine = Engine(net, settings, 8)
    found = run(engine, pixels)
    assert engine.num_swaps > 0
    for row, (one, other) in enumerate(zip(found, expected, strict=True)):
        if row == bad:
            assert one[0].error is not None and "too little memory to encode one picture" in one[0].error
        else:
            assert one[0].tokens == other[0].tokens
