"""`accelerate`: what is followed, what goes to the original generate(), and models that change under it."""

import copy
import gc
import inspect
import io
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    StoppingCriteriaList,
    TrOCRConfig,
    TrOCRForCausalLM,
    TrOCRProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput

import trocr_fast
from tests.parity.models import Case, build, lively_reference, pictures
from trocr_fast import CheckpointError, FallbackWarning, accelerate
from trocr_fast.drop_in import Acceleration

BUILTIN = Path(trocr_fast.__file__).parent / "builtin"
MAX_LENGTH = 12

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")


@cache
def lively() -> tuple[VisionEncoderDecoderModel, Tensor]:
    model, pixels, _ = lively_reference(Case("A"))
    return model, pixels[:5]


@pytest.fixture
def reference() -> VisionEncoderDecoderModel:
    return copy.deepcopy(lively()[0])


@pytest.fixture
def model(reference: VisionEncoderDecoderModel) -> VisionEncoderDecoderModel:
    """The same one, accelerated."""
    ours = copy.deepcopy(reference)
    accelerate(ours)
    return ours


@pytest.fixture
def pixels() -> Tensor:
    return lively()[1]


def outcome(model: VisionEncoderDecoderModel, *arguments: Any, **settings: Any) -> Any:
    """Tokens, or what was raised."""
    torch.manual_seed(3)
    try:
        out = model.generate(*arguments, **settings)
    except Exception as error:
        return type(error), str(error)
    return (out if isinstance(out, Tensor) else out.sequences).tolist()


def fallbacks_of(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call gives, and the FallbackWarnings on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    found = [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]
    assert all(w.filename == __file__ for w in caught if issubclass(w.category, FallbackWarning))
    return result, found


def assert_followed(model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor) -> None:
    """Our own way, and the same tokens as those of an equal model."""
    found, fallbacks = fallbacks_of(lambda: outcome(model, pixels, max_length=MAX_LENGTH, num_beams=2))
    assert not fallbacks
    assert found == outcome(reference, pixels, max_length=MAX_LENGTH, num_beams=2)


def assert_left(model: VisionEncoderDecoderModel, pixels: Tensor, reason: str) -> None:
    """The original's way, for a reason in which the given words are."""
    _, fallbacks = fallbacks_of(lambda: outcome(model, pixels, max_length=MAX_LENGTH))
    assert len(fallbacks) == 1 and reason in fallbacks[0], fallbacks


# What is followed


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


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


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


# What is not


def custom_loop(model: Any, input_ids: Tensor, *arguments: Any, **settings: Any) -> Tensor:
    return input_ids


LEFT: dict[str, dict[str, Any]] = {
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "encoder_outputs": {"encoder_outputs": BaseModelOutput(last_hidden_state=torch.ones(5, 17, 24))},
    "decoder_attention_mask": {"decoder_attention_mask": torch.ones(5, 1, dtype=torch.int64)},
    "interpolate_pos_encoding": {"interpolate_pos_encoding": True},
    "cache_implementation": {"cache_implementation": "static"},
    "assistant_model": {"assistant_model": lambda: copy.deepcopy(lively()[0])},
    "assisted": {"prompt_lookup_num_tokens": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "group_beam": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "dola": {"dola_layers": "low"},
    "constrained": {"num_beams": 3, "force_words_ids": [[5]]},
    "guidance_scale": {"guidance_scale": 2.0},
    "custom_generate": {"custom_generate": custom_loop},
    "synced_gpus": {"synced_gpus": True},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
    "use_cache=None": {"use_cache": None},
    "use_cache=0": {"use_cache": 0},
    "is_causal": {"is_causal": False},
    "negative_prompt_ids": {"negative_prompt_ids": torch.ones(1, 1, dtype=torch.int64)},
    "token_healing": {"token_healing": True},
    "attention_mask": {"attention_mask": torch.ones(5, 17, dtype=torch.int64)},
}


@pytest.mark.parametrize("reason", LEFT)
def test_left_to_the_original(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor, reason: str
) -> None:
    """With one warning; what the original makes of it is what the user gets, errors included."""

    def settings() -> dict[str, Any]:
        some = {name: value() if name == "assistant_model" else value for name, value in LEFT[reason].items()}
        return copy.deepcopy({"max_length": 10, **some})

    expected = outcome(reference, pixels, **settings())
    found, fallbacks = fallbacks_of(lambda: outcome(model, pixels, **settings()))
    assert len(fallbacks) == 1 and reason in fallbacks[0]
    assert found == expected
    model.generate.__self__.undo()
    accelerate(model, unsupported="raise")
    with pytest.raises(NotImplementedError, match=reason):
        model.generate(pixels, **settings())
    assert_followed(model, reference, pixels)


def test_attentions_come_from_the_original(model: VisionEncoderDecoderModel, pixels: Tensor) -> None:
    with pytest.warns(FallbackWarning, match="output_attentions"):
        out = model.generate(pixels, max_length=5, return_dict_in_generate=True, output_attentions=True)
    assert len(out.cross_attentions) == 4


WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "unknown": ((), {"num_beam": 3}),
    "unknown besides known": ((), {"nonsense": 1, "output_attentions": True}),
    "no new tokens": ((), {"max_new_tokens": 0}),
    "more returned than beams": ((), {"num_beams": 2, "num_return_sequences": 3}),
    "more returned than greedy": ((), {"num_return_sequences": 3}),
    "early stopping": ((), {"early_stopping": "often"}),
    "cache": ((), {"cache_implementation": "magic"}),
    "given twice": ((GenerationConfig(),), {"generation_config": GenerationConfig()}),
    "too many": ((None,) * 12, {}),
    "streamer of beams": ((), {"num_beams": 2, "streamer": Collect()}),
    "temperature": ((), {"do_sample": True, "temperature": 0.0}),
    "stop strings": ((), {"stop_strings": ["x"]}),
    "penalty": ((), {"repetition_penalty": -1.0}),
    "pixels twice": ((), {"pixel_values": torch.ones(5, 3, 16, 16)}),
    "no room": ((), {"max_length": 1}),
    "starts": ((), {"decoder_start_token_id": [1, 2]}),
    "no outputs": ((), {"encoder_outputs": None}),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("unsupported", ["warn", "raise"])
def test_wrong_arguments_raise_what_transformers_raises(
    reference: VisionEncoderDecoderModel, pixels: Tensor, case: str, unsupported: str
) -> None:
    arguments, settings = WRONG[case]
    settings = settings if "new" in case or "room" in case else {"max_new_tokens": 4, **settings}
    expected = outcome(reference, pixels, *arguments, **settings)
    assert isinstance(expected, tuple)
    model = copy.deepcopy(reference)
    accelerate(model, unsupported=unsupported)
    found, fallbacks = fallbacks_of(lambda: outcome(model, pixels, *arguments, **settings))
    if case == "no outputs":  # an argument that is known, and not followed
        assert len(fallbacks) == (unsupported == "warn") and (found == expected) == (unsupported == "warn")
    else:
        assert found == expected and not fallbacks
    assert_followed(model, reference, pixels)


def test_no_pixels(model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel) -> None:
    found, fallbacks = fallbacks_of(lambda: outcome(model, max_length=5))
    assert found == outcome(reference, max_length=5) and isinstance(found, tuple) and not fallbacks


def test_outputs_of_the_encoder_without_pixels(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel
) -> None:
    settings = {"encoder_outputs": BaseModelOutput(last_hidden_state=torch.ones(2, 17, 24)), "max_length": 5}
    expected = outcome(reference, **settings)
    found, fallbacks = fallbacks_of(lambda: outcome(model, **settings))
    assert found == expected and isinstance(found, list)
    assert len(fallbacks) == 1 and "encoder_outputs" in fallbacks[0]


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 3, 16, 20), (2, 3, 8, 8), (2, 3, 1, 16, 16), (2,)])
def test_pixels_of_another_shape(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError) as error:
        model.generate(torch.ones(shape), max_length=5)
    assert "pixel_values: expected shape [batch, 3, 16, 16]" in str(error.value)
    assert f"got {list(shape)}" in str(error.value)
    assert_followed(model, reference, pixels)


def test_no_pictures(model: VisionEncoderDecoderModel) -> None:
    with pytest.raises(ValueError, match=r"expected at least one picture, got shape \[0, 3, 16, 16\]"):
        model.generate(torch.ones(0, 3, 16, 16), max_length=5)


def test_pixels_of_integers(model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel) -> None:
    integers = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    found, fallbacks = fallbacks_of(lambda: outcome(model, integers, max_length=8))
    assert found == outcome(reference, integers, max_length=8)
    assert len(fallbacks) == 1 and "expected floating-point, got torch.uint8" in fallbacks[0]


def test_autocast(model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_left(model, pixels, "autocast")
    assert_followed(model, reference, pixels)


def test_an_error_inside(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor
) -> None:
    def breaks(input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == 4:
            raise KeyError("mine")
        return scores

    with pytest.raises(KeyError, match="mine"):
        model.generate(pixels, max_length=10, num_beams=3, logits_processor=LogitsProcessorList([breaks]))
    assert_followed(model, reference, pixels)


# Models that are not what their configuration says


class Adapted(nn.Module):
    """As the layers of peft are: one inside another, of a class that may be called Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


Linear = type("Linear", (Adapted,), {})


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def adapt(model: VisionEncoderDecoderModel) -> None:
    layer = model.decoder.model.decoder.layers[1]
    layer.fc1 = Linear(layer.fc1)


def subclass(model: VisionEncoderDecoderModel) -> None:
    model.encoder.layers[0].mlp.fc1.__class__ = type("Linear", (OwnLinear,), {"__module__": "torch.nn.modules.linear"})


def quantise(model: VisionEncoderDecoderModel) -> None:
    torch.ao.quantization.quantize_dynamic(model.decoder, {nn.Linear}, inplace=True).eval()


def parametrise(model: VisionEncoderDecoderModel) -> None:
    nn.utils.parametrizations.weight_norm(model.decoder.model.decoder.layers[0].fc2)


def hook(model: VisionEncoderDecoderModel) -> None:
    model.encoder.layers[0].register_forward_hook(lambda module, inputs, output: 2 * output)


def hook_before(model: VisionEncoderDecoderModel) -> None:
    model.register_forward_pre_hook(lambda module, inputs: None)


def patch(model: VisionEncoderDecoderModel) -> None:
    model.decoder.forward = model.decoder.forward


def hook_of_accelerate(model: VisionEncoderDecoderModel) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model.encoder, hooks.ModelHook())


def truncate(model: VisionEncoderDecoderModel) -> None:
    del model.decoder.model.decoder.layers[1:]


def lengthen(model: VisionEncoderDecoderModel) -> None:
    model.encoder.layers.append(copy.deepcopy(model.encoder.layers[0]))


def rescale(model: VisionEncoderDecoderModel) -> None:
    model.decoder.model.decoder.embed_tokens.embed_scale = 3.0


def other_epsilon(model: VisionEncoderDecoderModel) -> None:
    model.encoder.layernorm.eps = 0.1


def other_activation(model: VisionEncoderDecoderModel) -> None:
    model.decoder.model.decoder.layers[0].activation_fn = nn.SiLU().eval()


def other_configuration(model: VisionEncoderDecoderModel) -> None:
    model.config.decoder.scale_embedding = True


def mix(model: VisionEncoderDecoderModel) -> None:
    model.encoder.layernorm.double()


def wider_head(model: VisionEncoderDecoderModel) -> None:
    model.decoder.output_projection.weight = nn.Parameter(torch.randn(20, 32))


def part_in_training(model: VisionEncoderDecoderModel) -> None:
    model.decoder.model.decoder.layers[1].train()


CHANGES = {
    adapt: "fc1",
    subclass: "expected a torch.nn.modules.linear.Linear",
    quantise: "found a torch.ao.nn.quantized.dynamic.modules.linear.Linear",
    parametrise: "fc2",
    hook: "model.encoder.layers.0 has hooks",
    hook_before: "the model has hooks",
    patch: "model.decoder has hooks, or a forward() of its own",
    hook_of_accelerate: "model.encoder has hooks",
    truncate: "layers.1",
    lengthen: "layers.2",
    rescale: "embed_scale: expected 1.0 by the configuration, found 3.0",
    other_epsilon: "eps",
    other_activation: "activation_fn",
    other_configuration: "embed_scale",
    mix: "found torch.float32, torch.float64",
    wider_head: "expected shape [14, 32], found [20, 32]",
    part_in_training: "layers.1 is in training mode",
    VisionEncoderDecoderModel.train: "training mode",
    VisionEncoderDecoderModel.double: "float64",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ["before", "between"])
def test_a_model_that_computes_something_else(
    reference: VisionEncoderDecoderModel, pixels: Tensor, change: Callable[[Any], None], when: str
) -> None:
    model = copy.deepcopy(reference)
    if when == "before":
        change(model)
    accelerate(model)
    if when == "between":
        assert_followed(model, reference, pixels)
        change(model)
    change(reference)
    assert_left(model, pixels, CHANGES[change])
    assert outcome(model, pixels, max_length=MAX_LENGTH) == outcome(reference, pixels, max_length=MAX_LENGTH)


def test_hooks_on_all_modules(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor
) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        assert_left(model, pixels, "hooks on all modules")
    finally:
        handle.remove()
    assert_followed(model, reference, pixels)


def test_hooks_that_come_and_go(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor
) -> None:
    handle = model.decoder.register_forward_hook(lambda module, inputs, output: None)
    assert_left(model, pixels, "model.decoder has hooks")
    handle.remove()
    assert_followed(model, reference, pixels)


def test_hooks_of_transformers_itself(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor
) -> None:
    """Asking a forward pass for attentions once leaves hooks in the encoder for ever."""
    tokens = torch.full((5, 1), 2)
    model(pixels, decoder_input_ids=tokens, output_attentions=True, output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert_followed(model, reference, pixels)


def test_a_compiled_model(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor
) -> None:
    """What compile() leaves in the model is not what is called; nothing is compiled here."""
    model.compile()
    model.encoder.compile()
    assert_followed(model, reference, pixels)
    assert outcome(model, pixels, max_length=8) == outcome(reference, pixels, max_length=8)


def test_derived_classes(reference: VisionEncoderDecoderModel, pixels: Tensor) -> None:
    class Reader(VisionEncoderDecoderModel):
        def read(self, pixels: Tensor) -> list[list[int]]:
            return self.generate(pixels, max_length=MAX_LENGTH).tolist()

    class Twice(Reader):
        def forward(self, *arguments: Any, **settings: Any) -> Any:
            return super().forward(*arguments, **settings)

    for kind, left in ((Reader, []), (Twice, ["Twice has forward() of its own"])):
        model = copy.deepcopy(reference)
        model.__class__ = kind
        accelerate(model)
        found, fallbacks = fallbacks_of(lambda: model.read(pixels))  # noqa: B023
        assert found == outcome(reference, pixels, max_length=MAX_LENGTH)
        assert len(fallbacks) == len(left) and all(b in a for a, b in zip(fallbacks, left, strict=True))


# Weights that change


def optimise(model: VisionEncoderDecoderModel, **options: Any) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **options)
    labels = torch.tensor([[5, 6, 7]] * 5)
    model.config.pad_token_id, model.config.decoder_start_token_id = 1, 2
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(lively()[1], labels=labels).loss.backward()
        optimizer.step()
    model.eval()


def load(model: VisionEncoderDecoderModel, assign: bool = False) -> None:
    other = build(Case("A"), 77)
    model.load_state_dict(other.state_dict(), assign=assign)
    model.tie_weights()


def there_and_back(model: VisionEncoderDecoderModel) -> None:
    """Values are rounded, and the new ones may lie where the old ones did."""
    model.to(torch.bfloat16).to(torch.float32)


def untie(model: VisionEncoderDecoderModel) -> None:
    generator = torch.Generator().manual_seed(4)
    head = model.decoder.output_projection
    head.weight = nn.Parameter(torch.randn(head.weight.shape, generator=generator))


def in_inference_mode(model: VisionEncoderDecoderModel) -> None:
    with torch.inference_mode():
        model.decoder.model.decoder.layers[0].fc1.weight.mul_(-1)
        model.encoder.layers[0].attention.q_proj.weight.mul_(-1)


def resize(model: VisionEncoderDecoderModel) -> None:
    torch.manual_seed(2)
    model.decoder.resize_token_embeddings(19, mean_resizing=False)


def query(model: VisionEncoderDecoderModel) -> None:
    """A weight that the engine holds in a copy."""
    with torch.no_grad():
        model.decoder.model.decoder.layers[1].encoder_attn.v_proj.weight.neg_()


MOVES: dict[str, Callable[[VisionEncoderDecoderModel], Any]] = {
    "optimizer": optimise,
    "foreach": lambda model: optimise(model, foreach=True),
    "fused": lambda model: optimise(model, fused=True),
    "load": load,
    "assign": lambda model: load(model, assign=True),
    "half and back": there_and_back,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "untie": untie,
    "retie": lambda model: (untie(model), model.tie_weights()),
    "inference mode": in_inference_mode,
    "resize": resize,
    "query": query,
}


@pytest.mark.parametrize("move", MOVES)
def test_weights_that_change(reference: VisionEncoderDecoderModel, pixels: Tensor, move: str) -> None:
    model = copy.deepcopy(reference)
    accelerate(model, unsupported="raise")
    before = model.generate(pixels, max_length=12, output_logits=True, return_dict_in_generate=True).logits[0]
    MOVES[move](model)
    MOVES[move](reference)
    settings = {"max_length": 12, "output_logits": True, "return_dict_in_generate": True}
    after, expected = (one.generate(pixels, **settings).logits[0] for one in (model, reference))
    tolerance = 0.25 if move == "bfloat16" else 1e-4
    torch.testing.assert_close(after, expected, atol=tolerance, rtol=1e-4)
    if move != "retie":
        assert after.shape != before.shape or not torch.equal(after, before)
    if move != "bfloat16":
        assert_followed(model, reference, pixels)


def test_new_weights_at_an_old_address(model: VisionEncoderDecoderModel, pixels: Tensor) -> None:
    """What was looked at stays in memory, so that no other weights can pass for it."""
    outcome(model, pixels, max_length=12)
    projection = model.decoder.model.decoder.layers[0].self_attn.v_proj
    memory = StorageWeakRef(projection.weight.untyped_storage())
    projection.weight = nn.Parameter(torch.randn(32, 32))
    gc.collect()
    assert not memory.expired()
    found = outcome(model, pixels, max_length=12)
    assert memory.expired()  # once there was another look
    model.generate.__self__.undo()
    assert outcome(model, pixels, max_length=12) == found


def test_refresh_after_writes_through_data(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor
) -> None:
    assert_followed(model, reference, pixels)
    for one in (model, reference):
        for layer in one.decoder.model.decoder.layers:
            layer.self_attn.v_proj.weight.data.mul_(-3)
            layer.fc1.weight.data.mul_(-3)
    model.generate.__self__.refresh()
    assert_followed(model, reference, pixels)


def test_weights_made_in_inference_mode(pixels: Tensor) -> None:
    with torch.inference_mode():
        model = build(Case("A"), 5)
        reference = copy.deepcopy(model)
        accelerate(model, unsupported="raise")
        assert_followed(model, reference, pixels)
    assert_followed(model, reference, pixels)


# Copies, undoing, memory, threads


def test_undo(model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor) -> None:
    handle = model.generate.__self__
    handle.undo()
    assert "generate" not in model.__dict__
    handle.undo()
    second = accelerate(model)
    handle.undo()  # of another one: nothing
    assert model.generate.__self__ is second
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(model)
    assert_followed(model, reference, pixels)
    second.undo()
    with accelerate(model) as same:
        assert same is model and "generate" in model.__dict__
    assert "generate" not in model.__dict__


def test_what_cannot_be_accelerated(reference: VisionEncoderDecoderModel) -> None:
    with pytest.raises(TypeError, match="expected a VisionEncoderDecoderModel, got TrOCRForCausalLM"):
        accelerate(reference.decoder)
    with pytest.raises(ValueError, match="unsupported: expected 'warn' or 'raise', got 'ignore'"):
        accelerate(reference, unsupported="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cross_memory: expected one of kv, latent or auto, got 'fast'"):
        accelerate(reference, cross_memory="fast")
    reference.generate = len
    with pytest.raises(ValueError, match="got <built-in function len>"):
        accelerate(reference)
    del reference.generate
    reference.config.encoder.hidden_act = "quick_gelu"
    with pytest.raises(CheckpointError, match="hidden_act"):
        accelerate(reference)
    assert "generate" not in reference.__dict__


def copies(model: VisionEncoderDecoderModel) -> dict[str, VisionEncoderDecoderModel]:
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(saved, weights_only=False),
    }


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("used", [False, True])
def test_copies_have_their_own_weights(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor, how: str, used: bool
) -> None:
    if used:
        assert_followed(model, reference, pixels)
    other = copies(model)[how]
    assert isinstance(other.generate.__self__, Acceleration) and other.generate.__self__ is not model.generate.__self__
    query(other)
    changed = copy.deepcopy(reference)
    query(changed)
    assert_followed(other, changed, pixels)
    assert_followed(model, reference, pixels)
    other.generate.__self__.undo()
    assert "generate" in model.__dict__ and "generate" not in other.__dict__


def test_saved_checkpoints_are_ordinary(
    model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    again = VisionEncoderDecoderModel.from_pretrained(tmp_path)
    assert outcome(again, pixels, max_length=12) == outcome(reference, pixels, max_length=12)
    accelerate(again, unsupported="raise")
    assert_followed(again, reference, pixels)
    assert model.state_dict().keys() == reference.state_dict().keys()


def test_memory_is_released(pixels: Tensor) -> None:
    model = copy.deepcopy(lively()[0])
    handle = accelerate(model)
    model.generate(pixels, max_length=5)
    network = weakref.ref(handle._network)
    assert network() is not None
    handle.undo()
    assert network() is None and not handle._held
    handle = accelerate(model)
    model.generate(pixels, max_length=5)
    gone = weakref.ref(model), weakref.ref(handle._network)
    del model, handle
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_threads(model: VisionEncoderDecoderModel, reference: VisionEncoderDecoderModel, pixels: Tensor) -> None:
    expected = [outcome(reference, pixels[: 1 + i], max_length=20, num_beams=1 + i) for i in range(4)]
    found: list[Any] = [None] * 4
    begin = threading.Barrier(4)

    def work(i: int) -> None:
        begin.wait()
        found[i] = model.generate(pixels[: 1 + i], max_length=20, num_beams=1 + i).tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_looking_at_the_model_draws_no_random_numbers(model: VisionEncoderDecoderModel) -> None:
    before = torch.get_rng_state()
    assert model.generate.__self__._current_network()[1] is None
    assert torch.equal(torch.get_rng_state(), before)


def test_looking_at_the_model_leaves_the_default_dtype(
    model: VisionEncoderDecoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one for all threads."""
    model.to(torch.bfloat16)
    for part in (model.config, model.config.encoder, model.config.decoder):
        part.dtype = torch.bfloat16
    found = []
    own = torch.set_default_dtype
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: (found.append(dtype), own(dtype)))
    assert model.generate.__self__._current_network()[1] is None
    assert {*found} <= {torch.float32}
    assert model.config.dtype == torch.bfloat16


def test_weights_are_taken_once(model: VisionEncoderDecoderModel, pixels: Tensor) -> None:
    handle = model.generate.__self__
    model.generate(pixels, max_length=5)
    network = handle._network
    model.generate(pixels, max_length=5, num_beams=2)
    model(pixels, decoder_input_ids=torch.full((5, 1), 2))
    model.generate(pixels, max_length=5)
    assert handle._network is network


def test_importing_is_late() -> None:
    code = "import sys, trocr_fast; dir(trocr_fast); print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert trocr_fast.accelerate is accelerate


# What users come from


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


class Lines(torch.utils.data.Dataset):
    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": torch.tensor([4, 5, 6 + index % 3, 2])}


def test_trainer(model: VisionEncoderDecoderModel, pixels: Tensor, tmp_path: Path) -> None:
    """Trains, and reads between epochs with the weights as they then are."""
    pytest.importorskip("accelerate")
    model.config.pad_token_id, model.config.decoder_start_token_id = 1, 2
    seen: list[bool] = []

    def metrics(prediction: Any) -> dict[str, float]:
        plain = copy.deepcopy(model)
        plain.generate.__self__.undo()
        expected = plain.eval().generate(pixels, max_length=8, num_beams=2)
        found = torch.from_numpy(prediction.predictions)[:, : expected.shape[1]]
        seen.append(torch.equal(found, expected))
        return {"equal": float(seen[-1])}

    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        predict_with_generate=True,
        generation_max_length=8,
        generation_num_beams=2,
        eval_strategy="epoch",
        save_strategy="no",
        num_train_epochs=2,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=5,
        learning_rate=0.05,
        optim="adamw_torch_fused",  # the default, and one that leaves no trace in the versions of the weights
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(
        model, arguments, train_dataset=Lines(pixels), eval_dataset=Lines(pixels), compute_metrics=metrics
    )
    before = outcome(model, pixels, max_length=8, num_beams=2)
    _, fallbacks = fallbacks_of(trainer.train)
    assert not fallbacks and seen == [True, True]
    assert outcome(model, pixels, max_length=8, num_beams=2) != before
    predictions, fallbacks = fallbacks_of(lambda: trainer.predict(Lines(pixels)))
    assert not fallbacks and predictions.metrics["test_equal"] == 1.0
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").exists()


@cache
def builtin() -> tuple[TrOCRProcessor, VisionEncoderDecoderModel]:
    return TrOCRProcessor.from_pretrained(BUILTIN), VisionEncoderDecoderModel.from_pretrained(BUILTIN)


@cache
def sample_line() -> Image.Image:
    image = Image.new("RGB", (260, 48), "white")
    ImageDraw.Draw(image).text((8, 4), "hello world", "black", ImageFont.load_default(32))
    return image


def test_documentation_of_configuration() -> None:
    configuration = TrOCRConfig(vocab_size=50, d_model=32, decoder_layers=2, decoder_attention_heads=4)
    decoder = TrOCRForCausalLM(configuration)
    assert decoder.config.hidden_size == 32 and decoder.config.model_type == "trocr"
    encoder = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    both = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, configuration)
    assert both.decoder.is_decoder and both.decoder.add_cross_attention
    model = VisionEncoderDecoderModel(
        encoder=ViTModel(encoder), decoder=TrOCRForCausalLM(TrOCRConfig(**configuration.to_dict()))
    )
    model.eval()
    model.generation_config.decoder_start_token_id = 2
    reference = copy.deepcopy(model)
    accelerate(model, unsupported="raise")
    some = torch.randn(2, 3, 32, 32)
    assert outcome(model, some, max_length=8) == outcome(reference, some, max_length=8)


def test_documentation_of_inference(tmp_path: Path) -> None:
    """Processor, a training step, generate, and decoding, in the words of the page."""
    processor, plain = builtin()
    model = copy.deepcopy(plain)
    accelerate(model)
    image = sample_line()
    pixel_values = processor(image, return_tensors="pt").pixel_values

    model.config.decoder_start_token_id = processor.tokenizer.eos_token_id
    model.config.pad_token_id = processor.tokenizer.pad_token_id
    model.config.vocab_size = model.config.decoder.vocab_size
    labels = processor.tokenizer("hello world", return_tensors="pt").input_ids
    loss = model(pixel_values=pixel_values, labels=labels).loss
    loss.backward()
    assert loss.isfinite() and model.decoder.output_projection.weight.grad is not None

    generated_ids, fallbacks = fallbacks_of(lambda: model.generate(pixel_values))
    assert torch.equal(generated_ids, plain.generate(pixel_values)) and not fallbacks
    generated_text = processor.batch_decode(generated_ids, skip_special_tokens=True)[0]
    assert generated_text == processor.decode(generated_ids[0], skip_special_tokens=True) and generated_text

    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = TrOCRProcessor.from_pretrained(tmp_path)
    assert torch.equal(again(image, return_tensors="pt").pixel_values, pixel_values)
    both = again(images=image, text="hello", return_tensors="pt")
    assert {"pixel_values", "labels"} <= both.keys()


def test_documentation_of_the_decoder() -> None:
    """`TrOCRForCausalLM` forward, inside an accelerated model: nothing there has changed."""
    model = copy.deepcopy(build(Case("A"), 0))
    accelerate(model)
    tokens = torch.tensor([[2, 5, 6], [2, 7, 8]])
    out = model.decoder(
        input_ids=tokens,
        encoder_hidden_states=torch.randn(2, 17, 24),
        labels=tokens,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert out.loss.isfinite() and out.logits.shape == (2, 3, 14)
    assert len(out.attentions) == len(out.cross_attentions) == 2 and len(out.hidden_states) == 3
    whole = model(pictures(model, 2, 0), decoder_input_ids=tokens, output_attentions=True, output_hidden_states=True)
    assert whole.cross_attentions[0].shape == (2, 4, 3, 17) and whole.encoder_hidden_states is not None


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
