"""One small model, alone and accelerated."""

import copy

import pytest
from torch import Tensor
from transformers import VisionEncoderDecoderModel

from tests.drop_in.calls import lively
from trocr_fast import accelerate


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
