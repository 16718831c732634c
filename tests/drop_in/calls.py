"""What the tests of `accelerate` share: models, and a call's result or error with the warnings on its way."""

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import TrOCRProcessor, VisionEncoderDecoderModel
from transformers.generation.streamers import BaseStreamer

from tests.parity.models import Case, lively_reference
from trocr_fast import FallbackWarning
from trocr_fast.checkpoint import BUILTIN

FOLDER = Path(__file__).parent
MAX_LENGTH = 12


@cache
def lively() -> tuple[VisionEncoderDecoderModel, Tensor]:
    model, pixels, _ = lively_reference(Case("A"))
    return model, pixels[:5]


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


def outcome(model: VisionEncoderDecoderModel, *arguments: Any, **settings: Any) -> Any:
    """Tokens, or what was raised."""
    torch.manual_seed(3)
    try:
        out = model.generate(*arguments, **settings)
    except Exception as error:
        return type(error), str(error)
    return (out if isinstance(out, Tensor) else out.sequences).tolist()


def fallbacks_of(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call gives, and the FallbackWarnings on the way: each must point at who called, in these tests."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    found = [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]
    assert all(Path(w.filename).parent == FOLDER for w in caught if issubclass(w.category, FallbackWarning))
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


@cache
def builtin() -> tuple[TrOCRProcessor, VisionEncoderDecoderModel]:
    return TrOCRProcessor.from_pretrained(BUILTIN), VisionEncoderDecoderModel.from_pretrained(BUILTIN)


@cache
def sample_line() -> Image.Image:
    image = Image.new("RGB", (260, 48), "white")
    ImageDraw.Draw(image).text((8, 4), "hello world", "black", ImageFont.load_default(32))
    return image
