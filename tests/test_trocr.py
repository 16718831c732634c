"""The public class on the built-in model and on small models of transformers."""

import copy
import itertools
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import trocr_fast
from tests.parity.models import Case, build, lively_reference, save
from trocr_fast import CheckpointError, TrOCR
from trocr_fast.checkpoint import BUILTIN
from trocr_fast.config import CheckpointConfig
from trocr_fast.cross_memory import KINDS, choose_kind
from trocr_fast.errors import UsageError

LINES = Path(__file__).parent.parent / "examples" / "lines"
SAMPLES = sorted(path for path in LINES.iterdir() if path.suffix != ".txt")


@pytest.fixture(scope="module")
def ocr() -> TrOCR:
    return TrOCR.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def samples(ocr: TrOCR):
    return list(ocr.read(SAMPLES))


def test_reads_every_kind_of_picture(ocr: TrOCR) -> None:
    path = LINES / "total.png"
    image = Image.open(path).convert("RGB")
    kinds = [path, str(path), path.read_bytes(), image, np.asarray(image)]
    lines = list(ocr.read(kinds))
    assert [line.path for line in lines] == [str(path), str(path), None, None, None]
    assert len({(line.text, line.confidence) for line in lines}) == 1
    assert all(line.error is None and not line.truncated for line in lines)


def test_batch_size_changes_nothing_but_speed(ocr: TrOCR, samples) -> None:
    assert len({line.text for line in samples}) > len(samples) // 2
    for batch_size in (1, 5, 100):
        lines = list(ocr.read(SAMPLES, batch_size=batch_size))
        assert [line.token_ids for line in lines] == [line.token_ids for line in samples]
        # The product's order of additions may differ with the batch, not more.
        np.testing.assert_allclose([x.confidence for x in lines], [x.confidence for x in samples], rtol=1e-4)


def test_bad_pictures_are_rows_and_touch_nothing_else(ocr: TrOCR, samples) -> None:
    mixed = [b"", *SAMPLES[:2], "no/such/file.png", SAMPLES[2], object(), b"garbage"]
    lines = list(ocr.read(mixed, batch_size=2))
    assert [line.error is None for line in lines] == [False, True, True, False, True, False, False]
    assert [line.token_ids for line in lines if line.error is None] == [line.token_ids for line in samples[:3]]
    assert list(ocr.read([b""] * 3))[2].text is None
    assert list(ocr.read([])) == []


def test_reads_an_endless_stream(ocr: TrOCR) -> None:
    taken = 0

    def endless():
        nonlocal taken
        for path in itertools.cycle(SAMPLES):
            taken += 1
            yield path

    lines = ocr.read(endless(), batch_size=4, num_workers=2)
    first = list(itertools.islice(lines, 6))
    assert [line.path for line in first] == [str(path) for path in SAMPLES[:6]]
    # decoded, encoded and waiting, what the loaders take ahead, and lines that ended before an earlier one
    assert taken <= 3 * 4 + (2 * 2 + 1) + 4 * 4
    lines.close()


def test_a_run_of_bad_pictures_is_told_before_the_stream_ends(ocr: TrOCR) -> None:
    lines = ocr.read(itertools.repeat(b""), batch_size=2, num_workers=1)
    assert next(lines).error is not None
    lines.close()


def test_limit_marks_lines_as_truncated(ocr: TrOCR, samples) -> None:
    for line, cut in zip(samples, ocr.read(SAMPLES, max_new_tokens=3), strict=True):
        assert cut.token_ids == line.token_ids[:4]
        assert cut.truncated == (len(line.token_ids) > 4)
        assert not line.truncated


def test_confidence_is_the_mean_log_probability(ocr: TrOCR, samples) -> None:
    """Against transformers' own scores of the same tokens."""
    from trocr_fast.verify import Reference

    reference = Reference(BUILTIN, torch.device("cpu"))
    for path, line in list(zip(SAMPLES, samples, strict=True))[::6]:
        pixels = ocr.pixel_values([ocr.images.load(path)])
        tokens = torch.tensor([line.token_ids])
        with torch.inference_mode():
            logits = reference.model(pixels, decoder_input_ids=tokens[:, :-1]).logits
        expected = logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).mean().exp().item()
        assert line.confidence == pytest.approx(expected, rel=1e-4)


def test_text_equals_the_processors(samples) -> None:
    from transformers import TrOCRProcessor

    processor = TrOCRProcessor.from_pretrained(BUILTIN)
    decoded = processor.batch_decode([line.token_ids for line in samples], skip_special_tokens=True)
    assert decoded == [line.text for line in samples]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_reads_alike(dtype: str, kind: str, samples) -> None:
    half = TrOCR.from_pretrained(device="cpu", dtype=dtype, cross_memory=kind)
    lines = list(half.read(SAMPLES))
    equal = sum(a.token_ids == b.token_ids for a, b in zip(lines, samples, strict=True))
    assert equal >= len(samples) * 3 // 4, f"{equal} of {len(samples)} rows as in float32"


def test_generate_returns_what_transformers_returns(tmp_path: Path) -> None:
    model, pixels, _ = lively_reference(Case("A"))
    ours = _open(save(model, tmp_path))
    for arguments in ({}, {"max_length": 2}, {"max_new_tokens": 9}, {"max_length": 5, "max_new_tokens": 12},
                      {"num_beams": 1, "do_sample": False}):  # fmt: skip
        got, expected = ours.generate(pixels, **arguments), model.generate(pixels, **arguments)
        assert got.dtype == expected.dtype and torch.equal(got, expected), arguments
    pad = model.generation_config.pad_token_id
    assert (ours.generate(pixels)[:, -1] == pad).any()  # rows of different lengths were filled up
    assert ours.generate(pixels).shape[1] == 21


def _open(folder: Path) -> TrOCR:
    """A folder without a processor of its own, with the built-in one made to fit."""
    config = json.loads((folder / "config.json").read_text())
    size = config["encoder"]["image_size"]
    size = [size, size] if isinstance(size, int) else size
    settings = json.loads((BUILTIN / "preprocessor_config.json").read_text())
    settings["size"] = {"height": size[0], "width": size[1]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder / name)
    return TrOCR.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 8, 8), r"expected shape \[batch, 3, .*got \[1, 3, 8, 8\]"),
        (torch.zeros(3, 8, 8), r"got \[3, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "expected a floating-point tensor.*uint8"),
        ([[1.0]], "expected a floating-point tensor.*list"),
    ],
)
def test_wrong_pixels_are_named(ocr: TrOCR, pixels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ocr.generate(pixels)


def test_beyond_the_position_table(tmp_path: Path) -> None:
    ours = _open(save(build(Case("A", decoder={"max_position_embeddings": 8}), 1), tmp_path))
    pixels = torch.randn(2, 3, 16, 16)
    assert ours.generate(pixels, max_length=9).shape == (2, 9)  # no end token is set: all rows reach the limit
    with pytest.raises(ValueError, match="at most 8 tokens"):
        ours.generate(pixels, max_length=10)


def test_settings_of_another_search_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_beams": 4}))
    ours = TrOCR.from_pretrained(folder, device="cpu")
    with pytest.warns(UserWarning, match="num_beams"):
        list(ours.read(SAMPLES[:1]))


def test_processor_that_does_not_fit_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN, folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": 64}))
    with pytest.raises(CheckpointError, match=r"64x64.*image_size expects"):
        TrOCR.from_pretrained(folder)


def test_without_resizing_other_sizes_are_error_rows(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN, folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_resize": False}))
    ours = TrOCR.from_pretrained(folder, device="cpu")
    height, width = ours.model.config.encoder.image_size
    fitting, other = np.full((height, width, 3), 255, np.uint8), np.full((height, width + 1, 3), 255, np.uint8)
    lines = list(ours.read([other, fitting]))
    assert "does not resize" in lines[0].error and lines[1].error is None


@pytest.mark.parametrize(
    "options",
    [
        {"device": "tpu"},
        {"device": "cuda:99"},
        {"dtype": "int8"},
        {"dtype": torch.int8},
        {"cross_memory": "both"},
        {"pixels": "raw"},
        {"max_image_mpixels": 0},
        {"max_file_bytes": 0},
        {"formats": ["DOC"]},
    ],
    ids=str,
)
def test_unknown_options(options: dict) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(options))}: "):
        TrOCR.from_pretrained(**options)


def test_unknown_counts(ocr: TrOCR) -> None:
    for options in ({"batch_size": 0}, {"max_new_tokens": 0}, {"num_workers": 0}):
        with pytest.raises(UsageError, match=next(iter(options))):
            ocr.read(SAMPLES, **options)


@pytest.mark.parametrize("one", ["a.png", b"x", Path("a.png"), Image.new("RGB", (4, 4)), np.zeros((4, 4, 3), np.uint8)])
def test_one_picture_is_no_iterable_of_pictures(ocr: TrOCR, one) -> None:
    with pytest.raises(UsageError, match=r"pictures: expected an iterable.*put it in a list"):
        ocr.read(one)


def test_rows_before_a_failing_source_are_read(ocr: TrOCR, samples) -> None:
    def failing():
        yield from SAMPLES[:5]
        raise RuntimeError("the source broke")

    lines = ocr.read(failing(), batch_size=4)
    assert [next(lines).token_ids for _ in range(5)] == [line.token_ids for line in samples[:5]]
    with pytest.raises(RuntimeError, match="the source broke"):
        next(lines)


def test_odd_paths_are_rows(ocr: TrOCR, samples) -> None:
    class BytesPath:
        def __fspath__(self) -> bytes:
            return bytes(SAMPLES[0])

    class BadPath:
        def __fspath__(self) -> str:
            raise RuntimeError("no path today")

    good, bad, after = ocr.read([BytesPath(), BadPath(), SAMPLES[1]])
    assert good.path == str(SAMPLES[0]) and good.token_ids == samples[0].token_ids
    assert bad.path is None and bad.error
    assert after.token_ids == samples[1].token_ids


def test_scores_that_are_no_numbers_are_error_rows(samples) -> None:
    broken = TrOCR.from_pretrained(device="cpu")
    broken.model.decoder.layers[-1].final_norm[1][7] = torch.nan
    lines = list(broken.read(SAMPLES[:2]))
    assert all(line.text is None and "finite" in line.error for line in lines)


def test_position_rule_can_be_chosen_by_call(tmp_path: Path) -> None:
    """A pad token as start makes the two rules of sinusoidal positions differ."""
    model, pixels, _ = lively_reference(Case("B", start=1, use_cache=False))
    ours = _open(save(model, tmp_path))
    rows = {}
    for use_cache in (True, False):
        rows[use_cache] = ours.generate(pixels, use_cache=use_cache)
        assert torch.equal(rows[use_cache], model.generate(pixels, use_cache=use_cache))
    assert not torch.equal(rows[True], rows[False])
    assert torch.equal(ours.generate(pixels), rows[False])  # the checkpoint's own


def test_revision_is_for_hub_ids_alone() -> None:
    for model in (None, BUILTIN):
        with pytest.raises(UsageError, match=r"revision: .*'main'"):
            TrOCR.from_pretrained(model, revision="main")


def test_formats_can_be_narrowed() -> None:
    only_jpeg = TrOCR.from_pretrained(device="cpu", formats=["JPEG"])
    jpeg, png = only_jpeg.read([LINES / "hello.jpg", LINES / "total.png"])
    assert jpeg.error is None and "JPEG" in png.error


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("small-printed", "cpu", "kv"),
        ("base-handwritten", "cpu", "latent"),
        ("large-printed", "cpu", "latent"),
        ("base-handwritten", "cuda", "kv"),
    ],
)
def test_cross_memory_that_measured_faster(name: str, device: str, expected: str) -> None:
    config = CheckpointConfig.from_folder(Path(__file__).parent / "checkpoints" / name)
    assert choose_kind(config.decoder, config.encoder.num_tokens, torch.device(device)) == expected


def test_a_copy_or_what_was_pickled_loads_the_checkpoint_again() -> None:
    ocr = TrOCR.from_pretrained(device="cpu", cross_memory="latent", max_image_mpixels=0.02)
    expected = list(ocr.read(SAMPLES[:6]))
    pickled = pickle.dumps(ocr)
    assert len(pickled) < 2000
    for again in (pickle.loads(pickled), copy.deepcopy(ocr)):
        assert again.model.cross_memory == "latent" and again.model is not ocr.model
        assert list(again.read(SAMPLES[:6])) == expected
    assert {line.error is None for line in expected} == {True, False}
    with pytest.raises(TypeError, match="expected one that `from_pretrained` made"):
        pickle.dumps(TrOCR(ocr.folder, ocr.model, ocr.images, ocr.text))


def test_public_names_are_listed() -> None:
    assert {*trocr_fast.__all__} <= {*dir(trocr_fast)}
    assert all(getattr(trocr_fast, name).__name__ == name for name in trocr_fast.__all__)
