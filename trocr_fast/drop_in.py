"""An ordinary `VisionEncoderDecoderModel` whose `generate()` runs on this engine: `accelerate(model)`.

transformers' `generate` runs over a network of ours with the model's weights (`trocr_fast.generate_call`). What that
cannot do goes to the original model, with a warning that says why (`trocr_fast.fallbacks`).
"""

import inspect
import threading
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from transformers import VisionEncoderDecoderModel

from trocr_fast import fallbacks
from trocr_fast.config import Architecture
from trocr_fast.cross_memory import KINDS
from trocr_fast.errors import CheckpointError
from trocr_fast.generate_call import Call
from trocr_fast.kept_engine import KeptEngine
from trocr_fast.model import Network
from trocr_fast.recording import give_back

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
      value projections are held twice, on a CPU in fp32 all linear layers. On a GPU so does what was recorded as CUDA
      graphs, until `undo()`.
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
        give_back()

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
            self._engines: KeptEngine | None = None
            self._reason: str | None = None  # why there are none
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
        call = Call.resolve(model, arguments, settings)
        if call is None:
            return own(model, *arguments, **settings)
        engines, reason = (None, call.reason) if call.reason else self._current_engines()
        if engines is not None:
            return call.run(engines)
        if self._unsupported == "raise":
            raise NotImplementedError(f"generate: {reason}")
        warnings.warn(f"trocr_fast leaves this call to the original generate(): {reason}", FallbackWarning, 2)
        return own(model, *arguments, **settings)

    generate.__signature__ = inspect.signature(VisionEncoderDecoderModel.generate)  # type: ignore[attr-defined]

    def _current_engines(self) -> tuple[KeptEngine | None, str | None]:
        """Engines with the model's present weights, or why there are none."""
        with self._lock:
            structure, weights = fallbacks.look_at(self._model)
            if structure != self._structure:
                self._model_reason = fallbacks.of_model(self._model)
            if structure != self._structure or weights != self._weights:
                self._structure, self._weights = structure, weights
                named = fallbacks.named_weights(self._model)
                self._held = {name: parameter.detach() for name, parameter in named.items()}
                self._engines, self._reason = None, self._model_reason
                if self._reason is None:
                    self._engines, self._reason = self._build(named)
            return self._engines, self._reason

    def _build(self, named: dict[str, nn.Parameter]) -> tuple[KeptEngine | None, str | None]:
        try:
            config = Architecture.from_dict(self._model.config.to_dict(), "model.config")
        except CheckpointError as error:
            return None, str(error)
        reason = fallbacks.of_weights(named, config)
        if reason is not None:
            return None, reason
        return KeptEngine(Network(config, self._held, self._cross_memory)), None
