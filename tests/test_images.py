"""Any picture -> pixels: the stock ones bit for bit for RGB, documented rules and refusals for the rest."""

import errno
import io
import itertools
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageOps

from tests.pictures import BASE_HANDWRITTEN, PUBLISHED, encode, noise, png_claiming, stock
from trocr_fast.errors import PictureError
from trocr_fast.images import DEFAULT_FORMATS, ImageConfig, ImageProcessor

VIT = {"image_processor_type": "ViTImageProcessor"}
SMALL = VIT | {"size": {"height": 8, "width": 12}}  # a small output keeps tests of the input fast
SIZES = [(1, 1), (1, 57), (57, 1), (2, 3), (31, 257), (60, 1000), (384, 384), (385, 383)]  # (height, width)


def processor(config: dict, **options) -> ImageProcessor:
    return ImageProcessor(ImageConfig.from_dict(config), **options)


def pixel_values(config: dict, picture, **options) -> torch.Tensor:
    ours = processor(config, **options)
    return ours.normalise(ours.load(picture)[None])


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)


def refusal(picture, config: dict = SMALL, **options) -> str:
    with pytest.raises(PictureError) as caught:
        processor(config, **options).load(picture)
    message = str(caught.value)
    assert message.startswith("expected ") and "got " in message
    return message


# ---- RGB: transformers' own pixels, bit for bit


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_give_the_stock_pixels(name, size):
    image = noise(*size)
    assert same(pixel_values(PUBLISHED[name], image), stock(PUBLISHED[name], image))


def test_every_kind_of_picture_gives_the_stock_pixels(tmp_path):
    image = noise(23, 71)
    (tmp_path / "a.png").write_bytes(encode(image, "PNG"))
    array = np.asarray(image)
    expected = stock(BASE_HANDWRITTEN, image)
    chw = array.transpose(2, 0, 1)
    files = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        encode(image, "PNG"),
        bytearray(encode(image, "BMP")),
    ]
    arrays = [array, chw, chw.copy(), np.asfortranarray(array), array.astype(np.int64)]
    for picture in [image, *files, *arrays]:
        for pixels in ("sane", "stock"):
            assert same(pixel_values(BASE_HANDWRITTEN, picture, pixels=pixels), expected)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "TIFF", "GIF", "JPEG2000", "PPM"])
def test_a_file_gives_the_pixels_that_pillow_decodes(format):
    data = encode(noise(600, 901), format)  # large: a JPEG in draft mode would come out smaller
    image = Image.open(io.BytesIO(data)).convert("RGB")
    assert same(pixel_values(SMALL, data), stock(SMALL, image))


@pytest.mark.parametrize("steps", list(itertools.product([True, False], repeat=2)), ids=str)
@pytest.mark.parametrize("stats", [(0.5, 0.5), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), (0, [1, 2, 3])])
@pytest.mark.parametrize("factor", [1 / 255, 0.00392156862745098, 1 / 127.5, 0.1, 1, 7.3e-5], ids=str)
def test_the_table_is_exact_for_every_value(steps, stats, factor):
    config = VIT | {"do_resize": False, "do_rescale": steps[0], "do_normalize": steps[1]}
    config |= {"rescale_factor": factor, "image_mean": stats[0], "image_std": stats[1]}
    every_value = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    theirs = stock(config, every_value)
    if steps == (False, False):
        assert theirs.dtype == torch.uint8  # transformers leaves it so; the encoder takes floats
        theirs = theirs.float()
    assert same(pixel_values(config, every_value), theirs)


SIDES = st.integers(1, 40)
CONFIGS = st.fixed_dictionaries(
    {
        "image_processor_type": st.sampled_from(["ViTImageProcessor", "DeiTImageProcessor"]),
        "size": st.one_of(SIDES, st.lists(SIDES, min_size=2, max_size=2)),
        "crop_size": st.fixed_dictionaries({"height": SIDES, "width": SIDES}),
        "resample": st.integers(0, 5),
        "do_resize": st.booleans(),
        "do_center_crop": st.booleans(),
        "do_rescale": st.booleans(),
        "rescale_factor": st.floats(1e-4, 2),
        "image_mean": st.one_of(st.floats(-2, 2), st.lists(st.floats(-2, 2), min_size=3, max_size=3)),
        "image_std": st.one_of(st.floats(0.01, 2), st.lists(st.floats(0.01, 2), min_size=3, max_size=3)),
        "do_convert_rgb": st.sampled_from([None, True, False]),
    }
)


@settings(max_examples=150, deadline=None)
@given(CONFIGS, SIDES, SIDES, st.sampled_from(["sane", "stock"]))
def test_any_settings_give_the_stock_pixels(config, height, width, pixels):
    image = noise(height, width, seed=height * 41 + width)
    ours = processor(config, pixels=pixels)
    loaded = ours.load(image)
    assert loaded.dtype == np.uint8 and loaded.flags.c_contiguous and loaded.flags.writeable
    assert ours.config.pixel_size in (None, loaded.shape[1:])
    assert same(ours.normalise(loaded[None]), stock(config, image))


@pytest.mark.parametrize("crop", [(3, 5), (8, 12), (7, 11), (9, 13), (4, 40), (40, 4), (21, 34)], ids=str)
def test_center_crop_pads_like_stock(crop):
    config = SMALL | {"do_center_crop": True, "crop_size": list(crop)}
    assert same(pixel_values(config, noise(9, 9)), stock(config, noise(9, 9)))


@pytest.mark.parametrize("resample", range(6))
def test_grey_is_rgb_with_equal_channels(resample):
    grey = noise(33, 77).convert("L")
    config = SMALL | {"resample": resample}
    assert same(pixel_values(config, grey), stock(config, grey.convert("RGB")))
    assert same(pixel_values(config, np.asarray(grey)), stock(config, grey.convert("RGB")))
    assert same(pixel_values(config, np.asarray(grey)[:, :, None]), stock(config, grey.convert("RGB")))


# ---- the sane rules


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"])
def test_other_modes_are_converted(mode):
    source = noise(20, 30)
    if mode == "LAB":  # Pillow has no conversion from RGB but by a profile
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(source, *profiles, outputMode="LAB")
    else:
        image = source.convert(mode)
    assert image.mode == mode
    assert same(pixel_values(SMALL, image), stock(SMALL, image.convert("RGB")))


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(rgb * share + 255 * (1 - share)).astype(np.uint8)


def unscaled(picture, **options) -> np.ndarray:
    """uint8 [H, W, 3] of the picture's own size."""
    return processor(VIT | {"do_resize": False}, **options).load(picture).transpose(1, 2, 0)


def test_alpha_is_composited_on_white():
    rgb, alpha = np.asarray(noise(40, 50)), np.asarray(noise(40, 50, seed=1))[..., 0].copy()
    alpha[:10], alpha[10:20] = 255, 0
    rgba = np.dstack([rgb, alpha])
    expected = on_white(rgb, alpha)
    for picture in (Image.fromarray(rgba), rgba, encode(Image.fromarray(rgba), "PNG")):
        found = unscaled(picture)
        assert np.array_equal(found[:10], rgb[:10]), "opaque pixels keep their value"
        assert (found[10:20] == 255).all(), "transparent pixels are white, whatever colour they hide"
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_grey_with_alpha_is_composited_on_white():
    grey = Image.fromarray(np.array([[0, 0, 200]], np.uint8))
    grey.putalpha(Image.fromarray(np.array([[255, 0, 255]], np.uint8)))
    assert grey.mode == "LA"
    rgba = grey.convert("RGBA")
    for picture in (grey, grey.convert("La"), rgba, rgba.convert("RGBa"), rgba.convert("PA")):
        assert unscaled(picture)[0].tolist() == [[0] * 3, [255] * 3, [200] * 3], picture.mode


def test_colours_that_a_file_marks_transparent_are_white():
    grey = Image.fromarray(np.array([[0, 7, 200]], np.uint8))
    rgb, palette = grey.convert("RGB"), grey.convert("P")
    files = {
        "L": encode(grey, "PNG", transparency=7),
        "RGB": encode(rgb, "PNG", transparency=(7, 7, 7)),
        "P": encode(palette, "PNG", transparency=int(np.asarray(palette)[0, 1])),
        "GIF": encode(palette, "GIF", transparency=int(np.asarray(palette)[0, 1])),
    }
    for name, data in files.items():
        assert unscaled(data)[0].tolist() == [[0] * 3, [255] * 3, [200] * 3], name
    opacity = bytes(0 if index == np.asarray(palette)[0, 1] else 255 for index in range(256))
    assert unscaled(encode(palette, "PNG", transparency=opacity))[0, 1].tolist() == [255] * 3
    deep = Image.fromarray(np.array([[0, 1799, 51400]], np.uint16))
    marked = encode(deep, "PNG", transparency=1799)
    assert unscaled(marked)[0, :, 0].tolist() == [0, 255, 200]


DEEP = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
DEEP_AS_8_BIT = [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N", "I", "F"])
def test_16_bit_modes_are_scaled_to_8_bit(mode):
    if mode in ("I", "F"):
        image = Image.fromarray(DEEP.astype(np.int32 if mode == "I" else np.float32))
    else:
        order = ">u2" if mode == "I;16B" or (mode == "I;16N" and sys.byteorder == "big") else "<u2"
        image = Image.frombytes(mode, (6, 1), DEEP.astype(order).tobytes())
    assert image.mode == mode
    found = unscaled(image)[0]
    assert found[:, 0].tolist() == DEEP_AS_8_BIT
    assert (found == found[:, :1]).all()


def test_16_bit_files_are_scaled_to_8_bit():
    image = Image.fromarray(DEEP)
    for format in ("PNG", "TIFF"):
        assert unscaled(encode(image, format))[0, :, 0].tolist() == DEEP_AS_8_BIT


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint64", "float32", "float64", ">u2"])
def test_deep_arrays_are_scaled_to_8_bit(dtype):
    assert unscaled(DEEP.astype(dtype))[0, :, 0].tolist() == DEEP_AS_8_BIT
    assert unscaled(np.dstack([DEEP.astype(dtype)] * 3))[0, :, 1].tolist() == DEEP_AS_8_BIT


def test_arrays_of_small_values():
    assert unscaled(np.array([[0, 7, 255]], np.uint16))[0, :, 0].tolist() == [0, 7, 255]
    assert unscaled(np.array([[0, 0.5, 1]]))[0, :, 0].tolist() == [0, 128, 255]
    assert unscaled(np.array([[0, 0.5, 255]], np.float16))[0, :, 0].tolist() == [0, 0, 255]
    assert unscaled(np.array([[False, True]]))[0, :, 0].tolist() == [0, 255]
    assert unscaled(Image.fromarray(np.array([[False, True]])))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("value", [-1, 65536, float("nan"), float("inf"), -0.1], ids=str)
def test_values_that_no_rule_covers_are_refused(value):
    assert "65535" in refusal(np.array([[0, value]]))
    if value == value // 1:
        refusal(Image.fromarray(np.array([[0, value]], np.int32)))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_exif_orientation_is_applied(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(noise(5, 9), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((5, 9) if orientation in (5, 6, 7, 8) else (9, 5))
    assert np.array_equal(unscaled(data), np.asarray(upright))
    if format != "TIFF":  # which Pillow turns by itself on loading
        assert unscaled(data, pixels="stock").shape == (5, 9, 3)


def test_a_damaged_exif_block_counts_as_none():
    for block in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(range(90)), b"nonsense"):
        image = noise(5, 9)
        assert np.array_equal(unscaled(encode(image, "PNG", exif=block)), np.asarray(image))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_is_read(format):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (unscaled(data) == (255, 0, 0)).all()


# ---- pixels="stock": what transformers does, or a refusal where it refuses


def stock_or_none(config: dict, picture) -> torch.Tensor | None:
    """None where transformers raises, or where the model would not take what it gives."""
    try:
        values = stock(config, picture)
    except ValueError:
        return None
    return values if values.shape[1] == 3 else None


@pytest.mark.parametrize("convert", [None, True])
@pytest.mark.parametrize("stats", [0.5, [0.5, 0.4, 0.3]], ids=str)
@pytest.mark.parametrize(
    "mode",
    [
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "HSV",
        "I",
        "I;16",
        "F",
    ],
)
@pytest.mark.parametrize("height", [1, 3, 20])
def test_stock_pixels_follow_transformers_for_every_mode(mode, stats, convert, height):
    source = noise(height, 30)
    steps = {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa"), "I;16": ("I", "I;16"), "PA": ("RGBA", "PA")}
    image = source
    for step in steps.get(mode, (mode,)):
        image = image.convert(step)
    config = SMALL | {"image_mean": stats, "do_convert_rgb": convert}
    expected = stock_or_none(config, image)
    if expected is None:
        assert mode in refusal(image, config, pixels="stock")
    else:
        assert same(pixel_values(config, image, pixels="stock"), expected)
    assert (expected is not None) or not (mode == "RGB" or (convert and mode in ("L", "RGBA", "P")))


ARRAYS = st.tuples(
    st.lists(st.sampled_from([1, 2, 3, 4, 7, 20]), min_size=2, max_size=3),
    st.sampled_from([np.uint8, np.bool_, np.int16, np.uint16, np.float32, np.float64]),
    st.sampled_from([1, 2, 255, 256, 300, -3]),
)


@settings(max_examples=300, deadline=None)
@given(ARRAYS, st.booleans(), st.booleans())
def test_stock_pixels_follow_transformers_for_arrays(array, do_resize, fraction):
    shape, dtype, top = array
    values = np.random.default_rng(0).integers(min(top, 0), max(top, 1), shape).astype(dtype)
    if fraction and values.dtype.kind == "f":
        values = values / 300
    config = SMALL | {"do_resize": do_resize}
    expected = stock_or_none(config, values)
    try:
        found = pixel_values(config, values, pixels="stock")
    except PictureError:
        # Refused beyond transformers' own refusals: only what uint8 pixels can't stand for.
        out_of_range = (values < 0).any() or (values > 255).any()
        assert expected is None or values.dtype.kind == "f" or (not do_resize and out_of_range)
        return
    assert expected is not None and torch.equal(found, expected.float())


def test_a_rule_of_one_mode_does_not_reach_the_other():
    rgba = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (unscaled(rgba) == 255).all()
    assert "RGBA" in refusal(rgba, pixels="stock")
    assert "mode L" in refusal(Image.new("L", (4, 4)), pixels="stock")
    black = processor(SMALL | {"do_convert_rgb": True}, pixels="stock").load(rgba)
    assert (black == 0).all(), "Pillow's convert drops the alpha, and stock means just that"


# ---- bad pictures


@pytest.mark.parametrize("pixels", ["sane", "stock"])
@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000"])
def test_a_truncated_file_is_refused(format, tenth, pixels):
    data = encode(noise(40, 200), format)
    refusal(data[: len(data) * tenth // 10], pixels=pixels)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about the EXIF data of damaged TIFF files
@settings(max_examples=150, deadline=None)
@given(st.binary(min_size=1, max_size=200), st.sampled_from([encode(noise(4, 4), f) for f in DEFAULT_FORMATS]))
def test_random_bytes_are_refused_or_read(junk, file):
    """Junk alone, and junk in the middle of a file: never anything but pixels or a PictureError."""
    ours = processor(SMALL)
    for data in (junk, file[:12] + junk, file[: len(file) // 2] + junk + file[len(file) // 2 :]):
        try:
            assert ours.load(data).shape == (3, 8, 12)
        except PictureError as error:
            assert "got" in str(error)


def test_empty_and_foreign_bytes():
    assert "0 bytes" in refusal(b"")
    assert "4 other bytes" in refusal(b"text")


def test_a_wrong_extension_does_not_matter(tmp_path):
    image = noise(9, 9)
    (tmp_path / "a.jpg").write_bytes(encode(image, "PNG"))
    (tmp_path / "b.txt").write_bytes(encode(image, "PNG"))
    for name in ("a.jpg", "b.txt"):
        assert same(pixel_values(SMALL, tmp_path / name), stock(SMALL, image))


@pytest.mark.parametrize("size", [(1, 1), (1, 70_000), (70_000, 1), (10, 60_000)], ids=str)
def test_extreme_sizes_are_read(size):
    assert processor(SMALL).load(encode(Image.new("RGB", size), "PNG")).shape == (3, 8, 12)


# Pillow opens no 900 million pixels and warns at 100 million; 56 million are above our own limit alone.
@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (30_000, 30_000), (10_000, 10_000), (8_000, 7_000)])
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_bombs_are_refused_by_their_header(size, action):
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        begin = time.monotonic()
        assert "million pixels" in refusal(png_claiming(*size))
        assert time.monotonic() - begin < 5  # decoding would take longer, and gigabytes


def test_limits_are_options():
    image = noise(10, 10)
    data = encode(image, "PNG")
    assert "got 10 x 10 pixels" in refusal(data, max_image_mpixels=99e-6)
    assert "got 10 x 10 pixels" in refusal(image, max_image_mpixels=99e-6)
    assert "got 10 x 10 pixels" in refusal(np.asarray(image), max_image_mpixels=99e-6)
    assert processor(SMALL, max_image_mpixels=100e-6).load(data).shape == (3, 8, 12)
    assert f"at most {len(data) - 1} bytes" in refusal(data, max_file_bytes=len(data) - 1)
    assert processor(SMALL, max_file_bytes=len(data)).load(data).shape == (3, 8, 12)


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(10**12)  # sparse
    assert "at most 1000 bytes, got 1000000000000" in refusal(tmp_path / "a.png", max_file_bytes=1000)


def test_formats_outside_the_list_are_not_opened(monkeypatch):
    def ghostscript(*_, **__):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    eps, icon = encode(noise(9, 9), "EPS"), encode(noise(16, 16), "ICO")
    assert f"{len(eps)} other bytes" in refusal(eps)
    refusal(icon)
    assert processor(SMALL, formats=["ICO"]).load(icon).shape == (3, 8, 12)
    refusal(encode(noise(9, 9), "PNG"), formats=["JPEG"])


@pytest.mark.parametrize(
    "options",
    [
        {"pixels": "fancy"},
        {"max_image_mpixels": 0},
        {"max_image_mpixels": float("nan")},
        {"max_image_mpixels": 1000},  # Pillow would refuse first
        {"max_file_bytes": 0},
        {"formats": []},
        {"formats": "PNG"},
        {"formats": ["PNG", "HEIC?"]},
    ],
    ids=str,
)
def test_impossible_options_raise_at_once(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected .*got "):
        processor(SMALL, **options)


@pytest.mark.parametrize(
    "picture",
    [
        None,
        7,
        [1, 2],
        np.zeros((0, 5), np.uint8),
        np.zeros((5, 0, 3), np.uint8),
        np.zeros((5,), np.uint8),
        np.zeros((5, 5, 2), np.uint8),
        np.zeros((2, 5, 5), np.uint8),
        np.zeros((1, 3, 5, 5), np.uint8),
        np.zeros((5, 5), complex),
        np.full((5, 5), "a"),
        np.full((5, 5), None),
        Image.new("RGB", (0, 5)),
    ],
    ids=lambda picture: f"{type(picture).__name__}{getattr(picture, 'shape', '')}",
)
@pytest.mark.parametrize("pixels", ["sane", "stock"])
def test_objects_that_are_no_picture(picture, pixels):
    refusal(picture, pixels=pixels)


def test_running_out_of_memory_is_an_error_of_the_picture(monkeypatch):
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    assert "memory" in refusal(noise(5, 5))


# ---- paths


def test_special_files_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling.png")
    os.symlink(tmp_path / "self.png", tmp_path / "self.png")
    expected = {
        tmp_path: "got a folder",
        tmp_path / "pipe.png": "got a named pipe",
        tmp_path / "dangling.png": "there is none",
        tmp_path / "self.png": "ELOOP",
        tmp_path / "missing.png": "there is none",
        tmp_path / ("x" * 300): "ENAMETOOLONG",
        Path("/dev/zero"): "got a device",
        "": "there is none",
        "a\0b.png": "no path can hold",
        "\ud800.png": "no path can hold",
    }
    found = {}
    read_all = lambda: found.update({path: refusal(path) for path in expected})  # noqa: E731
    thread = threading.Thread(target=read_all, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "reading one of them never ends"
    for path, reason in expected.items():
        assert reason in found[path]
        assert str(tmp_path) not in found[path], "a client must not learn the server's paths"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(noise(5, 5), "PNG"))
    (tmp_path / "a.png").chmod(0)
    assert "may not be read" in refusal(tmp_path / "a.png")


SYSTEM_ERRORS = [
    (errno.EACCES, "may not be read"),
    (errno.EIO, "EIO"),
    (errno.EMFILE, "EMFILE"),
    (9999, "unnamed"),
]


@pytest.mark.parametrize(("number", "reason"), SYSTEM_ERRORS)
def test_errors_of_the_system(monkeypatch, tmp_path, number, reason):
    def fail(*_):
        raise OSError(number, "text of another library")

    monkeypatch.setattr(os, "open", fail)
    message = refusal(tmp_path / "a.png")
    assert reason in message and "another library" not in message


def test_strange_names(tmp_path):
    image = noise(5, 5)
    for name in (b"\xc3\xa4\xe2\x82\xac.png", b"two\nlines.png", b"\xff\xfe.png", b" .png", b"-"):
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as file:
            file.write(encode(image, "PNG"))
        assert same(pixel_values(SMALL, os.fsdecode(path)), stock(SMALL, image))


# ---- many pictures


def test_many_pictures_keep_their_order_and_their_neighbours(tmp_path):
    images = [noise(5, 5 + index) for index in range(40)]
    files = []
    for index, image in enumerate(images):
        files.append(tmp_path / f"{index}.png")
        files[-1].write_bytes(encode(image, "PNG"))
    listed = sorted(tmp_path.iterdir(), key=lambda path: int(path.stem))
    assert listed == files
    files[7].unlink()  # deleted between listing and reading
    files[20].write_bytes(b"")
    ours = processor(SMALL)
    alone = [ours.load(image) for image in images]
    found = list(ours.load_many(files, num_workers=3))
    assert len(found) == 40
    for index, result in enumerate(found):
        if index in (7, 20):
            assert isinstance(result, PictureError)
            assert result.__traceback__ is result.__cause__ is result.__context__ is None
        else:
            assert np.array_equal(result, alone[index])


def test_an_endless_stream_is_read_in_bounded_steps():
    taken = itertools.count()
    image = noise(5, 5)
    stream = processor(SMALL).load_many((image for _ in taken), num_workers=2)
    before = threading.active_count()
    for results in range(1, 31):
        assert isinstance(next(stream), np.ndarray)
        looks = results - 1  # each look at the counter takes one itself
        assert next(taken) - looks <= results + 4
    stream.close()
    assert threading.active_count() <= before, "its threads have ended"


def test_closing_early_drops_what_has_not_begun(monkeypatch):
    ours = processor(SMALL)
    seen = []
    release = threading.Event()

    def slow(picture):
        seen.append(picture)
        assert picture == 0 or release.wait(20)
        return picture

    monkeypatch.setattr(ours, "load", slow)
    stream = ours.load_many(range(100), num_workers=2)
    assert next(stream) == 0  # 1, 2 and 3 are waiting, and two workers may have begun
    threading.Timer(0.3, release.set).start()
    stream.close()
    assert release.is_set(), "closing waits for what has begun"
    assert not set(seen) - {0, 1, 2}


def test_the_streams_own_errors_are_raised():
    def broken():
        yield noise(5, 5)
        raise RuntimeError("the list broke")

    stream = processor(SMALL).load_many(broken(), num_workers=4)
    with pytest.raises(RuntimeError, match="the list broke"):
        list(stream)


def test_workers_must_be_positive():
    with pytest.raises(ValueError, match="num_workers"):
        processor(SMALL).load_many([], num_workers=0)
    assert list(processor(SMALL).load_many([])) == []


# ---- the rest


def test_inputs_are_not_changed():
    array = np.asarray(noise(6, 6)).copy()
    image, before = Image.fromarray(array), array.copy()
    ours = processor(VIT | {"do_resize": False})
    for picture in (array, image):
        ours.load(picture)[:] = 0  # the caller's own
    assert np.array_equal(array, before) and np.array_equal(np.asarray(image), before)
    rgba = Image.new("RGBA", (3, 3))
    ours.load(rgba)
    assert rgba.mode == "RGBA" and rgba.getpixel((0, 0)) == (0, 0, 0, 0)


def test_normalise_checks_its_input():
    ours = processor(SMALL)
    batch = np.stack([ours.load(noise(5, 5, seed)) for seed in range(3)])
    assert torch.equal(ours.normalise(batch), ours.normalise(torch.from_numpy(batch)))
    assert torch.equal(ours.normalise(batch)[1:2], ours.normalise(batch[1:2]))
    strided = torch.from_numpy(batch).flip(0)[:, :, ::2]
    assert torch.equal(ours.normalise(strided), ours.normalise(batch).flip(0)[:, :, ::2])
    assert ours.normalise(batch[:0]).shape == (0, 3, 8, 12)
    for wrong in (batch[0], batch[:, :2], batch.astype(np.float32)):
        with pytest.raises(ValueError, match="expected uint8"):
            ours.normalise(wrong)


def test_reading_imports_neither_transformers_nor_torch():
    code = """
import sys
from PIL import Image
from trocr_fast.images import ImageConfig, ImageProcessor
ImageProcessor(ImageConfig()).load(Image.new("RGBA", (9, 9)))
print([name for name in ("torch", "transformers", "torchvision") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_one_lazily_opened_image_in_many_hands() -> None:
    """Pillow reads an opened file at its first use; two threads that do so at once break each other's reading."""
    data = io.BytesIO()
    Image.effect_noise((900, 90), 80).convert("RGB").save(data, "PNG")
    reader = processor(SMALL)
    expected = reader.load(data.getvalue())
    for _ in range(20):
        image = Image.open(io.BytesIO(data.getvalue()))
        for got in reader.load_many([image] * 4, num_workers=4):
            assert isinstance(got, np.ndarray), got
            np.testing.assert_array_equal(got, expected)


def test_pictures_before_a_failing_source_are_given() -> None:
    def failing():
        yield from [b"", b""]
        raise RuntimeError("the source broke")

    given = processor(SMALL).load_many(failing(), num_workers=4)
    assert [type(next(given)), type(next(given))] == [PictureError, PictureError]
    with pytest.raises(RuntimeError, match="the source broke"):
        next(given)
