"""One call of transformers' `generate` over a `Network`.

transformers' own `generate` stays in charge of arguments, defaults, processors and stopping, so whatever it accepts
means what it always meant; encoder and decoder under it are the network's. Where only tokens are asked for the engine
decodes (`trocr_fast.engine_generate`), else transformers' own loop, step by step.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import ModelOutput

from trocr_fast import engine_generate, fallbacks
from trocr_fast.cross_memory import Lines
from trocr_fast.decoder import check_length
from trocr_fast.errors import CheckpointError
from trocr_fast.kept_engine import KeptEngine
from trocr_fast.lanes import Lanes
from trocr_fast.model import Network


@dataclass(frozen=True)
class Call:
    """The arguments of a `generate` call, and what transformers makes of them."""

    model: Any  # whose class, configuration and defaults count; its weights don't
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    config: GenerationConfig  # that the arguments resolve to
    sources: dict[str, Any]  # what there is to read, by the names of the arguments
    reason: str | None  # why a network cannot follow; None: it can

    @classmethod
    def resolve(cls, model: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> "Call | None":
        """None: transformers refuses these arguments, and has the words for it."""
        signature = inspect.signature(type(model).generate)
        try:
            named = signature.bind(model, *arguments, **settings).arguments
            keywords = named.pop("kwargs", {})
            config, others = model._prepare_generation_config(named.get("generation_config"), **keywords)
            for_model = {name: v for name, v in others.items() if name not in fallbacks.NOT_FOR_THE_MODEL}
            model._validate_model_kwargs(for_model)
        except Exception:  # whatever it is, it is raised again where the user expects it
            return None
        sources = {name: x for name in ("inputs", "pixel_values") if (x := {**named, **others}.get(name)) is not None}
        if "encoder_outputs" in others:
            sources["encoder_outputs"] = others["encoder_outputs"]
        reason = fallbacks.of_call(named, config, others) or fallbacks.of_sources(sources, model)
        return cls(model, arguments, settings, config, sources, reason) if reason or len(sources) == 1 else None

    def run(self, engines: KeptEngine) -> ModelOutput | Tensor:
        """What `generate` returns. Only without a `reason`."""
        (source,) = self.sources.values()
        if "encoder_outputs" in self.sources:
            num_lines, num_tokens = source.last_hidden_state.shape[:2]
            decode = DecodeCache(engines, self.config.use_cache, encoded=source.last_hidden_state)
        else:
            num_lines, num_tokens = len(source), 1
            decode = DecodeCache(engines, self.config.use_cache, pixels=source)
        # Has to be there, and is repeated for every beam: what decoding looks at is in the cache.
        stand_in: Any = torch.empty(num_lines, num_tokens, 1, device=engines.network.device)
        fast: Any = object.__new__(_fast_class(type(self.model)))  # type: ignore[arg-type]
        fast.__dict__ = self.model.__dict__
        settings = {
            **self.settings,
            "encoder_outputs": BaseModelOutput(last_hidden_state=stand_in),
            "past_key_values": decode,
        }
        out: ModelOutput | Tensor = type(self.model).generate(fast, *self.arguments, **settings)
        if isinstance(out, Tensor):
            return out
        return type(out)(**{name: value for name, value in out.items() if value is not decode})


class WeightlessModel(VisionEncoderDecoderModel):
    """What transformers has to know of a checkpoint to generate over its network: all but the weights.

    Args:
        config: as loaded from the checkpoint.
        network: says where and in what is computed.
    """

    _network: Network

    def __init__(self, config: VisionEncoderDecoderConfig, network: Network) -> None:
        self.__dict__["_network"] = network  # which the base class may want to know the device of
        super().__init__(config)

    @classmethod
    def from_folder(cls, folder: Path, network: Network) -> "WeightlessModel":
        """With the defaults of `generate` that `from_pretrained` would give.

        Raises:
            CheckpointError: transformers makes no model of the configuration.
        """
        defaults: dict[str, Any] = {}
        if not (folder / "generation_config.json").exists():
            defaults = {"config_file_name": "config.json", "_from_model_config": True}
        try:
            config = VisionEncoderDecoderConfig.from_pretrained(folder, local_files_only=True)
            model = fallbacks.without_weights(lambda config: cls(config, network), config)
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True, **defaults)
        except Exception as error:
            raise CheckpointError(
                f"{folder}: expected a checkpoint that transformers loads too, which generate() needs; it raised "
                f"{type(error).__name__}: {error}"
            ) from error
        return model.eval()

    @property
    def device(self) -> torch.device:
        return self._network.device

    @property
    def dtype(self) -> torch.dtype:
        return self._network.dtype


class DecodeCache:
    """What stands in `past_key_values`: the lines being decoded, the same number of rows for each.

    Either transformers' loop asks for one step after another (`feed`, `reorder_cache`), or the engine does all (`run`).

    Args:
        engines: of the network.
        count_pads: the rule of sinusoidal positions, as of `Decoder.positions`.
        pixels: of the lines, [lines, channels, H, W].
        encoded: in place of pixels, what the encoder makes of them, [lines, tokens, encoder width].

    Raises:
        ValueError: no lines, or pixels of another shape than the encoder's.
    """

    is_compileable = False

    def __init__(
        self,
        engines: KeptEngine,
        count_pads: bool,
        pixels: Tensor | None = None,
        encoded: Tensor | None = None,
    ) -> None:
        network = engines.network
        if pixels is not None:
            if len(pixels) == 0:
                raise ValueError(f"pixel_values: expected at least one picture, got shape {list(pixels.shape)}")
            network.encoder.check_shape(pixels)
        self._network, self._engines, self._count_pads = network, engines, count_pads
        self._pixels, self._encoded = pixels, encoded
        self._decoder = network.decoder
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
        parents = beam_idx.view(self._lines.num_lines, -1) % self._lanes.num_beams
        self._lanes.reorder(parents.cpu().numpy().astype("int64"))

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        """Tokens [rows, steps], one after another -> logits [rows, vocab_size] after the last."""
        positions = self._positions
        if self._lanes is None:
            positions = self._prompt_positions
            self._lines = self._encode()
            num_lines, embedding = self._lines.num_lines, self._decoder.embedding
            num_beams = len(tokens) // num_lines
            self._lanes = Lanes(self._decoder.config, num_lines, num_beams, embedding.dtype, embedding.device)
            for lane in range(num_lines):
                self._lanes.admit(lane)
        for column in tokens.unbind(1):
            step = self._lanes.begin_step(self._lines.num_lines)
            check_length(step.longest, positions)
            x = self._decoder.step(column, step, self._lines, positions)
        return self._decoder.logits(x)

    def _encode(self) -> Lines:
        if self._pixels is not None:
            return self._network.encode(self._pixels)
        assert self._encoded is not None
        return self._network.lines(self._network.project(self._encoded))

    def run(self, start_token: int, processors: LogitsProcessorList, config: GenerationConfig) -> Tensor | None:
        """Token ids, int64 [rows, longest], or None, as `trocr_fast.engine_generate.decode` gives them."""
        if self._pixels is None:  # the engine takes nothing else
            return None
        return engine_generate.decode(self._engines, self._pixels, self._count_pads, start_token, processors, config)


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
