"""Calls of an accelerated model that the engine follows give what transformers gives."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, VisionEncoderDecoderModel
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteria

from tests.drop_in.calls import Collect, assert_followed, builtin, fallbacks_of, outcome, sample_line
from tests.parity.models import Case, build, lively_reference, pictures
from trocr_fast import accelerate

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")


class Stop(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] + input_ids.shape[1] > 17


def favour(input_ids: Tensor, scores: Tensor) -> Tensor:
    scores[:, 5] += 1
    return scores


FOLLOWED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "new tokens": {"max_new_tokens": 5},
    "configuration": {"generation_config": GenerationConfig(max_length=9, num_beams=3, eos_token_id=4)},
    "configuration without anything": {"generation_config": GenerationConfig(max_length=9)},
    "argument over configuration": {"generation_config": GenerationConfig(max_length=15, num_beams=3), "num_beams": 1},
    "criteria": {"max_length": 12, "stopping_criteria": StoppingCriteriaList([Stop()])},
    "criteria of beams": {"max_length": 12, "num_beams": 3, "stopping_criteria": StoppingCriteriaList([Stop()])},
    "processor": {"max_length": 12, "logits_processor": LogitsProcessorList([favour])},
    "time": {"max_length": 12, "max_time": 1000.0},
    "time as a criterion": {"max_length": 12, "stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1000.0)])},
    "none": {"max_length": 12, "num_beams": 2, "top_k": None, "streamer": None, "assistant_model": None},
    "no synced gpus": {"max_length": 12, "synced_gpus": False, "interpolate_pos_encoding": False},
    "labels": {"max_length": 12, "labels": torch.ones(5, 3, dtype=torch.int64)},
    "no cache": {"max_length": 12, "use_cache": False},
    "no end": {"max_length": 12, "eos_token_id": None},
    "an end": {"max_length": 12, "eos_token_id": 4, "num_beams": 3, "low_memory": None},
    "guidance of one": {"max_length": 12, "guidance_scale": 1.0},
    "prompt of nothing": {"max_length": 12, "decoder_input_ids": None},
    "no earlier keys": {"max_length": 12, "past_key_values": None},
    "a start each": {"max_length": 12, "decoder_start_token_id": [3, 4, 5, 6, 7]},
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_followed(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor, case: str
) -> None:
    expected = outcome(reference, pixels, **FOLLOWED[case])
    assert isinstance(expected, list)
    found, fallbacks = fallbacks_of(lambda: outcome(model, pixels, **FOLLOWED[case]))
    assert found == expected and not fallbacks
    assert outcome(model, pixel_values=pixels, **FOLLOWED[case]) == expected


def test_positional_arguments(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor
) -> None:
    arguments = (GenerationConfig(max_length=12), LogitsProcessorList([favour]), StoppingCriteriaList([Stop()]))
    found, fallbacks = fallbacks_of(lambda: outcome(model, pixels, *arguments))
    assert found == outcome(reference, pixels, *arguments) and not fallbacks
    assert inspect.signature(model.generate) == inspect.signature(reference.generate)


def test_defaults_of_the_model(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor
) -> None:
    for one in (model, reference):
        one.generation_config.update(max_new_tokens=8, num_beams=3, repetition_penalty=1.3, num_return_sequences=2)
    found, fallbacks = fallbacks_of(lambda: outcome(model, pixels))
    assert found == outcome(reference, pixels) and len(found) == 10 and not fallbacks


def test_streamer(model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor) -> None:
    got = []
    for one in (model, reference):
        streamer = Collect()
        _, fallbacks = fallbacks_of(lambda: one.generate(pixels[:1], max_length=12, streamer=streamer))  # noqa: B023
        assert not fallbacks
        got.append(streamer.got)
    assert got[0] == got[1] and len(got[0]) > 5


def test_results_are_ordinary(model: VisionEncoderDecoderModel, pixels: Tensor) -> None:
    """No inference tensors, no graph, and nothing of the engine in them."""
    for settings in ({}, {"num_beams": 2}):
        out = model.generate(
            pixels, max_length=12, return_dict_in_generate=True, output_scores=True, output_logits=True, **settings
        )
        assert out.past_key_values is None and "past_key_values" not in out
        for tensor in (out.sequences, *out.scores, *out.logits):
            assert not tensor.is_inference() and not tensor.requires_grad
            tensor += 1


def test_rows_as_long_as_the_positions(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor
) -> None:
    longest = model.config.decoder.max_position_embeddings + 1  # the last token is not fed
    settings = {"eos_token_id": None, "use_cache": True}
    assert outcome(model, pixels[:2], max_length=longest, **settings) == outcome(
        reference, pixels[:2], max_length=longest, **settings
    )
    with pytest.raises(ValueError, match=r"at most 64 tokens .* got one token more"):
        model.generate(pixels[:2], max_length=longest + 1, **settings)
    with pytest.raises(IndexError):
        reference.generate(pixels[:2], max_length=longest + 1, **settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_pixels_of_another_dtype(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor, dtype: torch.dtype
) -> None:
    assert_followed(model, reference, pixels.to(dtype))


def test_prompts_with_pads_of_sinusoidal_positions() -> None:
    """All tokens of a prompt are fed at once, and then transformers does not count the pad tokens among them."""
    reference, some, _ = lively_reference(Case("B"))
    model = copy.deepcopy(reference)
    accelerate(model, unsupported="raise")
    prompt = torch.tensor([[2, 1, 5, 1, 1, 7], [2, 3, 1, 1, 4, 1]])
    for settings in ({"use_cache": True}, {"use_cache": False}, {"num_beams": 3, "use_cache": True}):
        settings |= {"max_length": 20, "return_dict_in_generate": True, "output_logits": True}
        found, expected = (one.generate(some[:2], decoder_input_ids=prompt, **settings) for one in (model, reference))
        torch.testing.assert_close(found.logits[0], expected.logits[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(found.sequences, expected.sequences)


def test_stop_strings() -> None:
    processor, plain = builtin()
    model = copy.deepcopy(plain)
    accelerate(model, unsupported="raise")
    pixel_values = processor(sample_line(), return_tensors="pt").pixel_values
    text = processor.batch_decode(plain.generate(pixel_values), skip_special_tokens=True)[0]
    settings = {"stop_strings": [text[2:4]], "tokenizer": processor.tokenizer, "max_new_tokens": 20}
    expected = outcome(plain, pixel_values, **settings)
    assert isinstance(expected, list) and outcome(model, pixel_values, **settings) == expected


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("change", ["shorter", "other end", "tensor end", "not a number", "repaired"])
def test_what_the_engine_must_not_decide_by_itself(search: dict[str, Any], change: str) -> None:
    model, pixels, _ = lively_reference(Case("A"))
    asked: dict[str, Any] = {"max_length": 14, **search}
    if change == "shorter":
        asked["stopping_criteria"] = StoppingCriteriaList([MaxLengthCriteria(5)])
    elif change == "other end":
        asked["stopping_criteria"] = StoppingCriteriaList([EosTokenCriteria(eos_token_id=[9])])
    elif change == "tensor end":
        asked["eos_token_id"] = torch.tensor([3, 7])
    else:
        with torch.no_grad():
            model.decoder.output_projection.weight[9] = float("nan")
        asked["remove_invalid_values"] = change == "repaired"
    expected = model.generate(pixels[:6], **asked)
    with accelerate(model, unsupported="raise"):
        assert torch.equal(model.generate(pixels[:6], **asked), expected)


def test_a_checkpoint_that_transformers_cannot_run(tmp_path: Path) -> None:
    """transformers 5 leaves the sinusoidal table of a loaded model empty."""
    made = build(Case("B", use_cache=False), 1)
    made.save_pretrained(tmp_path)
    some = pictures(made, 3, 0)
    loaded = VisionEncoderDecoderModel.from_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="meta"):
        loaded.generate(some, max_length=12)
    accelerate(loaded, unsupported="raise")
    for settings in ({}, {"num_beams": 3}, {"use_cache": True}):
        assert outcome(loaded, some, max_length=12, **settings) == outcome(made, some, max_length=12, **settings)
    assert isinstance(outcome(loaded.to(torch.bfloat16), some, max_length=12), list)
