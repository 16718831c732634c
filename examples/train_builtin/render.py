"""A text and a font become the picture of a line, and the picture becomes the model's rectangle.

`Lines` draws crops as a scanner, a screenshot or a line detector would deliver them, of natural width; `squash`
is what the stock image processor does with them.
"""

import random

import fonts
import numpy as np
from ink import line_ink
from paper import photograph
from PIL import Image
from text import MAX_LENGTH, Sampler


def squash(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """The line stretched to the model's rectangle as ViTImageProcessor does it: uint8 [height, width, 3]."""
    return np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))


class Lines:
    """An endless seeded stream of (picture, text): families by weight, texts that their faces can write.

    `degrade` scales how often a line is spoiled; 0 is clean print, 1 is rough.
    """

    def __init__(self, side: str, seed: int, degrade: float = 1.0, max_length: int = MAX_LENGTH) -> None:
        self.rng = random.Random(f"{side} {seed}")
        self.families = fonts.by_family(fonts.faces(side))
        self.weights = [fonts.weight(family) for family in self.families]
        self.sampler = Sampler(self.rng, evaluation=side == "held-out", max_length=max_length)
        self.degrade = degrade

    def draw(self) -> tuple[Image.Image, str]:
        (family,) = self.rng.choices(list(self.families), self.weights)
        face = self.rng.choice(self.families[family])
        text, above, below = (self.sampler.text(face.characters) for _ in range(3))
        ink = line_ink(text, face, (above, below), self.rng, self.degrade)
        return photograph(ink, self.rng, self.degrade), text
