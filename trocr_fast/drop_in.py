"""An ordinary `VisionEncoderDecoderModel` whose `generate()` runs on this engine: `accelerate(model)`.

transformers' own `generate` stays in charge of arguments, defaults, processors and stopping, so whatever it accepts
means what it always meant; encoder and decoder under it are ours, and the weights are the model's. Where only tokens
are asked for the engine decodes (`trocr_fast.engine_generate`), else transformers' own loop, step by step. What neither
can do goes to the original model, with a warning that says why (`trocr_fast.fallbacks`).
"""

import inspect
import threading
import warnings
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, VisionEncoderDecoderModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from trocr_fast import engine_generate, fallbacks
from trocr_fast.config import Architecture
from trocr_fast.cross_memory import KINDS
from trocr_fast.errors import CheckpointError
from trocr_fast.lanes import Lanes
from trocr_fast.model import Network

if TYPE_CHECKING:
    from transformers.utils import ModelOutput


class FallbackWarning(UserWarning):
    """A call of `generate` went to the original model."""


def accelerate(
    model: VisionEncoderDecoderModel, *, unsupported: Literal["warn", "raise"] = "warn", cross_memory: str = "auto"
) -> "Acceleration":
    """Let `model.generate` run on this engine, with the same arguments and results.

    Args:
        model: with a ViT or DeiT encoder and a TrOCR decoder, on a CPU or CUDA device, in float32, float16 or bfloat16.
        unsupported: what becomes of a call that the engine cannot do: "warn" (one FallbackWarning that names the
            reason, and the original `generate`) or "raise" (NotImplementedError).
        cross_memory: "kv", "latent" or "auto" (`trocr_fast.cross_memory`).

    Returns:
        A handle to undo it, also as a `with` block. Of a copy of the model it is `model.generate.__self__`.

    Raises:
        TypeError: `model` is no VisionEncoderDecoderModel.
        ValueError: an option of another value; a model with a `generate` of its own, as an accelerated one.
        CheckpointError: an architecture that the engine does not know; says which field.

    Only `generate` changes: the model's forward pass, and with it training, is transformers' own. Every call looks at
    the model first, so training, `load_state_dict`, `to` and `resize_token_embeddings` between calls are seen. Writes
    through `.data`, and into weights that were made in inference mode, leave no trace: call `refresh()` after them.

    Tokens are transformers' in float32. What differs:

    - `past_key_values` of the result is None, and the engine's weights take memory beside the model's: query, key and
      value projections are held twice.
    - Positions beyond the table raise ValueError with a remedy, where transformers raises IndexError, or a device-side
      assertion; pixels of another shape raise ValueError with the shape that was expected; so does an empty batch.
    - A decoder with sinusoidal positions, which transformers 5 cannot run after loading, just works.
    - A custom processor or criterion that looks at the model sees an object of a class derived from the model's.
    """
    return Acceleration(model, unsupported, cross_memory)


class Acceleration:
    """What `accelerate` did to a model, until `undo()`; made by `accelerate`."""

    def __init__(self, model: Any, unsupported: str, cross_memory: str) -> None:
        if not isinstance(model, VisionEncoderDecoderModel):
            raise TypeError(f"model: expected a VisionEncoderDecoderModel, got {type(model).__name__}")
        if unsupported not in ("warn", "raise"):
            raise ValueError(f"unsupported: expected 'warn' or 'raise', got {unsupported!r}")
        if cross_memory not in (*KINDS, "auto"):
            raise ValueError(f"cross_memory: expected one of {', '.join(KINDS)} or auto, got {cross_memory!r}")
        if "generate" in model.__dict__:
            ours = isinstance(getattr(model.__dict__["generate"], "__self__", None), Acceleration)
            found = "one that is accelerated already" if ours else repr(model.__dict__["generate"])
            raise ValueError(f"model: expected one whose generate() is its class's, got {found}")
        Architecture.from_dict(model.config.to_dict(), "model.config")  # says so now if it is none of ours
        self._model: Any = model
        self._unsupported, self._cross_memory = unsupported, cross_memory
        self._lock = threading.Lock()
        self.refresh()
        model.__dict__["generate"] = self.generate

    def undo(self) -> None:
        """Give the model its own `generate` back, and the memory; a second time does nothing."""
        if self._model.__dict__.get("generate") == self.generate:
            del self._model.generate
        self.refresh()

    def __enter__(self) -> VisionEncoderDecoderModel:
        model: VisionEncoderDecoderModel = self._model
        return model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def refresh(self) -> None:
        """Take the model's weights anew at the next call; needed only after writes through `.data`."""
        with self._lock:
            self._structure: list[Any] | None = None  # as looked at when what follows was made
            self._weights: list[Any] = []
            self._held: dict[str, Tensor] = {}  # those weights: no others can come to lie where they do
            self._network: Network | None = None
            self._reason: str | None = None  # why there is no network
            self._model_reason: str | None = None  # whatever the weights are

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_model", "_unsupported", "_cross_memory")}

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, which takes the weights of its own model
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self.refresh()

    def generate(self, *arguments: Any, **settings: Any) -> "ModelOutput | Tensor":
        """`model.generate`; see transformers' `GenerationMixin.generate`."""
        model, own = self._model, type(self._model).generate
        resolved = _resolve(model, arguments, settings)
        if resolved is None:
            return own(model, *arguments, **settings)  # has the words for what is wrong
        named, config, others = resolved
        reason = fallbacks.of_call(named, config, others)
        pixels = [x for x in (named.get("inputs"), others.get("pixel_values")) if x is not None]
        if reason is None and len(pixels) != 1:
            return own(model, *arguments, **settings)
        reason = reason or fallbacks.of_pixels(pixels[0], model)
        network = None
        if reason is None:
            network, reason = self._current_network()
        if network is None:
            if self._unsupported == "raise":
                raise NotImplementedError(f"generate: {reason}")
            warnings.warn(f"trocr_fast leaves this call to the original generate(): {reason}", FallbackWarning, 2)
            return own(model, *arguments, **settings)

        cache = DecodeCache(network, pixels[0], count_pads=config.use_cache)
        # Has to be there, and is repeated for every beam: what decoding looks at is in the cache.
        states: Any = torch.empty(len(pixels[0]), 1, 1, device=network.device)
        encoded = BaseModelOutput(last_hidden_state=states)
        fast: Any = object.__new__(_fast_class(type(model)))  # type: ignore[arg-type]
        fast.__dict__ = model.__dict__
        out = own(fast, *arguments, **{**settings, "encoder_outputs": encoded, "past_key_values": cache})
        if isinstance(out, Tensor):
            return out
        return type(out)(**{name: value for name, value in out.items() if value is not cache})

    generate.__signature__ = inspect.signature(VisionEncoderDecoderModel.generate)  # type: ignore[attr-defined]

    def _current_network(self) -> tuple[Network | None, str | None]:
        """The engine with the model's present weights, or why there is none."""
        with self._lock:
            structure, weights = fallbacks.look_at(self._model)
            if structure != self._structure:
                self._model_reason = fallbacks.of_model(self._model)
            if structure != self._structure or weights != self._weights:
                self._structure, self._weights = structure, weights
                named = fallbacks.named_weights(self._model)
                self._held = {name: parameter.detach() for name, parameter in named.items()}
                self._network, self._reason = None, self._model_reason
                if self._reason is None:
                    self._network, self._reason = self._build(named)
            return self._network, self._reason

    def _build(self, named: dict[str, nn.Parameter]) -> tuple[Network | None, str | None]:
        try:
            config = Architecture.from_dict(self._model.config.to_dict(), "model.config")
        except CheckpointError as error:
            return None, str(error)
        reason = fallbacks.of_weights(named, config)
        return (Network(config, self._held, self._cross_memory), None) if reason is None else (None, reason)


class DecodeCache:
    """What stands in `past_key_values`: the lines being decoded, the same number of rows for each.

    Either transformers' loop asks for one step after another (`feed`, `reorder_cache`), or the engine does all (`run`).

    Args:
        pixels: of the lines, [lines, channels, H, W].
        count_pads: the rule of sinusoidal positions, as of `Decoder.positions`.

    Raises:
        ValueError: no pictures, or pixels of another shape than the encoder's.
    """

    is_compileable = False

    def __init__(self, network: Network, pixels: Tensor, count_pads: bool) -> None:
        if len(pixels) == 0:
            raise ValueError(f"pixel_values: expected at least one picture, got shape {list(pixels.shape)}")
        network.encoder.check_shape(pixels)
        self._network, self._pixels, self._count_pads = network, pixels, count_pads
        self._decoder, self._num_lines = network.decoder, len(pixels)
        self._positions = network.decoder.positions(count_pads)
        # All tokens of a prompt are fed in one piece, whose positions transformers counts in the one way.
        self._prompt_positions = network.decoder.positions(count_pads=False)
        self._lanes: Lanes | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens fed so far."""
        return 0 if self._lanes is None else int(self._lanes.lengths[0])

    @torch.inference_mode()
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row go on from another one of its line, int [rows]."""
        assert self._lanes is not None
        parents = beam_idx.view(self._num_lines, -1) % self._lanes.num_beams
        self._lanes.reorder(parents.cpu().numpy().astype("int64"))

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        """Tokens [rows, steps], one after another -> logits [rows, vocab_size] after the last."""
        positions = self._positions
        if self._lanes is None:
            positions = self._prompt_positions
            self._lines = self._network.encode(self._pixels)
            embedding = self._decoder.embedding
            num_beams = len(tokens) // self._num_lines
            self._lanes = Lanes(self._decoder.config, self._num_lines, num_beams, embedding.dtype, embedding.device)
            for lane in range(self._num_lines):
                self._lanes.admit(lane)
        for column in tokens.unbind(1):
            step = self._lanes.begin_step(self._num_lines)
            x = self._decoder.step(column, step, self._lines, positions)
        return self._decoder.logits(x)

    def run(self, start_token: int, processors: LogitsProcessorList, config: GenerationConfig) -> Tensor | None:
        """Token ids, int64 [rows, longest], or None, as `trocr_fast.engine_generate.decode` gives them."""
        return engine_generate.decode(self._network, self._pixels, self._count_pads, start_token, processors, config)


def _resolve(
    model: Any, arguments: tuple[Any, ...], settings: dict[str, Any]
) -> tuple[dict[str, Any], GenerationConfig, dict[str, Any]] | None:
    """Arguments by name, what they resolve to, and those that are no part of it; None if transformers refuses them."""
    signature = inspect.signature(type(model).generate)
    try:
        named = signature.bind(model, *arguments, **settings).arguments
        keywords = named.pop("kwargs", {})
        config, others = model._prepare_generation_config(named.get("generation_config"), **keywords)
        for_model = {name: v for name, v in others.items() if name not in fallbacks.NOT_FOR_THE_MODEL}
        model._validate_model_kwargs(for_model)
    except Exception:  # whatever it is, it is raised again where the user expects it
        return None
    return named, config, others


@cache
def _fast_class(base: Any) -> type:
    """A model class whose forward pass is a `DecodeCache`'s, and its decoding loops where that can do them."""

    def forward(self: Any, **inputs: Any) -> Seq2SeqLMOutput:
        decode = inputs["past_key_values"]
        logits = decode.feed(inputs["decoder_input_ids"])
        return Seq2SeqLMOutput(logits=logits.unsqueeze(1), past_key_values=decode)

    def prepare(self: Any, *arguments: Any, **settings: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        config, others = base._prepare_generation_config(self, *arguments, **settings)
        config.use_cache = True  # one token a row and step, whatever the rule of positions
        return config, others

    def loop(name: str) -> Any:
        own = getattr(base, name)

        def run(
            self: Any,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **others: Any,
        ) -> Any:
            asked = (input_ids, logits_processor, stopping_criteria, generation_config)
            if engine_generate.is_possible(*asked, others.get("streamer")):
                decode: DecodeCache = others["past_key_values"]
                found = decode.run(int(input_ids[0, 0]), logits_processor, generation_config)
                if found is not None:
                    return found
            return own(self, *asked, **others)

        return run

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]  # arguments are held against it
    # called as it is: what model.compile() has left in the dictionary that is shared would call the model's own
    methods = {"forward": forward, "__call__": forward, "_prepare_generation_config": prepare, "__module__": __name__}
    methods |= {name: loop(name) for name in ("_sample", "_beam_search")}
    return type(base.__name__, (base,), methods)
