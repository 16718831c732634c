"""Where the ink is: a text in a font as coverage of the paper, drawn as print shops, typewriters and printers do.

`line_ink` draws the line with what a line detector leaves around it: margins, and often a part of the lines above
and below. Its result knows nothing of colour or light; `paper.py` adds them.
"""

import random

import fonts
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

LARGEST_WIDTH = 1400  # pixels; the model's rectangle is smaller, so more would only cost time
BILINEAR = Image.Resampling.BILINEAR


def line_ink(
    text: str, face: fonts.Face, neighbours: tuple[str, str], rng: random.Random, degrade: float
) -> np.ndarray:
    """Coverage of the drawn line, 0 paper to 1 ink: float32 [h, w]. `neighbours` are the lines above and below."""
    size = rng.choices((rng.randint(12, 20), rng.randint(20, 40), rng.randint(40, 60)), (2, 6, 1))[0]
    size = max(12, min(size, int(LARGEST_WIDTH / (0.55 * len(text)))))
    font = fonts.load(face.path, size)
    ascent, descent = font.getmetrics()
    pen = _Pen(face, size, text, rng, degrade)
    crowded = rng.random() < 0.45 * degrade
    pitch = int((ascent + descent) * rng.uniform(0.8, 1.3))
    room = size  # around the text, for slant, rotation and overhang; cropped away below
    width = pen.width(text) + 2 * room
    height = ascent + descent + 2 * max(room, pitch if crowded else 0)
    base = (height - ascent - descent) // 2  # top of the line's own box
    canvas = Image.new("L", (width, height), 0)
    pen.draw(canvas, text, room, base)
    own = canvas.getbbox() or (0, 0, width, height)
    if crowded:
        above, below = neighbours
        for other, top in ((above, base - pitch), (below, base + pitch)):
            if rng.random() < 0.75:
                pen.draw(canvas, other, room + int(size * rng.uniform(-2, 3)), top)

    canvas, own = _bent(canvas, own, size, rng, degrade)
    box = _crop(own, (base, base + ascent + descent), size, pitch if crowded else 0, len(text), rng, degrade)
    ink = _worn(canvas.crop(box), size, face, rng, degrade)
    return _marked(ink, size, rng, degrade)


class _Pen:
    """Draws lines of one look: spacing, small capitals, an unsteady typewriter, a heavy stroke."""

    def __init__(self, face: fonts.Face, size: int, text: str, rng: random.Random, degrade: float) -> None:
        self.rng, self.size = rng, size
        self.font = fonts.load(face.path, size)
        self.stroke = 1 if size > 26 and rng.random() < 0.05 else 0
        self.tracking = rng.choice((0.0,) * 9 + (-0.03, 0.04, 0.1, 0.2)) * size
        typewriter = rng.random() < (0.5 if fonts.weight(face.family) > 2 else 0.04) * degrade
        self.unsteady = rng.uniform(0.005, 0.035) * size if typewriter else 0.0
        self.lightest = rng.uniform(0.45, 0.95) if typewriter else 1.0
        small = text.isupper() and rng.random() < 0.3
        self.small_font = fonts.load(face.path, max(9, int(size * rng.uniform(0.72, 0.85)))) if small else None
        self.space = rng.choice((1.0, 1.0, 1.0, 1.4, 2.0))  # justified text stretches its spaces

    def _glyphs(self, text: str) -> list[tuple[str, object, float]]:
        """Each character with its font and its advance; small capitals keep large ones where a word begins."""
        before, glyphs = " ", []
        for character in text:
            begins = not before.isalnum() and before not in "'’"
            font = self.small_font if self.small_font and character.isalpha() and not begins else self.font
            advance = font.getlength(character) * (self.space if character == " " else 1.0) + self.tracking
            glyphs.append((character, font, advance))
            before = character
        return glyphs

    @property
    def _plain(self) -> bool:
        return not (self.tracking or self.unsteady or self.small_font or self.space != 1.0)

    def width(self, text: str) -> int:
        """Pixels from the pen's start to its end, overhang included."""
        if self._plain:
            return int(self.font.getbbox(text, stroke_width=self.stroke)[2]) + 1
        return int(sum(advance for _, _, advance in self._glyphs(text)) + 0.3 * self.size)

    def draw(self, canvas: Image.Image, text: str, left: float, top: int) -> None:
        pen = ImageDraw.Draw(canvas)
        if self._plain:
            pen.text((left, top), text, fill=255, font=self.font, stroke_width=self.stroke)
            return
        ascent = self.font.getmetrics()[0]
        for character, font, advance in self._glyphs(text):
            x, y = left, top + ascent
            if self.unsteady:
                x, y = x + self.rng.gauss(0, 0.4 * self.unsteady), y + self.rng.gauss(0, self.unsteady)
            fill = int(255 * self.rng.uniform(self.lightest, 1.0))
            pen.text((x, y), character, fill=fill, font=font, stroke_width=self.stroke, anchor="ls")
            left += advance


def _bent(
    canvas: Image.Image, own: tuple[int, int, int, int], size: int, rng: random.Random, degrade: float
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """Slant, a little rotation and a curved baseline; and the line's own box after them, a little generous."""
    x0, y0, x1, y1 = own
    slant = rng.uniform(-0.15, 0.3) if rng.random() < 0.1 * degrade else 0.0
    angle = rng.gauss(0, 0.012) if rng.random() < 0.45 * degrade else 0.0
    limit = 0.9 * size / max(x1 - x0, 1)  # a long line that leaned more would cross its neighbours
    angle = max(-limit, min(limit, angle))
    middle_x, middle_y = canvas.width / 2, canvas.height / 2
    if slant or angle:
        matrix = (1, slant, -slant * middle_y, angle, 1, -angle * middle_x)
        canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, matrix, BILINEAR)
    bow = rng.uniform(0.03, 0.22) * size if rng.random() < 0.15 * degrade else 0.0
    if bow:
        canvas = _curved(canvas, bow, rng)
    rise = abs(angle) * (x1 - x0) / 2
    lean = abs(slant) * (y1 - y0) / 2
    grown = (x0 - lean, y0 - rise - bow, x1 + lean, y1 + rise + bow)
    return canvas, tuple(int(value) for value in grown)


def _curved(canvas: Image.Image, bow: float, rng: random.Random) -> Image.Image:
    """The baseline as a slow wave of `bow` pixels: pages near their spine, photographs of paper."""
    width, height = canvas.size
    phase, waves = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 1.2)
    edges = np.linspace(0, width, 17).astype(int)
    shift = bow * np.sin(phase + 2 * np.pi * waves * edges / width)
    pieces = []
    for i in range(16):
        left, right, a, b = int(edges[i]), int(edges[i + 1]), float(shift[i]), float(shift[i + 1])
        if right > left:
            quad = (left, a, left, height + a, right, height + b, right, b)
            pieces.append(((left, 0, right, height), quad))
    return canvas.transform(canvas.size, Image.Transform.MESH, pieces, BILINEAR)


def _crop(
    own: tuple[int, int, int, int],
    box: tuple[int, int],
    size: int,
    pitch: int,
    length: int,
    rng: random.Random,
    degrade: float,
) -> tuple[int, int, int, int]:
    """What a line detector would cut out. `own` is the ink's box, `box` the font's rows, `pitch` 0 if alone."""
    x0, y0, x1, y1 = own
    if length < 3 or rng.random() < 0.5:  # a line box: the font's own height, whatever the letters are
        y0, y1 = min(y0, box[0]), max(y1, box[1])
    loose = rng.random() < 0.25
    far = rng.choice((0.5, 0.9, 2.0))  # a small line in a high crop
    side = lambda: int(size * (rng.uniform(0, 1.5) if loose else rng.uniform(0, 0.35)))  # noqa: E731
    edge = lambda: int(size * (rng.uniform(0, far) if loose else rng.uniform(0, 0.2)))  # noqa: E731
    if pitch and rng.random() < 0.2:  # whole neighbours, above and below: the line is the one in the middle
        even = rng.uniform(0.6, 1.05)
        edge = lambda: int(pitch * max(0.5, even + rng.gauss(0, 0.07)))  # noqa: E731
    elif pitch:  # a part of the neighbours, never as much of them as of the line itself
        edge = lambda: int(pitch * rng.choice((rng.uniform(0, 0.25), rng.uniform(0.2, 0.7))))  # noqa: E731
    left, top, right, bottom = x0 - side(), y0 - edge(), x1 + side(), y1 + edge()
    if rng.random() < 0.04 * degrade:  # a crop that shaves a pixel or two off the letters
        top, bottom = y0 + rng.randint(0, 2), y1 - rng.randint(0, 2)
    return left, top, max(right, left + 4), max(bottom, top + 4)


def _worn(crop: Image.Image, size: int, face: fonts.Face, rng: random.Random, degrade: float) -> np.ndarray:
    """Fat, broken or dotted ink: float32 [h, w]."""
    chance = (0.5 if fonts.weight(face.family) > 2 else 0.22) * degrade  # typewriters wear most
    ink = np.asarray(crop, np.float32) / 255
    if rng.random() < 0.04 * degrade and size >= 22:
        return _dotted(ink, size, rng)
    if rng.random() < chance:
        spread = rng.uniform(0.3, 0.05 * size + 0.3)
        soft = np.asarray(crop.filter(ImageFilter.GaussianBlur(spread)), np.float32) / 255
        if rng.random() < 0.6:  # ink that ran: the counters of small letters fill up
            ink = np.clip(soft * rng.uniform(1.3, 2.6) - rng.uniform(0, 0.25), 0, 1)
        else:  # thin print: only the middle of the strokes took ink
            ink = np.clip((soft - rng.uniform(0.15, 0.35)) * 2.2, 0, 1) * 0.6 + 0.4 * ink
    if rng.random() < chance:
        holes = grain(rng, ink.shape, rng.uniform(0.06, 0.35) * size)
        depth = rng.uniform(0.3, 1.0)
        ink = ink * (1 - depth * np.clip(2.0 * (holes - rng.uniform(0.3, 1.3)), 0, 1))
    if rng.random() < 0.12 * degrade:  # fine specks, as of a worn ribbon or a bad copy
        ink = ink * np.clip(1.0 + rng.uniform(0.2, 0.6) * noise(rng, ink.shape), 0, 1)
    return ink


def _dotted(ink: np.ndarray, size: int, rng: random.Random) -> np.ndarray:
    """Needle print: the letters sampled on a grid of dots."""
    height, width = ink.shape
    step = max(2, round(size / rng.uniform(9, 13)))
    small = Image.fromarray(ink).resize((max(1, width // step), max(1, height // step)), Image.Resampling.BOX)
    on = (np.asarray(small) > rng.uniform(0.25, 0.45)).astype(np.float32)
    grid = np.kron(on, np.ones((step, step), np.float32))
    y, x = np.mgrid[0:step, 0:step] - (step - 1) / 2
    dot = np.clip(rng.uniform(0.5, 0.75) * step - np.hypot(x, y) + 0.3, 0, 1).astype(np.float32)
    return grid * np.tile(dot, on.shape)


def _marked(ink: np.ndarray, size: int, rng: random.Random, degrade: float) -> np.ndarray:
    """Ruled lines, underlines, strokes of a pen, stains, the other side's text: float32 [h, w]."""
    height, width = ink.shape
    ink = ink.copy()
    if rng.random() < 0.1 * degrade:  # a ruled line, an underline or the edge of a form field
        thick = max(1, int(size * rng.uniform(0.02, 0.09)))
        row = rng.choice((0, int(height * rng.uniform(0.72, 0.99)), height - thick))
        start = int(width * rng.choice((0.0, 0.0, rng.random() * 0.7)))
        end = int(width * rng.choice((1.0, 1.0, rng.uniform(0.75, 1.0))))
        ink[row : row + thick, start:end] = np.maximum(ink[row : row + thick, start:end], rng.uniform(0.3, 1.0))
    if rng.random() < 0.03 * degrade:  # a box around the line
        strength = rng.uniform(0.3, 1.0)
        ink[:1], ink[-1:], ink[:, :1], ink[:, -1:] = strength, strength, strength, strength
    if rng.random() < 0.06 * degrade:
        layer = Image.new("L", (width, height), 0)
        pen = ImageDraw.Draw(layer)
        for _ in range(rng.randint(1, 3)):
            x, y = rng.uniform(0, width), rng.uniform(0, height)
            reach = size * rng.uniform(0.5, 2.5)
            if rng.random() < 0.6:
                points = [(x, y), (x + rng.gauss(0, reach), y + rng.gauss(0, reach))]
                pen.line(points, fill=255, width=max(1, int(size * rng.uniform(0.02, 0.1))))
            else:
                radius = size * rng.uniform(0.03, 0.18)
                pen.ellipse((x - radius, y - radius, x + radius, y + 1.3 * radius), fill=255)
        marks = np.asarray(layer.filter(ImageFilter.GaussianBlur(0.7)), np.float32) / 255
        ink = np.maximum(ink, marks * rng.uniform(0.2, 0.9))
    if rng.random() < 0.06 * degrade:
        back = Image.fromarray((255 * ink[:, ::-1]).astype(np.uint8))
        back = np.asarray(back.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 0.06 * size + 0.5))), np.float32)
        shifted = np.roll(back / 255, (rng.randint(-size, size), rng.randint(-size, size)), (0, 1))
        ink = np.maximum(ink, shifted * rng.uniform(0.08, 0.3))
    return ink * rng.uniform(0.35, 1.0) if rng.random() < 0.2 else ink


_POOL = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)


def noise(rng: random.Random, shape: tuple[int, ...]) -> np.ndarray:
    """Gaussian noise cut from a pool made once: float32 [*shape]."""
    start = rng.randrange(len(_POOL))
    return np.resize(_POOL[start:], int(np.prod(shape))).reshape(shape)


def grain(rng: random.Random, shape: tuple[int, int], cell: float) -> np.ndarray:
    """Smooth noise of unit variance at its knots, `cell` pixels apart: float32 [h, w]."""
    cell = max(1.0, cell)
    coarse = noise(rng, (int(shape[0] / cell) + 2, int(shape[1] / cell) + 2))
    return np.asarray(Image.fromarray(coarse).resize((shape[1], shape[0]), BILINEAR))
