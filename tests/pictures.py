"""Pictures and picture settings for the tests; the stock processors they are compared with."""

import io
import json
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

# The settings of three published checkpoints, one for each spelling in use.
SMALL_PRINTED = {
    "crop_size": 224,
    "do_center_crop": False,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "DeiTFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "TrOCRProcessor",
    "resample": 3,
    "size": 384,
}
BASE_HANDWRITTEN = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "ViTImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "TrOCRProcessor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
}
LARGE_PRINTED = {
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "size": 384,
    "feature_extractor_type": "ViTFeatureExtractor",
    "processor_class": "TrOCRProcessor",
}
PUBLISHED = {
    "small-printed": SMALL_PRINTED,
    "base-handwritten": BASE_HANDWRITTEN,
    "large-printed": LARGE_PRINTED,
}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """A random RGB picture: every resampling mistake shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    """The bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises this many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write_settings(folder: Path, settings: dict[str, Any], name: str = "preprocessor_config.json") -> Path:
    """A checkpoint folder that holds picture settings alone."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(settings))
    return folder


@cache
def _processor(settings: str) -> Any:
    from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    values = json.loads(settings)
    kind = values.pop("image_processor_type", None) or values.pop("feature_extractor_type")
    return (DeiTImageProcessorPil if kind.startswith("DeiT") else ViTImageProcessorPil)(**values)


def stock(settings: dict[str, Any], picture: Any) -> torch.Tensor:
    """transformers' own pixel_values [1, C, H, W] of one PIL image or array; raises what it raises."""
    return _processor(json.dumps(settings))(images=picture, return_tensors="pt").pixel_values
