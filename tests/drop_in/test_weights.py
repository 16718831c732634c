"""The weights of an accelerated model: every change is seen, copies have their own, and they are taken once."""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, VisionEncoderDecoderModel

from tests.drop_in.calls import assert_followed, fallbacks_of, lively, outcome
from tests.parity.models import Case, build
from trocr_fast import accelerate
from trocr_fast.drop_in import Acceleration

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")


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


def test_looking_at_the_model_draws_no_random_numbers(model: VisionEncoderDecoderModel) -> None:
    before = torch.get_rng_state()
    assert model.generate.__self__._current_engines()[1] is None
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
    assert model.generate.__self__._current_engines()[1] is None
    assert {*found} <= {torch.float32}
    assert model.config.dtype == torch.bfloat16


def test_weights_are_taken_once(model: VisionEncoderDecoderModel, pixels: Tensor) -> None:
    handle = model.generate.__self__
    model.generate(pixels, max_length=5)
    engines = handle._engines
    model.generate(pixels, max_length=5, num_beams=2)
    model(pixels, decoder_input_ids=torch.full((5, 1), 2))
    model.generate(pixels, max_length=5)
    assert handle._engines is engines


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
