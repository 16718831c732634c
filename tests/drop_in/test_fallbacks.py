"""What goes to the original generate(): calls that the engine does not follow, models that compute something else."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, VisionEncoderDecoderModel
from transformers.modeling_outputs import BaseModelOutput

from tests.drop_in.calls import MAX_LENGTH, Collect, assert_followed, assert_left, fallbacks_of, lively, outcome
from trocr_fast import FallbackWarning, accelerate

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")


# Calls


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
    "no beams": ((), {"num_beams": 0}),
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
    assert found == expected and isinstance(found, list) and not fallbacks


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
