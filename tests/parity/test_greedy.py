"""Greedy search gives transformers' tokens in fp32: every family and flag, every batch, both cross memories."""

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.parity.models import MAX_LENGTH, NUM_PICTURES, Case, cut, greedy, is_lively, lively_reference, save
from trocr_fast.cross_memory import KINDS
from trocr_fast.model import Model

ENCODERS = [{"encoder": kind, "qkv_bias": bias} for kind in ("vit", "deit") for bias in (False, True)]
HEADS = [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}]
SHAPES = [
    {},
    {"image_size": [12, 40], "patch_size": [4, 8]},
    {"image_size": [18, 35], "patch_size": [4, 8]},  # a remainder that no patch covers
]
BRIDGES = [
    {"bridge": "direct"},
    {"bridge": "proj"},
    {"bridge": "proj", "encoder_width": 32, "encoder_heads": 2},  # equal widths: neither projection nor width named
    {"encoder_width": 39, "encoder_heads": 3, "width": 30, "heads": 5},  # head sizes 13 and 6
]
POSITIONS = [{"use_learned_position_embeddings": True}, {"use_learned_position_embeddings": False}]
ACTIVATIONS = ["gelu", "relu", "silu", "gelu_new"]
NUM_SAMPLED = 40


def product_cases(count: int) -> list[Case]:
    """A seeded sample of the whole product."""
    everything = itertools.product("ABC", ENCODERS, HEADS, SHAPES, BRIDGES, POSITIONS, ACTIVATIONS, [True, False])
    cases = []
    for family, encoder, head, shape, bridge, position, activation, use_cache in everything:
        decoder = {**head, **position, "activation_function": activation}
        cases.append(
            Case(
                family,
                decoder=decoder,
                use_cache=use_cache,
                encoder_activation=activation,
                **encoder,
                **shape,
                **bridge,
            )
        )
    return random.Random(7).sample(cases, count)


SPECIAL_CASES = [
    Case("A"),
    Case("B", use_cache=False),  # as shipped
    Case("B", use_cache=True),
    Case("C", encoder="deit", qkv_bias=True),
    # Positions of sinusoidal decoders depend on pad tokens fed, and on whether transformers caches.
    Case("B", start=1, use_cache=False),
    Case("B", start=1, use_cache=True),
    Case("B", pad=5, start=2, use_cache=False),
    Case("B", pad=5, start=2, use_cache=True),
    Case("A", eos=2),  # the start token is the end token, as in TrOCR
    Case("B", pad=0, start=0, use_cache=False),
    Case("B", width=33, heads=3, use_cache=False),  # an odd width pads the table with a zero
    Case("A", decoder={"layernorm_embedding": False}),  # neither LayerNorm nor scaling, as in no family
    Case("A", pad=0, start=1),
    Case("A", start=0),
    Case("A", eos=[2, 7]),
    Case("C", eos=[3, 9], pad=0, start=1, use_cache=False),
]


@pytest.mark.parametrize("case", SPECIAL_CASES + product_cases(NUM_SAMPLED), ids=str)
def test_tokens_equal_transformers(case: Case, tmp_path: Path) -> None:
    reference, pixels, eos = lively_reference(case)
    expected = [cut(row, eos) for row in reference.generate(pixels, max_length=MAX_LENGTH).tolist()]
    assert is_lively(expected, eos)
    save(reference, tmp_path)
    for kind in KINDS:
        model = Model.load(tmp_path, torch.device("cpu"), torch.float32, kind)
        for batch in (1, 7, NUM_PICTURES):
            # alone and in odd batches a sample is enough; the whole set goes in one large batch
            rows = range(0, NUM_PICTURES, 10) if batch == 1 else range(0, 21 if batch == 7 else NUM_PICTURES, batch)
            for first in rows:
                found = greedy(model, pixels[first : first + batch], MAX_LENGTH)
                got = [hypothesis.tokens for hypothesis in found]
                assert got == expected[first : first + batch], (kind, batch, first)
                ends = eos if isinstance(eos, list) else [eos]
                assert [hypothesis.ended for hypothesis in found] == [row[-1] in ends for row in got]


def test_the_sample_has_every_value() -> None:
    """Each value of each factor, at least three times."""
    cases = product_cases(NUM_SAMPLED)
    seen = Counter()
    for case in cases:
        fields = {**vars(case), **case.decoder, "decoder": None}
        seen.update((name, str(value)) for name, value in fields.items())
    factors = [*ENCODERS, *HEADS, *SHAPES, *BRIDGES, *POSITIONS, {"family": "B"}, {"family": "C"}, {"use_cache": False}]
    wanted = {(name, str(value)) for factor in factors for name, value in factor.items()}
    wanted |= {("activation_function", activation) for activation in ACTIVATIONS}
    assert not {pair: seen[pair] for pair in wanted if seen[pair] < 3}


@pytest.mark.gpu
@pytest.mark.parametrize("case", SPECIAL_CASES, ids=str)
def test_tokens_equal_transformers_on_a_gpu(case: Case, tmp_path: Path) -> None:
    """The reference stays on the CPU: in fp32 both devices choose the same tokens."""
    reference, pixels, eos = lively_reference(case)
    expected = [cut(row, eos) for row in reference.generate(pixels, max_length=MAX_LENGTH).tolist()]
    save(reference, tmp_path)
    for kind in KINDS:
        model = Model.load(tmp_path, torch.device("cuda"), torch.float32, kind)
        assert [hypothesis.tokens for hypothesis in greedy(model, pixels, MAX_LENGTH)] == expected, kind
