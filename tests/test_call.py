"""`ocr(...)` has the form of transformers 4's "image-to-text" pipeline."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trocr_fast import PictureError, TrOCR
from trocr_fast.errors import UsageError

LINES = Path(__file__).parent.parent / "examples" / "lines"
TOTAL, HELLO = LINES / "total.png", LINES / "hello.jpg"


@pytest.fixture(scope="module")
def ocr() -> TrOCR:
    return TrOCR.from_pretrained(device="cpu")


def test_one_picture_gives_a_list_of_one(ocr: TrOCR) -> None:
    (line,) = ocr.read([TOTAL])
    image = Image.open(TOTAL).convert("RGB")
    for picture in (TOTAL, str(TOTAL), TOTAL.read_bytes(), image, np.asarray(image)):
        assert ocr(picture) == [{"generated_text": line.text}]


def test_several_pictures_give_a_list_of_such_lists(ocr: TrOCR) -> None:
    texts = [line.text for line in ocr.read([TOTAL, HELLO])]
    for inputs in ([TOTAL, HELLO], (str(TOTAL), Image.open(HELLO)), iter([TOTAL, HELLO])):
        assert ocr(inputs, batch_size=1) == [[{"generated_text": text}] for text in texts]
    assert ocr([TOTAL]) == [[{"generated_text": texts[0]}]]
    assert ocr([]) == []


def test_settings_are_those_of_read(ocr: TrOCR) -> None:
    (line,) = ocr.read([TOTAL], max_new_tokens=3)
    for settings in ({"max_new_tokens": 3}, {"generate_kwargs": {"max_new_tokens": 3}}):
        assert ocr(TOTAL, **settings) == [{"generated_text": line.text}]
    drawn = {"do_sample": True, "temperature": 8.0, "seed": 3}
    (line,) = ocr.read([TOTAL], **drawn)
    assert ocr(TOTAL, generate_kwargs=drawn) == [{"generated_text": line.text}] != ocr(TOTAL)
    with pytest.raises(UsageError, match=r"max_new_tokens: .*got both"):
        ocr(TOTAL, max_new_tokens=3, generate_kwargs={"max_new_tokens": 3})
    with pytest.raises(UsageError, match="num_beams"):
        ocr(TOTAL, generate_kwargs={"num_beams": 0})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([TOTAL, "no/such.png"], r"^no/such.png: expected a picture file"),
        ([TOTAL, b""], "^picture 1: expected a picture, got 0 bytes"),
        (b"", "got 0 bytes"),
        ("https://example.org/a.png", r"^https://example.org/a.png: expected a picture file"),
    ],
)
def test_a_bad_picture_is_raised(ocr: TrOCR, inputs, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        ocr(inputs)
