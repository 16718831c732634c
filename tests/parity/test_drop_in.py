"""An accelerated model gives transformers' tokens and scores in fp32, whatever `generate` is asked for."""

import copy
import random
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, VisionEncoderDecoderModel
from transformers.utils import ModelOutput

from tests.parity.models import VOCAB_SIZE, Case, lively_reference
from trocr_fast import accelerate, kept_engine
from trocr_fast.engine import Engine
from trocr_fast.model import Network
from trocr_fast.search import SearchSettings

MAX_LENGTH = 20
NUM_COMBINATIONS = 648  # as many of each family
NUM_FOR_THE_ENGINE = 75  # of each family and search
BATCHES = (1, 3, 17)
TOLERANCE = 2e-4  # of sums of up to nineteen log-probabilities in fp32
FAMILIES = {
    "A": Case("A"),
    "B": Case("B", use_cache=False),  # as shipped
    "C": Case("C", encoder="deit", qkv_bias=True),
}
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams 2": {"num_beams": 2},
    "beams 4": {"num_beams": 4},
    "beams 10": {"num_beams": 10},
    "sample": {"do_sample": True},
    "sample beams": {"do_sample": True, "num_beams": 3},
}
LENGTH_PENALTIES = (-1.0, 0.0, 1.0, 2.0)
EARLY_STOPPING = (True, False, "never")
SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "typical": {"typical_p": 0.6},
    "epsilon": {"epsilon_cutoff": 0.05},
    "eta": {"eta_cutoff": 0.1},
    "min_p": {"min_p": 0.2},
    "top_h": {"top_h": 0.5},
}


class Shift(LogitsProcessor):
    """Looks at every row and at its length."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        shifted = scores.clone()
        rows = torch.arange(len(scores))
        shifted[rows, (input_ids[:, -1] + input_ids.shape[1]) % VOCAB_SIZE] -= 1.5
        return shifted


def allowed(line: int, tokens: Tensor) -> list[int]:
    """Another third of the vocabulary is out of bounds at every line and step."""
    return [token for token in range(VOCAB_SIZE) if (token + line + len(tokens)) % 3]


PROCESSORS: dict[str, dict[str, Any]] = {
    "none": {},
    "repetition": {"repetition_penalty": 1.7},
    "ngram": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[3], [5, 6], [7, 8, 9]]},
    "min length": {"min_length": 9},
    "min new": {"min_new_tokens": 7},
    "forced bos": {"forced_bos_token_id": 6},
    "forced eos": {"forced_eos_token_id": 4},
    "suppress": {"suppress_tokens": [3, 8]},
    "begin suppress": {"begin_suppress_tokens": [2, 3, 9]},
    "decay": {"exponential_decay_length_penalty": (4, 1.4)},
    "bias": {"sequence_bias": [[[4], 2.0], [[5, 6], -3.0]]},
    "prefix": {"prefix_allowed_tokens_fn": allowed},
    "custom": {"logits_processor": LogitsProcessorList([Shift()])},
    "renormalise": {"renormalize_logits": True, "suppress_tokens": [5]},
    "remove invalid": {"remove_invalid_values": True},
}
TOKENS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "two ends": {"eos_token_id": [3, 7]},
    "pad 0": {"pad_token_id": 0},
    "start is the end": {"decoder_start_token_id": 4, "eos_token_id": 4},
    "pad is the end": {"pad_token_id": 4, "eos_token_id": 4},
    "start is pad": {"decoder_start_token_id": 1},
    "no end": {"eos_token_id": None, "max_length": 9},
}
PROMPTS = ("none", "short", "with pads")
CACHES = (None, True, False)
OUTPUTS = ("tensor", "dict")


def combinations() -> list[dict[str, Any]]:
    """Each factor goes through its values in an order of its own, so that all come up as often."""
    generator = random.Random(5)
    factors = {
        "search": (*SEARCHES, "greedy", "beams 4", "sample"),
        "length_penalty": LENGTH_PENALTIES,
        "early_stopping": EARLY_STOPPING,
        "processor": tuple(PROCESSORS),
        "second_processor": tuple(PROCESSORS),
        "sampling": tuple(SAMPLING),
        "tokens": (*TOKENS, *["as it is"] * 5),
        "batch": BATCHES,
        "returned": (1, 1, 2),
        "prompt": ("none", "none", "none", *PROMPTS),
        "use_cache": CACHES,
        "output": OUTPUTS,
    }
    columns = {}
    for name, values in factors.items():
        column = [values[i % len(values)] for i in range(NUM_COMBINATIONS // 3)]
        columns[name] = [column] + [generator.sample(column, len(column)) for _ in range(3)]
    return [
        {"family": family, **{name: shuffled[1 + place][i] for name, shuffled in columns.items()}}
        for place, family in enumerate(FAMILIES)
        for i in range(NUM_COMBINATIONS // 3)
    ]


def settings(case: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`."""
    chosen = {"max_length": MAX_LENGTH, **SEARCHES[case["search"]]}
    beams = chosen.get("num_beams", 1)
    if beams > 1:
        chosen |= {name: case[name] for name in ("length_penalty", "early_stopping")}
    if "do_sample" in chosen:
        chosen |= SAMPLING[case["sampling"]]
    if "do_sample" in chosen or beams > 1:
        chosen["num_return_sequences"] = case["returned"]
    chosen |= TOKENS[case["tokens"]]
    # with two, so that their order shows; never two that leave no token, whose scores are all -inf
    chosen |= PROCESSORS[case["processor"]]
    if "prefix" not in (case["processor"], case["second_processor"]):
        chosen |= PROCESSORS[case["second_processor"]]
    if case["prompt"] != "none":
        start = chosen.get("decoder_start_token_id", 2)
        rest = [[5, 9], [6, 3], [7, 7]] if case["prompt"] == "short" else [[1, 9], [6, 1], [1, 1]]
        rows = [[start, *rest[line % 3]] for line in range(case["batch"])]
        chosen["decoder_input_ids"] = torch.tensor(rows)
    if case["use_cache"] is not None:
        chosen["use_cache"] = case["use_cache"]
    if case["output"] == "dict":
        chosen |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    return chosen


@cache
def models(family: str) -> tuple[VisionEncoderDecoderModel, VisionEncoderDecoderModel, Tensor, Any]:
    """The reference, its accelerated copy, pictures, and the end token."""
    reference, pixels, eos = lively_reference(FAMILIES[family])
    ours = copy.deepcopy(reference)
    accelerate(ours, unsupported="raise", cross_memory={"A": "kv", "B": "latent", "C": "kv"}[family])
    return reference, ours, pixels, eos


def generate(model: VisionEncoderDecoderModel, pixels: Tensor, asked: dict[str, Any]) -> ModelOutput | Tensor | str:
    """The result, or the error: two processors can leave nothing to sample from, and some need an end token."""
    torch.manual_seed(11)
    try:
        return model.generate(pixels, **asked)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"[:60]  # some show scores behind


def candidates(model: VisionEncoderDecoderModel, pixels: Tensor, asked: dict[str, Any]) -> list[Tensor]:
    """The accumulated scores that beam search chose from, best first: [lines, candidates] a step."""
    seen = []
    own = model._get_top_k_continuations

    def record(**given: Any) -> Any:
        chosen = own(**given)
        seen.append(chosen[0].double())
        return chosen

    model._get_top_k_continuations = record
    try:
        generate(model, pixels, asked)
    finally:
        del model._get_top_k_continuations
    return seen


def is_tie(reference: VisionEncoderDecoderModel, pixels: Tensor, asked: dict[str, Any], line: int, step: int) -> bool:
    """Whether, before a step, the order of a line's beams was within twice the reference's own rounding error."""
    exact = candidates(copy.deepcopy(reference).double(), pixels.double(), asked)
    for e, r in list(zip(exact, candidates(reference, pixels, asked), strict=False))[:step]:
        alive = e[line] > -1e8
        gaps, error = -e[line][alive].diff(), (e[line] - r[line])[alive].abs().max()
        if len(gaps) and gaps.min() <= 2 * error:
            return True
    return False


def first_difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[int, int] | None:
    """Step and row of it, where scores differ by more than rounding."""
    assert len(found) == len(expected)
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        equal = torch.isclose(a, b, atol=TOLERANCE, rtol=1e-4, equal_nan=True).all(dim=1)
        if not equal.all():
            return step, int(equal.int().argmin())
    return None


def assert_equal(
    found: ModelOutput, expected: ModelOutput, reference: VisionEncoderDecoderModel, pixels: Tensor, asked: Any
) -> bool:
    """Tokens to the last, scores but for rounding.

    Gives whether two beams tied in the reference itself: then those that were never returned may have changed places,
    and the scores of every step, which are kept for all beams, are compared up to there.
    """
    assert type(found) is type(expected) and found.keys() <= expected.keys()
    assert expected.keys() - found.keys() <= {"past_key_values"}
    assert torch.equal(found.sequences, expected.sequences)
    tied = False
    if "beam_indices" in expected:
        sides = [out.sequences_scores for out in (found, expected)]
        torch.testing.assert_close(*sides, atol=TOLERANCE, rtol=1e-4, equal_nan=True)  # NaN where -inf was weighed
    for name in ("scores", "logits"):
        where = first_difference(found[name], expected[name])
        if where is not None:
            line = where[1] // asked.get("num_beams", 1)
            tied = "beam_indices" in expected and is_tie(reference, pixels, asked, line, where[0])
            assert tied, (name, where)
    if not tied:
        if "beam_indices" in expected:
            assert torch.equal(found.beam_indices, expected.beam_indices)
        sides = [(out.sequences, out.scores, out.get("beam_indices")) for out in (found, expected)]
        transitions = [reference.compute_transition_scores(*side) for side in sides]
        torch.testing.assert_close(*transitions, atol=TOLERANCE, rtol=1e-4, equal_nan=True)
    return tied


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """The engines that were made, of a few lanes and with blocks for a part of their lines."""
    made = []

    def small(network: Network, settings: SearchSettings, num_lanes: int, **more: Any) -> Engine:
        num_blocks = settings.num_beams * settings.max_length * 3 // 2
        made.append(Engine(network, settings, min(num_lanes, 5), 3, num_blocks=num_blocks, **more))
        return made[-1]

    monkeypatch.setattr(kept_engine, "Engine", small)
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.filterwarnings("error::trocr_fast.drop_in.FallbackWarning")
def test_tokens_and_scores_equal_transformers(family: str, search: str, engines: list[Engine]) -> None:
    reference, ours, pixels, eos = models(family)
    rows, ended, refused, compared, ties = [], 0, 0, 0, 0
    for case in combinations():
        if (case["family"], case["search"]) != (family, search):
            continue
        first = len(rows) % 20
        asked = settings(case)
        batch = pixels[first : first + case["batch"]]
        expected, found = generate(reference, batch, asked), generate(ours, batch, asked)
        if isinstance(expected, str):
            refused += 1
            assert found == expected, case
            continue
        compared += 1
        if isinstance(expected, Tensor):
            assert torch.equal(found, expected), case
        else:
            try:
                ties += assert_equal(found, expected, reference, batch, asked)
            except AssertionError as error:
                raise AssertionError(case) from error
        tokens = (expected if isinstance(expected, Tensor) else expected.sequences).tolist()
        rows += tokens
        ends = asked.get("eos_token_id", eos)
        ends = ends if isinstance(ends, list) else [ends]
        prompt = asked["decoder_input_ids"].shape[1] if "decoder_input_ids" in asked else 1
        ended += sum(bool({*row[prompt : MAX_LENGTH - 1]} & {*ends}) for row in tokens)
    print(f"{family}, {search}: {compared} equal, {refused} refused as by transformers, {ties} with tied beams")
    assert len(rows) > 150 and compared >= 20 and refused <= 4
    assert ties <= 2
    assert 2 * len({tuple(row) for row in rows}) > len(rows), "outputs are not varied"
    assert 10 * ended > len(rows), "few outputs ended early"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("search", [name for name in SEARCHES if not name.startswith("sample")])
@pytest.mark.filterwarnings("error::trocr_fast.drop_in.FallbackWarning")
def test_tokens_of_the_engine_equal_transformers(family: str, search: str, engines: list[Engine]) -> None:
    """Where only tokens are asked for; with few lanes and blocks, so that lines join, leave and are swapped out."""
    reference, ours, pixels, _ = models(family)
    generator = random.Random(f"{family}, {search}")
    by_row = [name for name in PROCESSORS if name not in ("prefix", "custom", "remove invalid")]
    neutral = {"sampling": "plain", "prompt": "none", "output": "tensor"}
    rows, compared = [], 0
    for number in range(NUM_FOR_THE_ENGINE):
        case = {
            "search": search,
            "processor": by_row[number % len(by_row)],
            "second_processor": generator.choice(by_row),
            "length_penalty": LENGTH_PENALTIES[number % 4],
            "early_stopping": generator.choice(EARLY_STOPPING),
            "tokens": generator.choice([*TOKENS, *["as it is"] * 5]),
            "batch": BATCHES[number % 3],
            "returned": generator.choice((1, 2)),
            "use_cache": generator.choice(CACHES),
            **neutral,
        }
        asked = settings(case)
        first = generator.randrange(20)
        batch = pixels[first : first + case["batch"]]
        expected, found = generate(reference, batch, asked), generate(ours, batch, asked)
        if isinstance(expected, str):
            assert found == expected, case
            continue
        assert torch.equal(found, expected), case
        compared += 1
        rows += expected.tolist()
    assert compared > 0.9 * NUM_FOR_THE_ENGINE and len(engines) >= compared
    assert sum(engine.num_swaps for engine in engines) >= 10
    assert 3 * len({tuple(row) for row in rows}) > len(rows), "outputs are not varied"  # of 40 pictures, many times


def test_the_sample_has_every_value() -> None:
    """Each value of each factor in each family; and each processor with each kind of search."""
    cases = combinations()
    assert len(cases) >= 600
    seen = Counter((case["family"], name, value) for case in cases for name, value in case.items())
    factors = {
        "search": SEARCHES,
        "length_penalty": LENGTH_PENALTIES,
        "early_stopping": EARLY_STOPPING,
        "processor": PROCESSORS,
        "sampling": SAMPLING,
        "tokens": TOKENS,
        "batch": BATCHES,
        "prompt": PROMPTS,
        "use_cache": CACHES,
        "output": OUTPUTS,
    }
    wanted = [(family, name, value) for family in FAMILIES for name, values in factors.items() for value in values]
    assert not [one for one in wanted if seen[one] < 5]
    with_beams = [case for case in cases if case["search"].startswith("beams")]
    beams = Counter((case[name], case["processor"]) for case in with_beams for name in ("length_penalty",))
    assert len(beams) > 0.7 * len(LENGTH_PENALTIES) * len(PROCESSORS)
    sampled = Counter(case["sampling"] for case in cases if case["search"].startswith("sample"))
    assert min(sampled[name] for name in SAMPLING) >= 5


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_on_a_gpu(family: str) -> None:
    """The reference stays on the CPU: in fp32 both devices choose the same tokens."""
    reference, ours, pixels, _ = models(family)
    ours = copy.deepcopy(ours).cuda()
    for asked in ({}, {"num_beams": 4, "early_stopping": True}, {"num_beams": 4, "repetition_penalty": 1.7}):
        expected = reference.generate(pixels, max_length=MAX_LENGTH, **asked)
        assert torch.equal(ours.generate(pixels.cuda(), max_length=MAX_LENGTH, **asked).cpu(), expected), asked
