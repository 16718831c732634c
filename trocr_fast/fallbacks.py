"""Why a model, or a call of its `generate`, is left to transformers.

The engine knows one computation: the one that a model's configuration describes, with the model's weights. So a model
is held against what transformers builds from its configuration, and a call against a list of what is followed.
"""

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import GenerationConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel
from transformers.generation import GenerationMode
from transformers.utils import ModelOutput

from trocr_fast.config import Architecture
from trocr_fast.weights import current_name, expected_shapes, is_unused

MODES = {
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
}
# Arguments that are no fields of a GenerationConfig. All but the pictures are left to transformers' generate as well;
# what is in neither list changes the computation, or how it is shared among machines.
FOLLOWED = frozenset(
    {"self", "inputs", "pixel_values", "generation_config", "logits_processor", "stopping_criteria", "streamer"}
    | {"prefix_allowed_tokens_fn", "tokenizer", "decoder_input_ids", "encoder_outputs"}
    | {"labels"}  # without any part in generating; Seq2SeqTrainer passes them
)
MAY_BE_FALSE = frozenset({"synced_gpus", "interpolate_pos_encoding", "trust_remote_code"})
# What generate takes out of its arguments before it looks at those for the model.
NOT_FOR_THE_MODEL = frozenset({"tokenizer", "assistant_tokenizer", "trust_remote_code"})
# Fields of a GenerationConfig that ask for something else than tokens and scores, or for another way to compute them,
# and the values that don't.
NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "cache_implementation": (None,),
    "cache_config": (None,),
    "prefill_chunk_size": (None,),
    "guidance_scale": (None, 1),
    "token_healing": (None, False),
    "is_assistant": (None, False),
    "use_cache": (True, False),  # None is neither: transformers then makes a cache and feeds it all tokens every time
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", "cuda")
# What a module says of itself that has no part in generating, or is looked at elsewhere.
NOT_COMPARED = frozenset({"training", "gradient_checkpointing", "name_or_path", "loss_type", "kernel_config"})
SCALARS = (int, float, bool, str, tuple, type(None))

_building = threading.Lock()
_num_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _num_optimizer_steps
    _num_optimizer_steps += 1


# An optimizer that works in one kernel, as Trainer's by default, leaves no trace in the versions of the weights.
register_optimizer_step_post_hook(_count_step)


def of_call(arguments: dict[str, Any], config: GenerationConfig, others: dict[str, Any]) -> str | None:
    """Why a call cannot be followed; None: it can.

    Args:
        arguments: of `generate`, by name.
        config: the configuration that they resolve to.
        others: the arguments that are no part of it.
    """
    for name, value in {**arguments, **others}.items():
        unset = value is None or (value is False and name in MAY_BE_FALSE)
        if name not in FOLLOWED and not unset:
            return f"the argument {name!r}"
    for name, neutral in NOT_FOLLOWED.items():
        value = getattr(config, name, None)
        if not any(value is one or (value == one and type(one) is not bool) for one in neutral):
            return f"{name}={value!r}"
    mode = config.get_generation_mode()
    return None if mode in MODES else f"the search {mode.value}"


def of_sources(sources: dict[str, Any], model: VisionEncoderDecoderModel) -> str | None:
    """Why what there is to read cannot be taken; None: it can, or nobody could and others say what is wrong.

    Args:
        sources: pictures and encoder outputs, by the names of the arguments.
    """
    if "encoder_outputs" in sources and len(sources) > 1:
        return "encoder_outputs beside pictures"
    for name, source in sources.items():
        if name == "encoder_outputs":
            width = model.config.encoder.hidden_size
            states = source[0] if isinstance(source, ModelOutput) and "last_hidden_state" in source else None
            if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[2] != width or not len(states):
                return f"encoder_outputs: expected a last_hidden_state of shape [batch, tokens, {width}]"
            if states.dtype != model.dtype:
                return f"encoder_outputs: expected {model.dtype}, as the model is, got {states.dtype}"
            source = states
        elif not isinstance(source, Tensor):
            return f"pixel_values: expected a tensor, got {type(source).__name__}"
        elif not source.is_floating_point():
            return f"pixel_values: expected floating-point, got {source.dtype}"
        if source.device != model.device:
            return f"{name}: expected them on {model.device}, as the model is, got {source.device}"
        if torch.is_autocast_enabled(source.device.type):
            return "autocast is on"
    return None


def look_at(model: VisionEncoderDecoderModel) -> tuple[list[Any], list[Any]]:
    """What a model is, and the state of its weights, each to be compared with an earlier look; takes milliseconds.

    Ids and addresses mean the same only as long as what they name is kept.
    """
    structure: list[Any] = [
        type(model),
        _global_hooks(),
        _scalars(model.config.encoder),
        _scalars(model.config.decoder),
    ]
    weights: list[Any] = [_num_optimizer_steps]
    left: list[nn.Module] = [model]
    while left:
        module = left.pop()
        own = module.__dict__
        parameters, modules = own["_parameters"], own["_modules"]
        structure.append((type(module), tuple(parameters), tuple(modules), tuple(own["_buffers"])))
        structure.append((module.training, _is_hooked(module), _scalars(module)))
        for p in parameters.values():
            if p is not None:
                plain = type(p) is nn.Parameter  # others, as of quantised weights, may have no address
                version = p._version if plain and not p.is_inference() else None
                weights.append((id(p), type(p), p.data_ptr() if plain else 0, version, p.dtype, p.device, p.shape))
        left += [child for child in modules.values() if child is not None]
    return structure, weights


def of_model(model: VisionEncoderDecoderModel) -> str | None:
    """Why a model computes something else than its configuration and weights say; None: it does not."""
    if _global_hooks():
        return "there are hooks on all modules"
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if module.training:
            return f"{_path(name)} is in training mode; model.eval() ends it"
        if _is_hooked(module):
            return f"{_path(name)} has hooks, or a forward() of its own"
    for name in _overridden(type(model)):
        return f"{type(model).__name__} has {name}() of its own"
    try:
        expected = without_weights(VisionEncoderDecoderModel, model.config)
    except Exception as error:
        return f"transformers makes no model of its configuration: {error}"
    return next(_differences(modules, dict(expected.named_modules())), None)


def of_weights(weights: dict[str, nn.Parameter], config: Architecture) -> str | None:
    """Why the engine cannot take these weights, by their current names; None: it can."""
    for what, found, known in (
        ("dtype", {str(p.dtype) for p in weights.values()}, [str(dtype) for dtype in DTYPES]),
        ("device", {str(p.device) for p in weights.values()}, []),
        ("kind of device", {p.device.type for p in weights.values()}, DEVICES),
        ("kind of parameter", {type(p).__name__ for p in weights.values()}, [nn.Parameter.__name__]),
    ):
        if len(found) != 1 or (known and not found <= set(known)):
            expected = f"one {what}" + (f" ({' or '.join(known)})" if known else "")
            return f"the weights: expected {expected}, found {', '.join(sorted(found))}"
    expected_by_name = expected_shapes(config)
    for name, shape in expected_by_name.items():
        if name not in weights or tuple(weights[name].shape) != shape:
            found_shape = list(weights[name].shape) if name in weights else "none"
            return f"the tensor {name}: expected shape {list(shape)}, found {found_shape}"
    for name in weights:
        if name not in expected_by_name and not is_unused(name):
            return f"the tensor {name}: expected none"
    return None


def named_weights(model: VisionEncoderDecoderModel) -> dict[str, nn.Parameter]:
    """All parameters of a model by their names in `trocr_fast.weights`."""
    return {current_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}


def without_weights(make: Callable[[Any], Any], config: VisionEncoderDecoderConfig) -> Any:
    """What is made of a copy of a model's configuration, without memory for weights."""
    config = copy.deepcopy(config)
    # It chooses how attention is computed, not what; some ways look for a GPU.
    config._attn_implementation = "eager"
    # Else it would be the default of all threads for that time.
    config.dtype = config.encoder.dtype = config.decoder.dtype = torch.get_default_dtype()
    # Nothing is drawn on this device, so a seed that was just set means what it meant.
    with _building, torch.device("meta"):
        return make(config)


def _differences(modules: dict[str, nn.Module], expected: dict[str, nn.Module]) -> Iterator[str]:
    both = [name for name in modules if name in expected]
    for name in filter(None, both):  # a class derived from the model's own is looked at elsewhere
        kind, found = type(expected[name]), type(modules[name])
        if found is not kind:
            yield (
                f"{_path(name)}: expected a {kind.__module__}.{kind.__qualname__}, "
                f"found a {found.__module__}.{found.__qualname__}"
            )
    for name in sorted(modules.keys() ^ expected.keys()):
        yield f"{_path(name)}: expected {'such a' if name in expected else 'no such'} module by the configuration"
    for name in both:
        have = _scalars(modules[name])
        for field, value in _scalars(expected[name]).items():
            if field not in have or have[field] != value:
                yield f"{_path(name)}.{field}: expected {value!r} by the configuration, found {have.get(field)!r}"


def _path(name: str) -> str:
    return f"model.{name}" if name else "the model"


def _scalars(thing: object) -> dict[str, Any]:
    """The numbers, flags and words that an object keeps in public."""
    return {
        name: value
        for name, value in thing.__dict__.items()
        if type(value) in SCALARS and name[0] != "_" and name not in NOT_COMPARED
    }


def _is_hooked(module: nn.Module) -> bool:
    own = module.__dict__
    if "forward" in own or own["_forward_pre_hooks"]:
        return True
    # Those by which transformers itself collects attentions and hidden states stay for ever, and change nothing.
    hooks = own["_forward_hooks"].values()
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


def _global_hooks() -> bool:
    return bool(nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


def _overridden(kind: type) -> Iterator[str]:
    """Methods of a VisionEncoderDecoderModel that a class derived from it has changed."""
    for parent in kind.__mro__:
        if parent is VisionEncoderDecoderModel:
            return
        for name, value in vars(parent).items():
            known = getattr(VisionEncoderDecoderModel, name, None)
            if inspect.isfunction(value) and known is not None and name != "__init__":
                yield name
