"""`TrOCR.generate`: every argument of transformers' `generate`, and what transformers returns."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, VisionEncoderDecoderModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from tests.drop_in.calls import Collect
from tests.parity.models import Case, build, lively_reference, pictures, save
from trocr_fast import CheckpointError, TrOCR, accelerate
from trocr_fast.checkpoint import BUILTIN
from trocr_fast.model import Model

LINES = Path(__file__).parent.parent / "examples" / "lines"
MAX_LENGTH = 12

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> TrOCR:
    """Without pictures and text, which generating does not need."""
    return TrOCR(folder, Model.load(folder, torch.device("cpu"), dtype), None, None)  # type: ignore[arg-type]


@cache
def small(name: str, folder: Path) -> tuple[VisionEncoderDecoderModel, TrOCR, Tensor]:
    """transformers' model, the same checkpoint here, and pictures for both."""
    if name == "built-in":
        reference = VisionEncoderDecoderModel.from_pretrained(BUILTIN, dtype=torch.float32).eval()
        ocr = TrOCR.from_pretrained(device="cpu")
        return reference, ocr, ocr.pixel_values([ocr.images.load(LINES / "total.png")] * 2)
    case = Case("A", bridge="proj") if name == "proj" else Case(name)
    reference, pixels, _ = lively_reference(case)
    return reference, load(save(reference, folder / name)), pixels[:4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(params=["A", "B", "C", "built-in"])
def three(request: pytest.FixtureRequest, folder: Path) -> tuple[VisionEncoderDecoderModel, TrOCR, Tensor]:
    return small(request.param, folder)


def seeded(model: Any, *arguments: Any, **settings: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(*arguments, **settings)


def outcome(model: Any, *arguments: Any, **settings: Any) -> Any:
    """Tokens, or what was raised."""
    try:
        return seeded(model, *arguments, **settings).tolist()
    except Exception as error:
        return type(error), str(error)


class Shift(torch.nn.Module):
    """A processor that looks at every row."""

    def forward(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        shifted = scores.clone()
        shifted[torch.arange(len(scores)), (input_ids[:, -1] + input_ids.shape[1]) % 14] -= 1.5
        return shifted


def allowed(line: int, tokens: Tensor) -> list[int]:
    return [token for token in range(14) if (token + line + len(tokens)) % 3]


def stop(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
    return input_ids[:, -1] + input_ids.shape[1] > 17


FOLLOWED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "length": {"max_length": 5},
    "both lengths": {"max_new_tokens": 9, "max_length": 5},
    "no cache": {"use_cache": False, "max_length": MAX_LENGTH},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
    "repetition": {"num_beams": 2, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 7},
    "sampled beams": {"do_sample": True, "num_beams": 2, "top_p": 0.9},
    "processor": {"logits_processor": LogitsProcessorList([Shift()]), "num_beams": 2},
    "prefix": {"prefix_allowed_tokens_fn": allowed},
    "criterion": {"stopping_criteria": StoppingCriteriaList([stop])},
    "configuration": {"generation_config": GenerationConfig(max_length=9, num_beams=3, eos_token_id=4)},
    "over configuration": {"generation_config": GenerationConfig(max_length=9, num_beams=3), "num_beams": 1},
    "prompt": {"decoder_input_ids": torch.tensor([[2, 5, 1, 7], [2, 3, 1, 4]]), "max_length": MAX_LENGTH},
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_tokens_equal_transformers(three: Any, name: str) -> None:
    reference, ocr, pixels = three
    found, expected = (seeded(one, pixels[:2], **FOLLOWED[name]) for one in (ocr, reference))
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert not found.is_inference()


OUTPUTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 3},
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_classes_equal_transformers(three: Any, name: str) -> None:
    reference, ocr, pixels = three
    asked = {"max_length": MAX_LENGTH, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    found, expected = (seeded(one, pixels[:2], **asked, **OUTPUTS[name]) for one in (ocr, reference))
    assert type(found) is type(expected) and isinstance(found, ModelOutput)
    assert expected.keys() - found.keys() == {"past_key_values"} and not found.keys() - expected.keys()
    assert torch.equal(found.sequences, expected.sequences)
    close = {"atol": 1e-3, "rtol": 1e-4}
    for kind in ("scores", "logits"):
        torch.testing.assert_close(found[kind], expected[kind], **close)
    beams = [None, None]
    if "num_beams" in OUTPUTS[name]:
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, **close)
        assert torch.equal(found.beam_indices, expected.beam_indices)
        beams = [found.beam_indices, expected.beam_indices]
    transitions = [
        reference.compute_transition_scores(out.sequences, out.scores, indices, normalize_logits=True)
        for out, indices in zip((found, expected), beams, strict=True)
    ]
    torch.testing.assert_close(*transitions, **close)


def test_streamer(three: Any) -> None:
    reference, ocr, pixels = three
    got = []
    for one in (ocr, reference):
        streamer = Collect()
        one.generate(pixels[:1], streamer=streamer)
        got.append(streamer.got)
    assert got[0] == got[1] and len(got[0]) > 5


def test_arguments_by_place_and_name(folder: Path) -> None:
    reference, ocr, pixels = small("A", folder)
    by_place = (GenerationConfig(max_length=9), LogitsProcessorList([Shift()]), StoppingCriteriaList([stop]))
    expected = reference.generate(pixels, *by_place)
    assert torch.equal(ocr.generate(pixels, *by_place), expected)
    by_name = dict(zip(("generation_config", "logits_processor", "stopping_criteria"), by_place, strict=True))
    assert torch.equal(ocr.generate(inputs=pixels, **by_name), expected)
    assert torch.equal(ocr.generate(pixel_values=pixels, **by_name), expected)


GENERATION = {
    "num_beams": 3,
    "num_return_sequences": 2,
    "length_penalty": 0.3,
    "no_repeat_ngram_size": 2,
    "max_length": 9,
}


@pytest.mark.parametrize(
    ("files", "settings"),
    [
        (("generation_config",), GENERATION),
        (("config",), GENERATION),
        (("decoder",), GENERATION),
        (("config", "generation_config"), GENERATION),
        (("generation_config",), {"return_dict_in_generate": True, "output_scores": True, "do_sample": True}),
    ],
)
def test_settings_of_the_checkpoint_are_followed(
    tmp_path: Path, folder: Path, files: tuple[str, ...], settings: dict[str, Any]
) -> None:
    """From generation_config.json, or from the places in config.json where older versions kept them."""
    small("A", folder)
    shutil.copytree(folder / "A", tmp_path / "A")
    config, generation = ((tmp_path / "A" / name) for name in ("config.json", "generation_config.json"))
    values, own = json.loads(config.read_text()), json.loads(generation.read_text())
    if "config" in files:
        values |= own | settings
    if "decoder" in files:
        values["decoder"] |= own | settings
    config.write_text(json.dumps(values))
    generation.write_text(json.dumps({name: value for name, value in {**own, **settings}.items() if name[0] != "_"}))
    if "generation_config" not in files:
        generation.unlink()
    reference = VisionEncoderDecoderModel.from_pretrained(tmp_path / "A")
    pixels = pictures(reference, 3, 0)
    found, expected = (seeded(one, pixels) for one in (load(tmp_path / "A"), reference))
    if isinstance(expected, ModelOutput):
        assert type(found) is type(expected)
        found, expected = found.sequences, expected.sequences
    assert len(expected) == 3 * settings.get("num_return_sequences", 1) and torch.equal(found, expected)


WRONG: dict[str, dict[str, Any]] = {
    "unknown": {"num_beam": 3},
    "unknown besides unsupported": {"nonsense": 1, "output_attentions": True},
    "no new tokens": {"max_new_tokens": 0},
    "no room": {"max_length": 1},
    "more returned than beams": {"num_beams": 2, "num_return_sequences": 3},
    "streamer of beams": {"num_beams": 2, "streamer": Collect()},
    "temperature": {"do_sample": True, "temperature": 0.0},
    "stop strings": {"stop_strings": ["x"]},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_raise_what_transformers_raises(folder: Path, name: str) -> None:
    reference, ocr, pixels = small("A", folder)
    expected = outcome(reference, pixels, **WRONG[name])
    assert isinstance(expected, tuple) and outcome(ocr, pixels, **WRONG[name]) == expected
    assert outcome(ocr, pixels, num_beams=2) == outcome(reference, pixels, num_beams=2)


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "the argument 'output_attentions'": {"output_attentions": True, "return_dict_in_generate": True},
    "the argument 'interpolate_pos_encoding'": {"interpolate_pos_encoding": True},
    "the argument 'assistant_model'": {"assistant_model": build(Case("A"), 1)},
    "the search assisted_generation": {"prompt_lookup_num_tokens": 2},
    "cache_implementation='static'": {"cache_implementation": "static"},
    "encoder_outputs beside pictures": {"encoder_outputs": BaseModelOutput(last_hidden_state=torch.ones(4, 17, 24))},
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_what_is_unsupported_is_named(folder: Path, reason: str) -> None:
    _, ocr, pixels = small("A", folder)
    with pytest.raises(NotImplementedError, match=f"^generate: .*{reason}\\. Load {folder}/A with transformers"):
        ocr.generate(pixels, **UNSUPPORTED[reason])


def test_nothing_to_read(folder: Path) -> None:
    _, ocr, pixels = small("A", folder)
    with pytest.raises(ValueError, match=r"pixel_values: expected a floating-point tensor .* got none"):
        ocr.generate(num_beams=2)
    with pytest.raises(ValueError, match=r"expected at least one picture, got shape \[0, 3, 16, 16\]"):
        ocr.generate(pixels[:0])


@pytest.mark.parametrize("asked", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("num_tokens", [17, 5])
@pytest.mark.parametrize("name", ["A", "proj"])
@pytest.mark.filterwarnings("error::trocr_fast.drop_in.FallbackWarning")
def test_encoder_outputs_in_place_of_pictures(folder: Path, asked: dict[str, Any], num_tokens: int, name: str) -> None:
    reference, ocr, pixels = small(name, folder)
    with torch.no_grad():
        encoded = reference.encoder(pixels).last_hidden_state[:, :num_tokens]
    asked = {"max_length": MAX_LENGTH, **asked}
    # one for each call: transformers repeats the states in place, for beams
    expected = seeded(reference, encoder_outputs=BaseModelOutput(last_hidden_state=encoded), **asked)
    assert torch.equal(seeded(ocr, encoder_outputs=BaseModelOutput(last_hidden_state=encoded), **asked), expected)
    if num_tokens == 17:
        assert torch.equal(seeded(ocr, pixels, **asked), expected)
    with accelerate(reference) as model:
        assert torch.equal(seeded(model, encoder_outputs=BaseModelOutput(last_hidden_state=encoded), **asked), expected)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (BaseModelOutput(last_hidden_state=torch.ones(2, 17, 23)), r"last_hidden_state of shape \[batch, tokens, 24\]"),
        (BaseModelOutput(last_hidden_state=torch.ones(2, 24)), r"last_hidden_state of shape \[batch, tokens, 24\]"),
        (BaseModelOutput(last_hidden_state=torch.ones(0, 17, 24)), r"last_hidden_state of shape"),
        ((torch.ones(2, 17, 24),), r"last_hidden_state of shape"),
        (BaseModelOutput(last_hidden_state=torch.ones(2, 17, 24).half()), "torch.float32, as the model is, got .*16"),
    ],
)
def test_encoder_outputs_that_cannot_be_taken(folder: Path, encoded: Any, reason: str) -> None:
    reference, ocr, _ = small("A", folder)
    with pytest.raises(NotImplementedError, match=f"encoder_outputs: expected .*{reason}"):
        ocr.generate(encoder_outputs=encoded)
    with accelerate(reference, unsupported="raise") as model, pytest.raises(NotImplementedError, match=reason):
        model.generate(encoder_outputs=encoded)


def test_half_precision_is_that_of_an_accelerated_model(folder: Path) -> None:
    reference, _, pixels = small("A", folder)
    model = VisionEncoderDecoderModel.from_pretrained(folder / "A", dtype=torch.bfloat16).eval()
    model.generation_config = reference.generation_config
    half = load(folder / "A", torch.bfloat16)
    with accelerate(model, unsupported="raise"):
        for asked in ({"num_beams": 3}, {"do_sample": True}):
            found, expected = (seeded(one, pixels, return_dict_in_generate=True, output_logits=True, **asked)
                               for one in (half, model))  # fmt: skip
            assert torch.equal(found.sequences, expected.sequences)
            assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


def test_transformers_holds_no_weights(folder: Path) -> None:
    _, ocr, pixels = small("A", folder)
    state = torch.get_rng_state()
    fresh = load(ocr.folder)
    fresh.generate(pixels, max_length=4)
    assert torch.equal(torch.get_rng_state(), state)  # and a seed that was set before means what it meant
    model = fresh._weightless_model
    assert fresh._weightless_model is model
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


def test_a_checkpoint_that_is_gone(tmp_path: Path, folder: Path) -> None:
    _, _, pixels = small("A", folder)
    shutil.copytree(folder / "A", tmp_path / "A")
    ocr = load(tmp_path / "A")
    shutil.rmtree(tmp_path / "A")
    with pytest.raises(CheckpointError, match=r"which generate\(\) needs"):
        ocr.generate(pixels)


@pytest.mark.gpu
def test_pictures_come_to_the_device(folder: Path) -> None:
    reference, ocr, pixels = small("A", folder)
    there = TrOCR(ocr.folder, Model.load(ocr.folder, torch.device("cuda"), torch.float32), None, None)  # type: ignore[arg-type]
    for asked in FOLLOWED.values():
        if "do_sample" not in asked and "decoder_input_ids" not in asked:
            found = there.generate(pixels, **asked)
            assert found.is_cuda and torch.equal(found.cpu(), reference.generate(pixels, **asked))
