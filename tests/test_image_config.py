"""preprocessor_config.json -> ImageConfig: every spelling, every refusal."""

import json

import numpy as np
import pytest

from tests.pictures import BASE_HANDWRITTEN, LARGE_PRINTED, PUBLISHED, SMALL_PRINTED, write_settings
from trocr_fast.errors import CheckpointError
from trocr_fast.image_config import RESAMPLING, ImageConfig

VIT = {"image_processor_type": "ViTImageProcessor"}
DEIT = {"image_processor_type": "DeiTImageProcessor"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_read(tmp_path, name):
    config = ImageConfig.from_folder(write_settings(tmp_path, PUBLISHED[name]))
    assert config.pixel_size == config.size == (384, 384)
    assert config.resample == (3 if name == "small-printed" else 2)
    assert not config.do_center_crop and not config.do_convert_rgb
    assert config.rescale_factor == 1 / 255
    assert np.allclose(config.table()[:, [0, 255]], [-1, 1])


@pytest.mark.parametrize("suffix", ["FeatureExtractor"] + [f"ImageProcessor{end}" for end in ("", "Fast", "Pil")])
@pytest.mark.parametrize("key", ["image_processor_type", "feature_extractor_type"])
def test_both_families_in_all_spellings_have_their_class_defaults(key, suffix):
    vit, deit = (ImageConfig.from_dict({key: family + suffix}) for family in ("ViT", "DeiT"))
    assert (vit.size, vit.resample, vit.do_center_crop) == ((224, 224), 2, False)
    assert (deit.size, deit.resample, deit.do_center_crop) == ((256, 256), 3, True)
    assert vit.pixel_size == deit.pixel_size == deit.crop_size == (224, 224)


def test_class_defaults_are_those_of_transformers():
    from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    for settings, stock in ((VIT, ViTImageProcessorPil()), (DEIT, DeiTImageProcessorPil())):
        ours = ImageConfig.from_dict(settings)
        assert ours.size == (stock.size.height, stock.size.width)
        assert ours.do_center_crop == bool(stock.do_center_crop)
        if ours.do_center_crop:
            assert ours.crop_size == (stock.crop_size.height, stock.crop_size.width)
        assert ours.do_convert_rgb == bool(stock.do_convert_rgb)
        for name in ("resample", "do_resize", "do_rescale", "rescale_factor", "do_normalize"):
            assert getattr(ours, name) == getattr(stock, name), name
        assert ours.image_mean == tuple(stock.image_mean) and ours.image_std == tuple(stock.image_std)


@pytest.mark.parametrize("size", [[192, 1024], {"height": 192, "width": 1024}])
def test_rectangular_size(size):
    assert ImageConfig.from_dict(VIT | {"size": size}).pixel_size == (192, 1024)


def test_nothing_fixes_the_size_without_resize_and_crop():
    assert ImageConfig.from_dict(VIT | {"do_resize": False}).pixel_size is None


def test_a_field_that_is_switched_off_is_not_read():
    off = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
    stale = {
        "size": {"shortest_edge": 1},
        "crop_size": -1,
        "resample": 9,
        "rescale_factor": 0,
        "image_std": [0],
    }
    assert np.array_equal(ImageConfig.from_dict(VIT | off | stale).table(), np.tile(np.arange(256), (3, 1)))


def test_places_and_their_order(tmp_path):
    """The newest spelling wins, as in transformers; the subfolder is the last resort."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    names = ["processor/preprocessor_config.json", "preprocessor_config.json", "processor_config.json"]
    for size, name in enumerate(names, start=32):
        settings = VIT | {"size": size}
        nested = name == "processor_config.json"
        write_settings(tmp_path, {"image_processor": settings} if nested else settings, name)
        assert ImageConfig.from_folder(tmp_path).pixel_size == (size, size)
        if "/" not in name:
            assert ViTImageProcessorPil.from_pretrained(tmp_path).size.height == size
    # Written without its nested part, as by transformers 4, it says nothing about pictures.
    write_settings(tmp_path, {"processor_class": "TrOCRProcessor"}, "processor_config.json")
    assert ImageConfig.from_folder(tmp_path).pixel_size == (33, 33)


def test_no_settings_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json.*found neither"):
        ImageConfig.from_folder(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 100_000, b"7"])
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_a_file_that_is_no_json_object(tmp_path, name, text):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=name):
        ImageConfig.from_folder(tmp_path)


def test_nested_settings_that_are_no_object(tmp_path):
    write_settings(tmp_path, {"image_processor": [1]}, "processor_config.json")
    with pytest.raises(CheckpointError, match="image_processor"):
        ImageConfig.from_folder(tmp_path)


BAD_VALUES = [
    ("image_processor_type", "BitImageProcessor"),
    ("image_processor_type", "TrOCRProcessor"),
    ("image_processor_type", 3),
    ("size", 0),
    ("size", -384),
    ("size", 384.0),
    ("size", "384"),
    ("size", True),
    ("size", 10**6),
    ("size", [384]),
    ("size", [384, 384, 3]),
    ("size", [384, -1]),
    ("size", [384, 1.5]),
    ("size", {"shortest_edge": 384}),
    ("size", {"longest_edge": 384}),
    ("size", {"max_height": 384, "max_width": 384}),
    ("size", {"height": 384}),
    ("size", {"height": 384, "width": 384, "longest_edge": 1}),
    ("size", {"height": 384, "width": None}),
    ("crop_size", {"shortest_edge": 224}),
    ("crop_size", 0),
    ("resample", 6),
    ("resample", -1),
    ("resample", 2.0),
    ("resample", "bicubic"),
    ("resample", True),
    ("do_resize", 1),
    ("do_resize", "true"),
    ("do_center_crop", "no"),
    ("do_rescale", 0),
    ("do_normalize", []),
    ("do_convert_rgb", "RGB"),
    ("do_pad", True),
    ("do_pad", "no"),
    ("rescale_factor", 0),
    ("rescale_factor", -1 / 255),
    ("rescale_factor", "1/255"),
    ("rescale_factor", float("nan")),
    ("rescale_factor", float("inf")),
    ("rescale_factor", 10**400),
    ("rescale_factor", True),
    ("image_mean", [0.5, 0.5]),
    ("image_mean", [0.5] * 4),
    ("image_mean", []),
    ("image_mean", [0.5, 0.5, "0.5"]),
    ("image_mean", float("nan")),
    ("image_mean", {"r": 1}),
    ("image_std", 0),
    ("image_std", [0.5, 0.0, 0.5]),
    ("image_std", -0.5),
    ("image_std", [0.5, 0.5, None]),
    ("image_std", float("nan")),
    ("image_std", 1e-60),  # zero in float32
    ("auto_map", {"AutoImageProcessor": "code.Processor"}),
    ("input_data_format", "channels_last"),
]


@pytest.mark.parametrize(("field", "value"), BAD_VALUES, ids=lambda value: repr(value)[:40])
def test_bad_values_are_refused_by_name(tmp_path, field, value):
    write_settings(tmp_path, DEIT | {field: value})
    with pytest.raises(CheckpointError) as caught:
        ImageConfig.from_folder(tmp_path)
    message = str(caught.value)
    assert "preprocessor_config.json" in message and f"'{field}'" in message
    assert "expected" in message and "found" in message


def test_no_class_name_is_refused():
    with pytest.raises(CheckpointError, match=r"image_processor_type.*found None"):
        ImageConfig.from_dict({"size": 384})


def test_a_crop_needs_its_size_where_the_class_has_none():
    with pytest.raises(CheckpointError, match=r"'crop_size': expected .*, found None"):
        ImageConfig.from_dict(VIT | {"do_center_crop": True})


def test_a_square_side_that_means_the_shortest_edge_is_refused():
    with pytest.raises(CheckpointError, match="default_to_square"):
        ImageConfig.from_dict(VIT | {"size": 384, "default_to_square": False})


def test_null_means_the_class_default():
    nulls = dict.fromkeys([*BASE_HANDWRITTEN, "crop_size", "do_pad", "do_center_crop", "auto_map"])
    assert ImageConfig.from_dict(nulls | DEIT) == ImageConfig.from_dict(DEIT)


def test_unknown_fields_are_ignored():
    extra = {"do_reduce_labels": True, "data_format": "channels_first", "something": 1}
    assert ImageConfig.from_dict(LARGE_PRINTED | extra) == ImageConfig.from_dict(LARGE_PRINTED)


def test_single_numbers_stand_for_all_channels():
    one = ImageConfig.from_dict(SMALL_PRINTED | {"image_mean": 0.4, "image_std": 1})
    assert one.image_mean == (0.4, 0.4, 0.4) and one.image_std == (1.0, 1.0, 1.0)


def test_filters_are_pillows():
    from PIL import Image

    assert all(Image.Resampling(number).name.lower() == name for number, name in RESAMPLING.items())


def test_settings_survive_json():
    assert ImageConfig.from_dict(json.loads(json.dumps(BASE_HANDWRITTEN))).rescale_factor == 1 / 255
