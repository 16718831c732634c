"""`accelerate` itself: what it refuses, undoing it, and what a model that was accelerated leaves behind."""

import copy
import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import VisionEncoderDecoderModel

import trocr_fast
from tests.drop_in.calls import assert_followed, lively, outcome
from trocr_fast import CheckpointError, accelerate


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
    network = weakref.ref(handle._engines.network)
    assert network() is not None
    handle.undo()
    assert network() is None and not handle._held
    handle = accelerate(model)
    model.generate(pixels, max_length=5)
    gone = weakref.ref(model), weakref.ref(handle._engines.network)
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


def test_importing_is_late() -> None:
    code = "import sys, trocr_fast; dir(trocr_fast); print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert trocr_fast.accelerate is accelerate
