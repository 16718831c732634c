"""A text and a font become the picture of a line, and the picture becomes the model's rectangle.

`line` draws a crop as a scanner, a screenshot or a line detector would deliver it, 16 to 80 pixels high and
of natural width; `squash` is what the stock image processor does with it.
"""

import functools
import io
import random

import fonts
import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from text import Sampler


def squash(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """The line stretched to the model's rectangle as ViTImageProcessor does it: uint8 [height, width, 3]."""
    return np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))


def line(text: str, face: fonts.Face, rng: random.Random, degrade: float = 1.0) -> Image.Image:
    """One line as an RGB picture. `degrade` scales how often it is spoiled; 0 is clean print."""
    ink = _ink(text, face, rng, degrade)  # float [h, w], 0 paper, 1 ink
    paper_colour, ink_colour = _colours(rng)
    shade = _light(ink.shape, rng) if rng.random() < 0.3 * degrade else 0.0
    texture = _texture(rng, ink.shape) if rng.random() < 0.25 * degrade else 0.0
    pixels = paper_colour + ink[..., None] * (ink_colour - paper_colour)  # [h, w, 3]
    pixels += np.expand_dims(shade + texture, -1) if np.ndim(shade + texture) else 0.0
    if rng.random() < 0.2 * degrade:
        sigma = rng.uniform(2, 16)
        channels = rng.choice((1, 3))
        pixels += _noise(rng, (*ink.shape, channels)) * sigma
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return _camera(picture, rng, degrade)


def _ink(text: str, face: fonts.Face, rng: random.Random, degrade: float) -> np.ndarray:
    """Coverage of the drawn text, with margins, slant and a little rotation: float32 [h, w] in 0 to 1."""
    size = rng.choices((rng.randint(12, 20), rng.randint(20, 40), rng.randint(40, 60)), (2, 6, 1))[0]
    font = fonts.load(face.path, size)
    ascent, descent = font.getmetrics()
    stroke = 1 if size > 26 and rng.random() < 0.06 else 0
    tracking = rng.choice((0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.03, 0.04, 0.1, 0.2)) * size
    left, top, right, _bottom = font.getbbox(text, stroke_width=stroke)
    room = size  # spare room around the text for slant, rotation and overhang; cropped away below
    width = int(right - min(left, 0) + max(tracking, 0) * len(text)) + 2 * room
    canvas = Image.new("L", (width, ascent + descent + 2 * room), 0)
    pen = ImageDraw.Draw(canvas)
    if tracking:
        x = float(room)
        for character in text:
            pen.text((x, room), character, fill=255, font=font, stroke_width=stroke)
            x += font.getlength(character) + tracking
    else:
        pen.text((room, room), text, fill=255, font=font, stroke_width=stroke)

    slant = rng.uniform(-0.15, 0.3) if rng.random() < 0.12 * degrade else 0.0
    angle = rng.gauss(0, 0.012) if rng.random() < 0.35 * degrade else 0.0
    if slant or angle:
        middle_x, middle_y = canvas.width / 2, canvas.height / 2
        matrix = (1, slant, -slant * middle_y, angle, 1, -angle * middle_x)
        canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)

    x0, y0, x1, y1 = canvas.getbbox() or (0, 0, *canvas.size)
    if len(text) < 3 or rng.random() < 0.55:  # a line box: the font's own height, whatever the letters are
        y0, y1 = min(y0, room + top // 2), max(y1, room + ascent + descent // 2)
    loose = rng.random() < 0.25
    side = lambda: int(size * (rng.uniform(0, 1.5) if loose else rng.uniform(0, 0.35)))  # noqa: E731
    edge = lambda: int(size * (rng.uniform(0, 0.5) if loose else rng.uniform(0, 0.2)))  # noqa: E731
    box = (x0 - side(), y0 - edge(), x1 + side(), y1 + edge())
    if rng.random() < 0.04 * degrade:  # a crop that shaves a pixel or two off the letters
        box = (box[0], y0 + rng.randint(0, 2), box[2], y1 - rng.randint(0, 2))
    ink = np.asarray(canvas.crop(box), np.float32) / 255
    if rng.random() < 0.1 * degrade:  # a ruled line or the edge of a form field
        row = rng.choice((0, 1, -1, -2, int(ink.shape[0] * rng.uniform(0.8, 0.98))))
        ink = ink.copy()
        ink[row] = np.maximum(ink[row], rng.uniform(0.3, 1.0))
    return ink * rng.uniform(0.6, 1.0) if rng.random() < 0.2 else ink


def _colours(rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Paper and ink, float32 [3] each, with enough contrast to be read; one line in four is light on dark."""
    if rng.random() < 0.35:
        paper, ink = [255.0] * 3, [rng.uniform(0, 60)] * 3
    else:
        while True:
            paper, ink = ([rng.uniform(0, 255) for _ in range(3)] for _ in range(2))
            if rng.random() < 0.5:  # mostly pale papers and dark inks, not poster colours
                paper = [255 - (255 - value) * 0.25 for value in paper]
                ink = [value * 0.4 for value in ink]
            luma = [0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] for colour in (paper, ink)]
            if luma[0] - luma[1] > 70:
                break
    if rng.random() < 0.25:
        paper, ink = ink, paper
    return np.array(paper, np.float32), np.array(ink, np.float32)


def _light(shape: tuple[int, int], rng: random.Random) -> np.ndarray:
    """Uneven light: a ramp in some direction, float32 [h, w]."""
    y = np.linspace(-1, 1, shape[0], dtype=np.float32)[:, None] * rng.uniform(-20, 20)
    x = np.linspace(-1, 1, shape[1], dtype=np.float32)[None] * rng.uniform(-35, 35)
    return y + x


def _texture(rng: random.Random, shape: tuple[int, int]) -> np.ndarray:
    """Paper grain: coarse noise, float32 [h, w]."""
    cell = rng.randint(2, 10)
    coarse = _noise(rng, (shape[0] // cell + 1, shape[1] // cell + 1)) * rng.uniform(2, 10)
    grown = Image.fromarray(coarse).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(grown)


@functools.lru_cache(maxsize=1)
def _noise_pool() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)


def _noise(rng: random.Random, shape: tuple[int, ...]) -> np.ndarray:
    """Gaussian noise cut from a pool made once: float32 [*shape]."""
    count = int(np.prod(shape))
    start = rng.randrange(len(_noise_pool()))
    return np.resize(_noise_pool()[start:], count).reshape(shape)


def _camera(picture: Image.Image, rng: random.Random, degrade: float) -> Image.Image:
    """What happens after print: blur, low resolution, a hard threshold, JPEG."""
    if rng.random() < 0.25 * degrade:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.035 * picture.height)))
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


class Lines:
    """An endless seeded stream of (picture, text): every family equally often, texts its faces can write."""

    def __init__(self, side: str, seed: int, degrade: float = 1.0, max_length: int = 24) -> None:
        self.rng = random.Random(f"{side} {seed}")
        self.families = list(fonts.by_family(fonts.faces(side)).values())
        self.sampler = Sampler(self.rng, evaluation=side == "held-out", max_length=max_length)
        self.degrade = degrade

    def draw(self) -> tuple[Image.Image, str]:
        face = self.rng.choice(self.rng.choice(self.families))
        text = self.sampler.text(face.characters)
        return line(text, face, self.rng, self.degrade), text
