"""The published checkpoints themselves: `pytest -m hub`, with a network, some 8 GB of disk and 8 GB of memory.

The first step's logits are those that transformers publishes: for the base models in its own tests
(tests/models/vision_encoder_decoder/test_modeling_vision_encoder_decoder.py), for the large ones in the script that
once converted the checkpoints (convert_trocr_unilm_to_pytorch.py).
"""

import urllib.error
import urllib.request
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.parity.models import greedy
from trocr_fast.checkpoint import resolve_checkpoint
from trocr_fast.image_config import ImageConfig
from trocr_fast.images import ImageProcessor
from trocr_fast.lanes import Lanes
from trocr_fast.model import Model
from trocr_fast.text import TextDecoder
from trocr_fast.verify import repair_sinusoidal_positions

pytestmark = [pytest.mark.hub, pytest.mark.timeout(3600)]

CPU = torch.device("cpu")
DATASET = "hf-internal-testing/fixtures_ocr"
WORD, RECEIPT = "iam_picture.jpeg", "SROIE-receipt.jpeg"  # one handwritten word; a whole printed receipt
LINE = "https://fki.tic.heia-fr.ch/static/img/a01-122-02.jpg"  # a line of the IAM handwriting database

# (model, picture, first ten logits of the first step, tolerance). The receipt is shrunk on its way to the model, and
# its logits move by 1e-2 with the version of Pillow, or the backend, that does it: transformers has published three
# rows for base-printed so far, and one for the word.
PUBLISHED = [
    (
        "microsoft/trocr-base-handwritten",
        WORD,
        [-1.4502, -4.6683, -0.5347, -2.9291, 9.1435, -3.0571, 8.9764, 1.7560, 8.7358, -1.5311],
        1e-4,
    ),
    (
        "microsoft/trocr-large-handwritten",
        WORD,
        [-2.6437, -1.3129, -2.2596, -5.3455, 6.3539, 1.7604, 5.4991, 1.4702, 5.6113, 2.0170],
        1e-3,
    ),
    (
        "microsoft/trocr-base-printed",
        RECEIPT,
        [-5.6832, -5.8361, 1.1500, -6.8975, 6.8576, -2.4450, 1.2335, -1.0246, -1.9654, -3.9127],
        2e-2,
    ),
    (
        "microsoft/trocr-large-printed",
        RECEIPT,
        [-6.0162, -7.0959, 4.4155, -5.1063, 7.0468, -3.1631, 2.6466, -0.3081, -0.8106, -1.7535],
        2e-2,
    ),
]
FAMILIES = {
    "A": "microsoft/trocr-base-handwritten",
    "B": "microsoft/trocr-large-printed",
    "C": "microsoft/trocr-small-handwritten",
}


@cache  # also of failures: the hub client tries for half a minute
def fetch(name: str) -> Image.Image | str:
    """A picture, or why it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        if name == LINE:
            with urllib.request.urlopen(LINE, timeout=20) as answer:
                return Image.open(answer).convert("RGB")
        return Image.open(hf_hub_download(DATASET, name, repo_type="dataset")).convert("RGB")
    except (urllib.error.URLError, TimeoutError, LocalEntryNotFoundError) as error:
        return f"{name} is out of reach: {str(error).splitlines()[0]}"


def picture_or_skip(name: str) -> Image.Image:
    picture = fetch(name)
    if isinstance(picture, str):
        pytest.skip(picture)
    return picture


def pixel_values(folder: Path, picture: Image.Image) -> torch.Tensor:
    processor = ImageProcessor(ImageConfig.from_folder(folder), "stock")
    return processor.normalise(processor.load(picture)[None])  # [1, 3, H, W]


@pytest.mark.parametrize(("name", "picture", "expected", "tolerance"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
@torch.inference_mode()
def test_first_logits_are_the_published_ones(name, picture, expected, tolerance):
    image = picture_or_skip(picture)
    folder = resolve_checkpoint(name)
    model = Model.load(folder, CPU, torch.float32)
    generation, decoder = model.config.generation, model.decoder
    lines = model.encode(pixel_values(folder, image))
    lanes = Lanes(decoder.config, 1, 1, torch.float32, CPU)
    lanes.admit(0)
    start = torch.tensor([generation.decoder_start_token_id])
    fed = decoder.step(start, lanes.begin_step(1), lines, decoder.positions(generation.use_cache))
    logits = decoder.logits(fed)
    assert logits.shape == (1, model.config.decoder.vocab_size)
    torch.testing.assert_close(logits[0, :10], torch.tensor(expected), rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("picture", [WORD, RECEIPT, LINE], ids=["word", "receipt", "line"])
@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_every_family_gives_the_tokens_of_transformers(name, picture):
    from transformers import VisionEncoderDecoderModel

    image = picture_or_skip(picture)
    folder = resolve_checkpoint(name)
    pixels = pixel_values(folder, image)
    reference = VisionEncoderDecoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    repair_sinusoidal_positions(reference)
    expected = reference.generate(pixels, max_new_tokens=40)[0].tolist()
    del reference
    (found,) = greedy(Model.load(folder, CPU, torch.float32), pixels, 41)
    assert found.tokens == expected


def test_the_line_is_read():
    image = picture_or_skip(LINE)
    folder = resolve_checkpoint(FAMILIES["A"])
    model = Model.load(folder, CPU, torch.float32)
    (found,) = greedy(model, pixel_values(folder, image), model.config.read_max_length)
    (text,) = TextDecoder.from_folder(folder).batch_decode([found.tokens])
    assert found.ended and text.startswith("industry,") and text.endswith("Let us have a")
