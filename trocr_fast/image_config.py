"""A checkpoint's picture settings: preprocessor_config.json in all its historic spellings -> `ImageConfig`.

Defaults of missing fields and the meaning of each are those of transformers 5.17's `ViTImageProcessorPil` and
`DeiTImageProcessorPil`. A field that its `do_` flag switches off is not read: published files leave stale
values there. Unknown fields are ignored, as transformers ignores them; fields that would change pixels and
are not supported are refused by name.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trocr_fast.errors import CheckpointError
from trocr_fast.json_fields import Fields, read_json

# Pillow's numbers for its filters.
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

# The largest published input is 192 x 1024; a side beyond this is a damaged or hostile file.
MAX_SIDE = 16384

# Class defaults that differ between the two families; they share all others (the fields' defaults below).
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": {"size": (224, 224), "resample": 2, "do_center_crop": False, "crop_size": None},
    "DeiT": {"size": (256, 256), "resample": 3, "do_center_crop": True, "crop_size": (224, 224)},
}

_CLASS_NAMES = {
    family + suffix: family
    for family in _CLASS_DEFAULTS
    for suffix in ("FeatureExtractor", "ImageProcessor", "ImageProcessorFast", "ImageProcessorPil")
}

# Where the settings lie, in transformers' order: the newest spelling wins where a folder holds both.
_NESTED = ("processor_config.json", "image_processor")
_PLAIN = "preprocessor_config.json"


@dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes `pixel_values`. Made by `from_folder` or `from_dict`, which check every value."""

    size: tuple[int, int] = (384, 384)  # (height, width) after resizing; the aspect ratio is not kept
    resample: int = 2  # a key of RESAMPLING
    do_resize: bool = True
    do_center_crop: bool = False
    crop_size: tuple[int, int] | None = None  # (height, width); smaller pictures are padded with zeros
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    do_convert_rgb: bool = False  # only `pixels="stock"` looks at it

    @property
    def pixel_size(self) -> tuple[int, int] | None:
        """(height, width) of the final pixels; None if each picture keeps its own size."""
        if self.do_center_crop:
            return self.crop_size
        return self.size if self.do_resize else None

    def table(self) -> np.ndarray:
        """The final value of each uint8 value in each channel: float32 [3, 256].

        The same steps in the same dtypes as transformers' `rescale` (float64, then rounded to float32) and
        `normalize` (float32), so that a look-up gives its result bit for bit. With neither step the values
        are 0 to 255 (transformers then returns uint8 itself).
        """
        values = np.tile(np.arange(256, dtype=np.float32), (3, 1))  # [3, 256]
        with np.errstate(all="ignore"):  # overflow shows as inf, which from_dict refuses
            if self.do_rescale:
                values = (values.astype(np.float64) * self.rescale_factor).astype(np.float32)
            if self.do_normalize:
                mean = np.array(self.image_mean, dtype=np.float32)  # [3]
                std = np.array(self.image_std, dtype=np.float32)  # [3]
                values = (values - mean[:, None]) / std[:, None]
        return values

    @classmethod
    def from_folder(cls, folder: Path) -> "ImageConfig":
        """Read the settings of a checkpoint folder.

        `processor_config.json` with an `image_processor` object wins over `preprocessor_config.json`, as in
        transformers 5; where the folder has neither, its subfolder `processor` is looked at in the same way.

        Raises:
            CheckpointError: no such file, not JSON, or a field that is wrong or not supported.
        """
        for place in (Path(folder), Path(folder) / "processor"):
            nested = place / _NESTED[0]
            if nested.is_file():
                values = read_json(nested).get(_NESTED[1])
                if values is not None:
                    return cls.from_dict(values, f"{nested}: '{_NESTED[1]}'")
            if (place / _PLAIN).is_file():
                return cls.from_dict(read_json(place / _PLAIN), str(place / _PLAIN))
        raise CheckpointError(
            f"{folder}: expected {_PLAIN}, or {_NESTED[0]} with an '{_NESTED[1]}' object, here or in the "
            "subfolder processor, found neither"
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = _PLAIN) -> "ImageConfig":
        """Check the fields of one JSON object; `where` names its file in errors.

        Raises:
            CheckpointError: a field has a wrong type or value, or asks for something not supported.
        """
        if not isinstance(values, dict):
            raise CheckpointError(f"{where}: expected a JSON object, found {type(values).__name__}")
        fields = _Fields(values, where)
        defaults = _CLASS_DEFAULTS[fields.family()]
        fields.refuse_unsupported()
        kept: dict[str, Any] = {
            "do_resize": fields.flag("do_resize", True),
            "do_center_crop": fields.flag("do_center_crop", defaults["do_center_crop"]),
            "do_rescale": fields.flag("do_rescale", True),
            "do_normalize": fields.flag("do_normalize", True),
            "do_convert_rgb": fields.flag("do_convert_rgb", False),
        }
        if kept["do_resize"]:
            kept["size"] = fields.size("size", defaults["size"])
            kept["resample"] = fields.resample(defaults["resample"])
        if kept["do_center_crop"]:
            kept["crop_size"] = fields.size("crop_size", defaults["crop_size"])
        if kept["do_rescale"]:
            factor = fields.get("rescale_factor", 1 / 255)
            kept["rescale_factor"] = fields.number("rescale_factor", factor, above=0.0)
        if kept["do_normalize"]:
            kept["image_mean"] = fields.per_channel("image_mean", above=-math.inf)
            kept["image_std"] = fields.per_channel("image_std", above=0.0)
        config = cls(**kept)
        if not np.isfinite(config.table()).all():
            found = {name: fields.get(name) for name in ("rescale_factor", "image_mean", "image_std")}
            raise fields.error("image_std", "values that keep every pixel finite in float32", found)
        return config


class _Fields(Fields):
    """The fields of picture settings."""

    def family(self) -> str:
        name = "image_processor_type" if self.get("image_processor_type") else "feature_extractor_type"
        found = self.get(name)
        if not isinstance(found, str) or found not in _CLASS_NAMES:
            expected = ", ".join(_CLASS_NAMES) + " (nothing else is supported)"
            raise self.error("image_processor_type" if found is None else name, expected, found)
        return _CLASS_NAMES[found]

    def refuse_unsupported(self) -> None:
        for name in ("auto_map", "input_data_format"):  # code from the checkpoint; a fixed channel order
            if self.get(name) is not None:
                raise self.error(name, "nothing (it is not supported)", self.get(name))
        if self.flag("do_pad", False):
            raise self.error("do_pad", "false (padding is not supported)", True)

    def size(self, name: str, default: tuple[int, int] | None) -> tuple[int, int]:
        """(height, width) from N, [H, W] or {"height": H, "width": W}; with no default it has to be there."""
        value = self.get(name, None if default is None else list(default))
        sides = value
        if isinstance(value, int) and not isinstance(value, bool):
            if name == "size" and not self.flag("default_to_square", True):
                raise self.error(name, "{'height': H, 'width': W} where default_to_square is false", value)
            sides = [value, value]
        elif isinstance(value, dict) and set(value) == {"height", "width"}:
            sides = [value["height"], value["width"]]
        expected = f"N, [H, W] or {{'height': H, 'width': W}} with whole numbers from 1 to {MAX_SIDE}"
        if not isinstance(sides, list) or len(sides) != 2:
            raise self.error(name, f"{expected} (shortest_edge and the like are not supported)", value)
        for side in sides:
            if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= MAX_SIDE:
                raise self.error(name, expected, value)
        return sides[0], sides[1]

    def resample(self, default: int) -> int:
        value = self.get("resample", default)
        if isinstance(value, bool) or not isinstance(value, int) or value not in RESAMPLING:
            known = ", ".join(f"{number} ({name})" for number, name in RESAMPLING.items())
            raise self.error("resample", known, value)
        return value

    def number(self, name: str, value: Any, above: float) -> float:
        if not isinstance(value, bool) and isinstance(value, int | float) and above < value < math.inf:
            try:
                return float(value)
            except OverflowError:  # a whole number of hundreds of digits
                pass
        expected = "a finite number" if above == -math.inf else f"a finite number above {above:g}"
        raise self.error(name, expected, self.get(name))

    def per_channel(self, name: str, above: float) -> tuple[float, float, float]:
        value = self.get(name, [0.5, 0.5, 0.5])
        if isinstance(value, int | float):
            value = [value] * 3
        if not isinstance(value, list) or len(value) != 3:
            raise self.error(name, "a number or a list of 3 numbers, one a channel", value)
        red, green, blue = (self.number(name, channel, above) for channel in value)
        return red, green, blue
