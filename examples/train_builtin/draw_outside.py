"""Draws lines that the built-in model is not made for, each kind in a folder: what does its confidence say of them?

    python examples/train_builtin/draw_outside.py OUT [--count 100] [--seed 7]

All kinds but noise come from the renderer of the training lines; "eastern" mixes Latin letters with ones of Polish,
Czech, Hungarian, Turkish and others that the alphabet lacks. NAME.gt.txt says what is on the picture, also where
the model's alphabet can't write it; it is empty where there is nothing.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import fonts
import numpy as np
import render
from PIL import Image
from text import MAX_LENGTH, Sampler

LONGEST = 140
DEGRADE = 0.5
DEJAVU = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")  # of fonts-dejavu-core
GREEK = """
θάλασσα δρόμος ημέρα νύχτα βιβλίο γράμμα πόλη βουνό ποτάμι ψωμί φίλος σχολείο παράθυρο τραπέζι δέντρο λουλούδι
χειμώνας άνοιξη φθινόπωρο καλοκαίρι ουρανός γη φως σκιά δύο έξι χρόνος τιμή αριθμός σελίδα και ή στην από με ως
""".split()
EASTERN = """
źródło łąka miłość książę żółty pięć dziewięć księga Łódź świąteczny příliš žluťoučký kůň řeka Dvořák měsíc tři
hűvös őszi gyűjtő erdő félidő Győr tűz ağaç güneş şeker Eskişehir ışık altı dağ Timișoara înălțime țară știință oraș
Kārlis jūra četri ežerėlis ąžuolas dvidešimtį đak ćilim Đorđe mjesečina
""".split()  # a letter in each that the alphabet lacks
CYRILLIC = """
море дорога день ночь книга письмо город гора река хлеб друг школа окно стол дерево цветок зима весна осень лето
небо земля свет тень два шесть время цена число страница и или на из с как большой новый старый первый
""".split()


class Words:
    """Texts of a few words of a list, in place of the sampler's."""

    def __init__(self, rng: random.Random, words: list[str]) -> None:
        self.rng, self.words = rng, words

    def text(self, characters: frozenset[str]) -> str:
        line = " ".join(self.rng.choices(self.words, k=self.rng.randint(1, 9)))
        return self.rng.choice((line, line.capitalize(), line.upper()))


class Longer:
    """A sampler's texts put together to lines of more characters than the model was trained on."""

    def __init__(self, rng: random.Random, sampler: Sampler) -> None:
        self.rng, self.sampler = rng, sampler

    def text(self, characters: frozenset[str]) -> str:
        length, line = self.rng.randint(MAX_LENGTH + 2, LONGEST), ""
        while len(line) < length:
            line += " " * bool(line) + self.sampler.text(characters)
        return line[:length].rstrip()


class Blanks:
    """Nothing but spaces: paper, its stains and its ruled lines."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def text(self, characters: frozenset[str]) -> str:
        return " " * self.rng.randint(2, 60)


Picture = tuple[Image.Image, str]


def foreign(words: list[str], seed: int) -> Iterator[Picture]:
    """Words in letters that the alphabet lacks."""
    lines = render.Lines("held-out", seed, DEGRADE)
    paths = [next(root for root in Path("/usr/share/fonts").rglob(f"{name}.ttf")) for name in DEJAVU]
    faces = [fonts.Face(str(path), path.stem, "", frozenset("".join(words))) for path in paths]
    lines.families, lines.weights = {face.family: [face] for face in faces}, [1.0] * len(faces)
    lines.sampler = Words(lines.rng, words)
    while True:
        yield lines.draw()


def long(seed: int) -> Iterator[Picture]:
    """Lines of 81 to 140 characters."""
    lines = render.Lines("held-out", seed, DEGRADE)
    lines.sampler = Longer(lines.rng, lines.sampler)
    while True:
        yield lines.draw()


def upside_down(seed: int) -> Iterator[Picture]:
    """Lines that the model would read, turned by half."""
    lines = render.Lines("held-out", seed, DEGRADE)
    while True:
        picture, text = lines.draw()
        yield picture.transpose(Image.Transpose.ROTATE_180), text


def blank(seed: int) -> Iterator[Picture]:
    """Paper with nothing on it, rougher than the lines."""
    lines = render.Lines("held-out", seed, degrade=1.0)
    lines.sampler = Blanks(lines.rng)
    while True:
        yield lines.draw()[0], ""


def noise(seed: int) -> Iterator[Picture]:
    """Every pixel at random."""
    rng = np.random.default_rng(seed)
    while True:
        height, width = rng.integers(20, 64), rng.integers(60, 900)
        yield Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)), ""


KINDS: dict[str, Callable[[int], Iterator[Picture]]] = {
    "greek": lambda seed: foreign(GREEK, seed),
    "cyrillic": lambda seed: foreign(CYRILLIC, seed),
    "eastern": lambda seed: foreign(EASTERN, seed),
    "long": long,
    "upside_down": upside_down,
    "blank": blank,
    "noise": noise,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=100, help="pictures of each kind")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    for kind, draw in KINDS.items():
        folder = args.out / kind
        folder.mkdir(parents=True, exist_ok=True)
        for number, (picture, text) in zip(range(args.count), draw(args.seed), strict=False):
            path = folder / f"{kind}_{number:05d}.png"
            picture.save(path)
            path.with_suffix(".gt.txt").write_text(text + "\n", encoding="utf-8")
    print(f"{args.count} pictures of each kind in {args.out}: {', '.join(KINDS)}")


if __name__ == "__main__":
    main()
