"""What the ink lies on and how it is photographed: colours, light, grain, folds, blur, low resolution, JPEG."""

import io
import random

import numpy as np
from ink import grain, noise
from PIL import Image, ImageFilter


def photograph(ink: np.ndarray, rng: random.Random, degrade: float) -> Image.Image:
    """Coverage float32 [h, w] to an RGB picture."""
    paper, colour = _colours(rng)
    pixels = paper + ink[..., None] * (colour - paper)  # [h, w, 3]
    if rng.random() < 0.35 * degrade:
        pixels += _light(ink.shape, rng)[..., None]
    if rng.random() < 0.3 * degrade:
        pixels += (grain(rng, ink.shape, rng.uniform(1, 10)) * rng.uniform(2, 12))[..., None]
    if rng.random() < 0.2 * degrade:
        channels = rng.choice((1, 3))
        pixels += noise(rng, (*ink.shape, channels)) * rng.uniform(2, 16)
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return _camera(picture, rng, degrade)


def _colours(rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Paper and ink, float32 [3] each, with enough contrast to be read; one line in six is light on dark."""
    if rng.random() < 0.35:
        paper, ink = [255.0] * 3, [rng.uniform(0, 60)] * 3
    else:
        while True:
            paper, ink = ([rng.uniform(0, 255) for _ in range(3)] for _ in range(2))
            if rng.random() < 0.6:  # mostly pale papers and dark inks, not poster colours
                paper = [255 - (255 - value) * 0.25 for value in paper]
                ink = [value * 0.4 for value in ink]
            luma = [0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] for colour in (paper, ink)]
            if luma[0] - luma[1] > 70:
                break
    if rng.random() < 0.17:
        paper, ink = ink, paper
    return np.array(paper, np.float32), np.array(ink, np.float32)


def _light(shape: tuple[int, int], rng: random.Random) -> np.ndarray:
    """Uneven light, float32 [h, w]: a ramp in some direction, shadows, the bright or dark edge of a fold."""
    y = np.linspace(-1, 1, shape[0], dtype=np.float32)[:, None] * rng.uniform(-20, 20)
    x = np.linspace(-1, 1, shape[1], dtype=np.float32)[None] * rng.uniform(-35, 35)
    light = y + x
    if rng.random() < 0.3:
        light = light + grain(rng, shape, shape[0] * rng.uniform(0.5, 3)) * rng.uniform(4, 20)
    if rng.random() < 0.25:
        place = np.arange(shape[1], dtype=np.float32) - rng.uniform(0, shape[1])
        width = shape[0] * rng.uniform(0.03, 0.4)
        light = light + rng.uniform(-40, 30) * np.exp(-((place / width) ** 2))[None]
    return light


def _camera(picture: Image.Image, rng: random.Random, degrade: float) -> Image.Image:
    """What happens after print: blur, low resolution, a hard threshold, JPEG."""
    if rng.random() < 0.25 * degrade:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, min(1.6, 0.035 * picture.height + 0.2))))
    if rng.random() < 0.25 * degrade and picture.height > 20:
        share = max(rng.uniform(0.35, 0.9), 14 / picture.height)
        size = (max(4, int(picture.width * share)), int(picture.height * share))
        picture = picture.resize(
            size, rng.choice((Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
        )
    if rng.random() < 0.05 * degrade:
        grey = picture.convert("L")
        low, high = grey.getextrema()
        picture = grey.point(lambda value: 255 if value > (low + high) / 2 else 0).convert("RGB")
    if rng.random() < 0.25 * degrade:
        packed = io.BytesIO()
        picture.save(packed, "JPEG", quality=rng.randint(25, 90))
        picture = Image.open(packed).convert("RGB")
    return picture
