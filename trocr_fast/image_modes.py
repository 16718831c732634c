"""Any PIL image or array -> a PIL image of mode RGB or L: the rules for alpha, 16 bit, rotation and channels.

`pixels="sane"`, the default:

- RGB stays as it is. 1 bit and grey become L, which equals RGB with three equal channels.
- Palette, CMYK, YCbCr, LAB, HSV: Pillow's `convert("RGB")`.
- Alpha, or a colour or palette entry marked transparent: composited on white.
- More than 8 bits (modes I;16, I, F; arrays of integers or floats), judged over the whole picture: floats
  with no value above 1 are multiplied by 255; else values up to 255 stay; else values up to 65535 are divided
  by 257; all rounded. Negative, larger and non-finite values are refused: nothing says what black and white
  are.
- EXIF orientation is applied; an EXIF block that can't be read counts as none.
- Arrays: bool, integer or float, H x W, H x W x 1, H x W x 3 (RGB), H x W x 4 (RGBA) or 3 x H x W. A first
  side of 3 always means channels first, as in transformers.

`pixels="stock"`: what transformers' Pillow processors do, refusals included. Only three 8-bit channels get
through, YCbCr, LAB and HSV as if they were RGB; there is no rotation, and `convert("RGB")` only where the
configuration says `do_convert_rgb`. Arrays need three dimensions and whole numbers from 0 to 255. Floats
between 0 and 1, which transformers rescales twice, are refused: no 8-bit picture stands for the result.
"""

import numpy as np
from PIL import Image

from trocr_fast.errors import PictureError
from trocr_fast.image_config import ImageConfig

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def sane_image(image: Image.Image) -> Image.Image:
    """A loaded image of any mode -> mode RGB or L.

    Raises:
        PictureError: values of a 32-bit mode that no rule covers.
        Exception: whatever Pillow raises where it can't convert.
    """
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)  # [H, W]
        grey = Image.fromarray(_to_8_bit(values))
        nothing = image.info.get("transparency")
        if isinstance(nothing, int):  # a 16-bit PNG can mark one grey value as transparent
            grey.paste(255, mask=Image.fromarray(values == nothing))
        return grey
    if image.has_transparency_data:
        # Pillow has one way out of a premultiplied mode each: La to LA, and RGBa to RGBA.
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        paper = Image.new("RGB", rgba.size, "white")
        paper.paste(rgba, mask=rgba.getchannel("A"))
        return paper
    return image if image.mode in ("RGB", "L") else image.convert("L" if image.mode == "1" else "RGB")


def sane_array(array: np.ndarray) -> Image.Image:
    """An array of a shape that `array_size` accepts -> mode RGB or L.

    Raises:
        PictureError: a dtype or values that no rule covers.
    """
    if array.dtype.kind not in "buif":
        raise PictureError(f"expected an array of bool, integers or floats, got dtype {array.dtype}")
    if array.ndim == 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    pixels = np.ascontiguousarray(_to_8_bit(array))  # [H, W], [H, W, 3] or [H, W, 4]
    return sane_image(Image.fromarray(pixels))


def stock_image(image: Image.Image, config: ImageConfig) -> Image.Image:
    """A loaded image -> mode RGB as transformers sees it.

    Raises:
        PictureError: transformers, or the model after it, would refuse the picture.
    """
    if config.do_convert_rgb:
        image = image.convert("RGB")
    if image.mode == "RGB":
        return image
    array = np.asarray(image)  # [H, W] or [H, W, C]
    num_channels = array.shape[2] if array.ndim == 3 else 1
    if num_channels != 3:
        raise _stock_refusal(f"mode {image.mode}", f"{num_channels} channel(s)")
    return Image.fromarray(array)


def stock_array(array: np.ndarray, config: ImageConfig) -> Image.Image:
    """An array -> mode RGB as transformers sees it, by its way of finding the channels.

    Raises:
        PictureError: transformers, or the model after it, would refuse the array; or its result isn't 8-bit.
    """
    what = f"an array of shape {list(array.shape)} and dtype {array.dtype}"
    if array.ndim != 3 or not {array.shape[0], array.shape[2]} & {1, 3}:
        raise _stock_refusal(what, "no channels")
    if array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.shape[2] != 3:
        raise _stock_refusal(what, f"{array.shape[2]} channel(s)")
    if array.dtype != np.uint8:
        if (
            array.dtype.kind not in "buif" or not 0 <= array.min().item() <= array.max().item() <= 255
        ):  # false for NaN too
            raise PictureError(f"expected whole numbers from 0 to 255 (stock pixels), got {what} with others")
        # Without a resize transformers never leaves the float dtype.
        whole = array.dtype.kind != "f" or (config.do_resize and np.allclose(array, array.astype(np.int64)))
        if not whole:
            raise PictureError(f"expected pixels that 8 bits can hold (stock pixels), got {what}")
        array = array.astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def array_size(array: np.ndarray) -> tuple[int, int]:
    """Height and width of an array, by the rule for channels.

    Raises:
        PictureError: a shape that is no picture's.
    """
    shape = array.shape
    if array.ndim == 2:
        return shape[0], shape[1]
    if array.ndim == 3 and shape[0] == 3:
        return shape[1], shape[2]
    if array.ndim == 3 and shape[2] in (1, 3, 4):
        return shape[0], shape[1]
    raise PictureError(f"expected an array H x W, H x W x 1, 3 or 4, or 3 x H x W, got shape {list(shape)}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block of a good picture: Pillow raises whatever its parser ran into
        return image
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Bool, integers or floats of any shape -> uint8, by the rule in the module's docstring."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    low, high = values.min().item(), values.max().item()  # Python's numbers: float16 has no 65535
    if not 0 <= low <= high <= 65535:  # false for NaN too
        raise PictureError(f"expected values from 0 to 65535, got values from {low} to {high}")
    if values.dtype.kind == "f":
        scale = 255.0 if high <= 1 else 1.0 if high <= 255 else 1 / 257
        return np.rint(values.astype(np.float64) * scale).astype(np.uint8)
    if high <= 255:
        return values.astype(np.uint8)
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _stock_refusal(what: str, found: str) -> PictureError:
    return PictureError(f"expected three channels, got {what}: the stock processor finds {found} in it")
