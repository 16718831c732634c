"""The fine-tuning examples, run as their page says; what they learn, and what they write."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jiwer
import pytest
import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import TrOCRProcessor, VisionEncoderDecoderModel

from tests.parity.models import Case, build
from tests.pictures import SMALL_PRINTED, write_settings
from trocr_fast import TrOCR
from trocr_fast.checkpoint import BUILTIN
from trocr_fast.metrics import TruthError
from trocr_fast.verify import Reference, verify

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "fine_tune"
SAMPLES = [ROOT / "examples" / "lines" / name for name in ("gate.png", "hello.jpg", "sale.webp", "book.jpg")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def upper_case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample pictures whose truth is in capitals: something that the built-in model has to learn first."""
    folder = tmp_path_factory.mktemp("upper_case")
    for sample in SAMPLES:
        (folder / sample.name).write_bytes(sample.read_bytes())
        truth = sample.with_name(f"{sample.stem}.gt.txt").read_text(encoding="utf-8")
        (folder / f"{sample.stem}.gt.txt").write_text(truth.upper(), encoding="utf-8")
    return folder


@pytest.mark.parametrize("script", ["native.py", "trainer.py"])
def test_a_script_teaches_and_writes_a_checkpoint(script: str, upper_case: Path, tmp_path: Path) -> None:
    options = ["--epochs", "3", "--batch-size", "2", "--learning-rate", "5e-4"]
    command = [sys.executable, str(FOLDER / script), str(upper_case), str(upper_case), str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "FallbackWarning" not in done.stderr
    losses = [float(loss) for loss in re.findall(r"\bloss'?:? '?([\d.]+)", done.stdout)]
    rates = [float(rate) for rate in re.findall(r"CER ([\d.]+)%", done.stdout)]
    assert len(losses) == 3 and losses[-1] < 0.5 * losses[0], done.stdout
    assert rates[0] > 30 and rates[-1] < 0.5 * rates[0], done.stdout

    ocr = TrOCR.from_pretrained(tmp_path, device="cpu")
    pictures = [upper_case / sample.name for sample in SAMPLES]
    assert all(check.equal for check in verify(ocr, Reference(tmp_path, torch.device("cpu")), pictures, batch_size=4))
    truths = [path.with_name(f"{path.stem}.gt.txt").read_text(encoding="utf-8").strip() for path in pictures]
    found = [line.text for line in ocr.read(pictures)]
    assert 100 * jiwer.cer(truths, found) == pytest.approx(rates[-1], abs=0.01)  # the weights that were read last
    processor = TrOCRProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer("abc").input_ids == TrOCRProcessor.from_pretrained(BUILTIN).tokenizer("abc").input_ids


@pytest.mark.parametrize("script", ["native.py", "trainer.py"])
def test_a_script_overwrites_nothing(script: str, upper_case: Path, tmp_path: Path) -> None:
    held = {"model.safetensors": b"of days"}
    for name, content in held.items():
        (tmp_path / name).write_bytes(content)
    for out in (tmp_path, tmp_path / "model.safetensors"):
        command = [sys.executable, str(FOLDER / script), str(upper_case), str(upper_case), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=120)
        assert done.returncode == 2 and f"expected a new or an empty folder, got {out}" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == held


@pytest.fixture(scope="module")
def lines() -> Iterator[ModuleType]:
    """The scripts' shared file. They import it by its plain name, which must not stay importable."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("lines")
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("lines", None)


@pytest.fixture(scope="module")
def loaded(lines: ModuleType) -> tuple[TrOCRProcessor, VisionEncoderDecoderModel]:
    processor, model = lines.load(None)
    return processor, model.eval()


def test_a_folder_as_the_published_ones(lines: ModuleType, tmp_path: Path) -> None:
    """No tokenizer.json, sinusoidal positions, and the tokens of start and padding in generation_config.json alone."""
    model = build(Case("B", decoder={"vocab_size": 300}), 0)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(tmp_path)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a line"], vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.save_model(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    write_settings(tmp_path, SMALL_PRINTED | {"size": 16})

    processor, model = lines.load(str(tmp_path))
    data = lines.Lines(str(ROOT / "examples" / "lines"), processor, 128)
    assert processor.batch_decode(data.labels, skip_special_tokens=True) == data.texts
    assert model(**lines.collate([data[0], data[1]])).loss.isfinite()
    for saved in (processor, model):
        saved.save_pretrained(tmp_path / "out")
    [line] = TrOCR.from_pretrained(tmp_path / "out", device="cpu").read([data.paths[0]])
    assert line.error is None and line.token_ids[0] == model.config.decoder_start_token_id == 2


def test_labels_are_what_the_model_generates(lines: ModuleType, loaded: tuple) -> None:
    """After its start token, to the end token."""
    processor, _ = loaded
    data = lines.Lines(str(ROOT / "examples" / "lines"), processor, 128)
    ocr = TrOCR.from_pretrained(device="cpu")
    num_compared = 0
    for line, item, text in zip(ocr.read(data.paths), data, data.texts, strict=True):
        if line.text == text:
            num_compared += 1
            assert item["labels"].tolist() == line.token_ids[1:]
            torch.testing.assert_close(
                item["pixel_values"], ocr.pixel_values([ocr.images.load(line.path)])[0], atol=0.05, rtol=0
            )
    assert num_compared > 30


def test_padding_does_not_change_the_loss(lines: ModuleType, loaded: tuple) -> None:
    processor, model = loaded
    data = lines.Lines(str(ROOT / "examples" / "lines"), processor, 128)
    items = sorted((data[i] for i in range(6)), key=lambda item: len(item["labels"]))
    shortest, longest = items[0], items[-1]
    lengths = [len(item["labels"]) for item in (shortest, longest)]
    assert lengths[0] < lengths[1]
    with torch.no_grad():
        alone = [model(**lines.collate([item])).loss.item() for item in (shortest, longest)]
        both = model(**lines.collate([shortest, longest])).loss.item()
    mean = sum(loss * length for loss, length in zip(alone, lengths, strict=True)) / sum(lengths)
    assert both == pytest.approx(mean, rel=1e-3)


def test_lines_that_cannot_be_trained_on(lines: ModuleType, loaded: tuple, tmp_path: Path) -> None:
    processor, _ = loaded
    Image.new("RGB", (80, 20), "white").save(tmp_path / "a.png")
    with pytest.raises(TruthError, match=r"a\.gt\.txt"):
        lines.Lines(str(tmp_path), processor, 128)
    (tmp_path / "a.gt.txt").write_text("twelve chars")
    assert len(lines.Lines(str(tmp_path), processor, 13)) == 1
    with pytest.raises(ValueError, match=r"a\.png: expected a text of at most 12 tokens, got 13"):
        lines.Lines(str(tmp_path), processor, 12)
