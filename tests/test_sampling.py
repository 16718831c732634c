"""Sampling: the distribution is transformers', and what is drawn for a line is the line's own business."""

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, VisionEncoderDecoderModel

from tests.parity.models import MAX_LENGTH, VOCAB_SIZE, Case, lively_reference
from trocr_fast.config import Architecture
from trocr_fast.engine import Engine
from trocr_fast.model import Network
from trocr_fast.sampling import draw, make_warpers, splitmix64, uniform
from trocr_fast.search import Hypothesis, Sampling, SearchSettings, make_processors

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@cache
def reference() -> tuple[VisionEncoderDecoderModel, Tensor]:
    """With less sure scores than the model comes with, so that there is something to draw."""
    model, pixels, _ = lively_reference(Case("C"))
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(0.4)
    return model, pixels


@cache
def network(device: str = "cpu") -> Network:
    model, _ = reference()
    weights = {name: tensor.to(device) for name, tensor in model.state_dict().items()}
    return Network(Architecture.from_dict(model.config.to_dict(), "reference"), weights)


def settings_of(max_length: int = MAX_LENGTH, processors: Any = (), **sampling: Any) -> SearchSettings:
    generation = reference()[0].generation_config
    tokens = generation.decoder_start_token_id, (generation.eos_token_id,)
    return SearchSettings(*tokens, max_length, processors=processors, sampling=Sampling(**sampling))


def run(engine: Engine, pictures: list[Tensor], seeds: list[int]) -> list[Hypothesis]:
    lines = [engine.add(picture, seed=seed) for picture, seed in zip(pictures, seeds, strict=True)]
    found: dict[int, list[Hypothesis]] = {}
    while not engine.is_idle:
        found.update(engine.step())
        engine.check_integrity()
    return [found[line][0] for line in lines]


# Random numbers


def test_splitmix64_gives_its_published_numbers() -> None:
    """Of the seed 1234567, and of states beyond the largest int64."""
    gamma, expected = 0x9E3779B97F4A7C15, [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821
    ]  # fmt: skip
    states = [_signed(1234567 + step * gamma) for step in range(5)]
    assert [number % 2**64 for number in splitmix64(torch.tensor(states)).tolist()] == expected
    assert splitmix64(torch.tensor(0)).item() % 2**64 == 0xE220A8397B1DCDAF


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", ["seed of the settings", "seed of the line", "step"])
def test_numbers_are_uniform_and_neighbours_independent(axis: str, device: str) -> None:
    num, keys = 40_000, [torch.full((), key, device=device) for key in (3, 5, 7)]
    keys[["seed of the settings", "seed of the line", "step"].index(axis)] = torch.arange(num, device=device)
    u = uniform(*keys).cpu()
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1 and len(u.unique()) == num
    for distance in (1, 2, 64):
        cells = (u[:-distance] * 16).long() * 16 + (u[distance:] * 16).long()
        assert p_value(cells.bincount(minlength=256), torch.full((256,), 1 / 256)) > 1e-3
        assert torch.stack([u[:-distance], u[distance:]]).corrcoef()[0, 1].abs() < 4 / num**0.5
    fine = u.mul(2**26).frac()  # the low half of the bits, too
    assert p_value((fine * 256).long().bincount(minlength=256), torch.full((256,), 1 / 256)) > 1e-3


def test_every_key_counts_for_itself() -> None:
    """Keys are not summed up: none of the small ones gives the number of another."""
    small = torch.arange(12)
    u = uniform(small.view(-1, 1, 1), small.view(1, -1, 1), small)
    assert len(u.unique()) == 12**3
    large = torch.tensor([0, 2**62, 2**63 - 1])
    assert len(uniform(large.view(-1, 1), large).unique()) == 9


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Of Pearson's chi-squared test; what is expected less than five times is counted as one."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    there = expected > 0
    assert not counts[~there].any()
    statistic = ((counts - expected)[there] ** 2 / expected[there]).sum()
    freedom = there.sum() - 1
    return float(torch.special.gammaincc(freedom / 2, statistic / 2)) if freedom > 0 else 1.0


# One draw


@pytest.mark.parametrize("device", DEVICES)
def test_a_draw_is_where_the_cumulated_probability_exceeds_the_number(device: str) -> None:
    scores = torch.randn(200, 300, generator=torch.Generator().manual_seed(1)) * 3
    scores[:, ::3] = -torch.inf
    u = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens, possible = draw(scores.to(device), u.to(device))
    assert possible.all()
    for row, number, token in zip(scores.double().softmax(-1), u, tokens.tolist(), strict=True):
        assert row[token] > 0 and row[:token].sum() <= number < row[: token + 1].sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab_size", [3, 50265])
def test_the_least_and_the_greatest_number_draw_tokens_that_can_be(vocab_size: int, device: str) -> None:
    scores = torch.full((6, vocab_size), -torch.inf)
    scores[0, 1] = scores[1, 0] = scores[2, -1] = 0.0
    scores[3, 1:-1] = torch.randn(vocab_size - 2, generator=torch.Generator().manual_seed(1))
    scores[4] = scores[5] = torch.randn(vocab_size, generator=torch.Generator().manual_seed(2)) * 30
    scores[5, -1] = -1000.0  # not -infinity, and nevertheless of probability 0
    for number in (0.0, 1 - 2**-53):
        tokens, possible = draw(scores.to(device), torch.full((6,), number, dtype=torch.float64, device=device))
        assert possible.all() and (scores.double().softmax(-1)[range(6), tokens.cpu()] > 0).all(), number
        assert tokens[:3].tolist() == [1, 0, vocab_size - 1]


def test_scores_that_allow_no_draw_are_told() -> None:
    scores = torch.zeros(5, 4)
    scores[0, 2], scores[1, 2], scores[2], scores[3, 2] = torch.nan, torch.inf, -torch.inf, -torch.inf
    _, possible = draw(scores, torch.full((5,), 0.5, dtype=torch.float64))
    assert possible.tolist() == [False, False, False, True, True]


# The distribution of transformers

WARPERS: list[dict[str, Any]] = [
    {"top_k": 0},
    {"top_k": 0, "temperature": 0.5},
    {"top_k": 0, "temperature": 2.0},
    {"top_k": 3},
    {"top_k": 0, "top_p": 0.7},
    {"top_k": 0, "min_p": 0.2},
    {"top_k": 0, "typical_p": 0.6},
    {"top_k": 0, "epsilon_cutoff": 0.08},
    {"top_k": 0, "eta_cutoff": 0.3},
]


def test_warpers_and_their_order_are_those_of_transformers() -> None:
    """To the bit, for every combination of them."""
    model, _ = reference()
    history = torch.zeros(30, 1, dtype=torch.int64)
    scores = 2 * torch.randn(30, VOCAB_SIZE, generator=torch.Generator().manual_seed(5))
    choices = {
        "temperature": (1.0, 3.0), "top_k": (0, 9), "top_p": (1.0, 0.8), "min_p": (None, 0.1), "typical_p": (1.0, 0.7),
        "epsilon_cutoff": (0.0, 0.08), "eta_cutoff": (0.0, 0.4),
    }  # fmt: skip
    for values in itertools.product(*choices.values()):
        settings = dict(zip(choices, values, strict=True))
        expected = model._get_logits_processor(GenerationConfig(do_sample=True, **settings), 1, device="cpu")
        found = scores
        for warper in make_warpers(Sampling(**settings), torch.device("cpu")):
            found = warper(history, found)
        assert torch.equal(found, expected(history, scores)), settings


@pytest.mark.parametrize("warpers", WARPERS, ids=str)
def test_tokens_are_drawn_from_the_distribution_of_transformers(warpers: dict[str, Any]) -> None:
    """Of the first token, and of the second after the most frequent first."""
    model, pixels = reference()
    picture, num = pixels[3], 1000
    engine = Engine(network(), settings_of(3, seed=11, **warpers), 250)
    rows = [found.tokens for found in run(engine, [picture] * num, list(range(num)))]
    first = torch.tensor([row[1] for row in rows])
    likely = int(first[first != model.generation_config.eos_token_id].mode().values)
    second = torch.tensor([row[2] for row in rows if row[1] == likely])
    assert len(second) > 100
    for drawn, prompt in ((first, [rows[0][0]]), (second, [rows[0][0], likely])):
        probabilities = _distribution(model, picture, prompt, warpers)
        counts = drawn.bincount(minlength=VOCAB_SIZE)
        assert not counts[probabilities == 0].any()
        assert p_value(counts, probabilities) > 1e-3, (counts, probabilities * len(drawn))
    plain = _distribution(model, picture, rows[0][:1], {"top_k": 0})
    assert p_value(first.bincount(minlength=VOCAB_SIZE), plain) < 1e-6 or warpers == {"top_k": 0}  # it did something


def _distribution(model: VisionEncoderDecoderModel, picture: Tensor, prompt: list[int], warpers: Any) -> Tensor:
    (scores,) = model.generate(
        picture.unsqueeze(0), decoder_input_ids=torch.tensor([prompt]), max_new_tokens=1, do_sample=True,
        return_dict_in_generate=True, output_scores=True, **warpers,
    ).scores  # fmt: skip
    return scores[0].softmax(-1)


def test_processors_come_before_the_draw() -> None:
    _, pixels = reference()
    settings = settings_of(12, make_processors(1.0, 1), temperature=2.0)
    for found in run(Engine(network(), settings, 12), list(pixels[:12]), list(range(12))):
        assert len(set(found.tokens[:-1])) == len(found.tokens[:-1])  # the end token may be the start token
    plain = run(Engine(network(), settings_of(12, temperature=2.0), 12), list(pixels[:12]), list(range(12)))
    assert sum(len(set(found.tokens[:-1])) < len(found.tokens[:-1]) for found in plain) > 6


# A line's own draws


def test_a_line_does_not_depend_on_neighbours_order_or_swapping() -> None:
    _, pixels = reference()
    settings = settings_of(temperature=1.5, seed=4)
    num = 16
    seeds = [7 * row for row in range(num)]
    alone = run(Engine(network(), settings, 1), list(pixels[:num]), seeds)
    assert len({len(found.tokens) for found in alone}) > 8
    order = torch.randperm(num, generator=torch.Generator().manual_seed(3)).tolist()
    for lanes, num_blocks in ((3, None), (7, None), (6, 6 * 9)):
        engine = Engine(network(), settings, lanes, num_blocks=num_blocks)
        found = run(engine, [pixels[row] for row in order], [seeds[row] for row in order])
        assert [one.tokens for one in found] == [alone[row].tokens for row in order], lanes
        for one, row in zip(found, order, strict=True):
            assert one.log_probs == pytest.approx(alone[row].log_probs, abs=1e-4)
        assert (engine.num_swaps > 0) == (num_blocks is not None)


def test_both_seeds_matter() -> None:
    _, pixels = reference()

    def tokens(seed: int, line_seed: int) -> list[int]:
        (found,) = run(Engine(network(), settings_of(temperature=3.0, seed=seed), 1), [pixels[0]], [line_seed])
        return found.tokens

    assert tokens(1, 2) == tokens(1, 2)
    assert len({tuple(tokens(*seeds)) for seeds in ((1, 2), (2, 1), (1, 1), (2**63 - 1, 2), (1, 2**63 - 1))}) == 5


def test_confidence_is_of_the_scores_as_the_model_gave_them() -> None:
    model, pixels = reference()
    settings = settings_of(temperature=2.0, top_k=5)
    for picture, found in zip(pixels, run(Engine(network(), settings, 8), list(pixels[:8]), [0] * 8), strict=False):
        tokens = torch.tensor([found.tokens])
        with torch.no_grad():
            logits = model(picture.unsqueeze(0), decoder_input_ids=tokens[:, :-1]).logits
        log_probs = logits.log_softmax(-1)[0].gather(1, tokens[0, 1:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(found.log_probs), log_probs, rtol=1e-4, atol=1e-4)


def test_low_temperature_is_greedy_and_one_too_low_an_error() -> None:
    model, pixels = reference()
    greedy = model.generate(pixels[:12], max_length=MAX_LENGTH).tolist()
    cold = run(Engine(network(), settings_of(temperature=1e-5), 12), list(pixels[:12]), list(range(12)))
    assert all(found.tokens == row[: len(found.tokens)] for found, row in zip(cold, greedy, strict=True))
    assert len({len(found.tokens) for found in cold}) > 3
    for more in ({}, {"eta_cutoff": 0.1}):
        (frozen,) = run(Engine(network(), settings_of(temperature=1e-45, **more), 1), [pixels[0]], [0])
        assert frozen.error is not None and "finite" in frozen.error


@pytest.mark.parametrize("warpers", [{"top_k": 0}, {"eta_cutoff": 0.1, "typical_p": 0.9, "min_p": 0.01}], ids=str)
def test_a_line_whose_scores_are_no_numbers_touches_no_other(warpers: dict[str, Any]) -> None:
    _, pixels = reference()
    settings = settings_of(temperature=1.5, **warpers)
    alone = run(Engine(network(), settings, 4), list(pixels[:3]), [5, 6, 7])
    first, broken, *rest = run(
        Engine(network(), settings, 4), [pixels[0], torch.full_like(pixels[0], torch.nan), *pixels[1:3]], [5, 9, 6, 7]
    )
    assert broken.error is not None
    assert [found.tokens for found in (first, *rest)] == [found.tokens for found in alone]


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("temperature", [0, -1.0, float("nan"), float("inf"), "1"]),
        ("top_k", [-1, 2.5, None]),
        ("top_p", [-0.1, 1.1, float("nan")]),
        ("min_p", [-0.1, 1.1]),
        ("typical_p", [0, 1.1]),
        ("epsilon_cutoff", [-0.1, 1]),
        ("eta_cutoff", [-0.1, 1]),
        ("seed", [-1, 2**63, 0.5]),
    ],
)
def test_values_out_of_range_are_named(option: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{option}: expected .*, got {value!r}$"):
            Sampling(**{option: value})
