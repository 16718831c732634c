"""Which fonts draw the training lines, and which are kept for evaluation only.

The split is by design family, not by file: a family and its close relatives (Arimo and Liberation Sans,
Hack and DejaVu Sans Mono, Carlito and Lato) stay on the same side. Both sides are written out below, and
`faces` refuses to hand out a face whose name records say that it belongs to the other side.

    python examples/train_builtin/fonts.py --packages     the Debian packages, one line, for apt-get install
    python examples/train_builtin/fonts.py                what was found, by side
"""

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path

from fontTools.ttLib import TTFont
from PIL import ImageFont
from text import ALPHABET, BASIC

FONT_ROOTS = (Path("/usr/share/fonts"), Path("/usr/share/texmf/fonts"))

PACKAGES = """
fonts-adf-accanthis fonts-adf-baskervald fonts-adf-berenis fonts-adf-gillius fonts-adf-ikarius
fonts-adf-irianis fonts-adf-libris fonts-adf-mekanus fonts-adf-romande fonts-adf-solothurn
fonts-adf-switzera fonts-adf-tribun fonts-adf-universalis fonts-adf-verana fonts-agave fonts-anonymous-pro
fonts-arapey fonts-averia-sans-gwf fonts-averia-serif-gwf fonts-b612 fonts-cabin fonts-cantarell fonts-cardo
fonts-century-catalogue fonts-clear-sans fonts-cmu fonts-comfortaa fonts-comic-neue fonts-courier-prime
fonts-croscore fonts-crosextra-caladea fonts-crosextra-carlito fonts-dejavu-core fonts-dejavu-extra
fonts-dosis fonts-dustin fonts-ebgaramond fonts-essays1743 fonts-eurofurence fonts-fanwood
fonts-fantasque-sans fonts-firacode fonts-freefont-ttf fonts-gnutypewriter fonts-go fonts-goudybookletter
fonts-hack fonts-hermit fonts-inconsolata fonts-inter fonts-jetbrains-mono fonts-johnsmith-induni
fonts-junction fonts-junicode fonts-jura fonts-karla fonts-lato fonts-league-mono fonts-liberation
fonts-lindenhill fonts-linuxlibertine fonts-lmodern fonts-manrope fonts-monoid fonts-mononoki fonts-mplus
fonts-national-park fonts-noto-core fonts-noto-mono fonts-ocr-b fonts-oldstandard fonts-open-sans
fonts-opendin fonts-osifont fonts-oxygen fonts-paratype fonts-play fonts-prociono fonts-quattrocento
fonts-quicksand fonts-roadgeek fonts-roboto-slab fonts-roboto-unhinted fonts-routed-gothic fonts-sil-andika
fonts-sil-charis fonts-sil-gentiumplus fonts-sora fonts-stix fonts-texgyre fonts-tiresias
fonts-tlwg-laksaman-ttf fonts-tuffy fonts-urw-base35 fonts-vollkorn fonts-yanone-kaffeesatz fonts-yrsa-rasa
wamerican wbritish wdanish wdutch wfrench witalian wngerman wnorwegian wportuguese wspanish wswedish
""".split()

HELD_OUT = frozenset(
    name.strip()
    for name in """
B612; B612 Mono; Cabin; Caladea; Clear Sans; Clear Sans Light; Clear Sans Medium; Courier Prime;
EB Garamond; Go; Go Medium; Go Mono; Inconsolata; Oxygen Mono; Oxygen-Sans; PT Mono; PT Sans;
PT Sans Caption; PT Sans Narrow; PT Serif; PT Serif Caption; Quattrocento; Vollkorn
""".split(";")
)

TRAIN = frozenset(
    name.strip()
    for name in """
Accanthis ADF Std; Accanthis ADF Std No2; Accanthis ADF Std No3; Agave; Andika; Anonymous Pro;
Arapey; Arimo; Averia Sans GWF; Averia Serif GWF; Baskervald ADF Std; Berenis ADF Pro; C059;
CMU Bright; CMU Concrete; CMU Sans Serif; CMU Sans Serif Demi Condensed; CMU Serif;
CMU Typewriter Text; Cantarell; Cardo; Carlito; Century Catalogue; Charis SIL; Comfortaa;
Comic Neue; Cousine; DejaVu Sans; DejaVu Sans Mono; DejaVu Serif; Dosis; Dustismo; Dustismo Roman;
Essays1743; Fantasque Sans Mono; Fanwood; Fanwood Text; Fira Code; FreeMono; FreeSans; FreeSerif;
GNUTypewriter; Gentium Book Plus; Gentium Plus; Gillius ADF; Gillius ADF No2; Goudy Bookletter 1911;
Hack; Hermit; Ikarius ADF No2 Std; Ikarius ADF Std; IndUni-C; IndUni-H; IndUni-N; IndUni-P;
IndUni-T; Inter; Inter Display; Irianis ADF Std; JetBrains Mono; Junction; Junicode Two Beta; Jura;
Karla; Laksaman; Latin Modern Mono; Latin Modern Mono Light; Latin Modern Mono Light Cond;
Latin Modern Mono Prop; Latin Modern Roman; Latin Modern Roman Demi; Latin Modern Roman Slanted;
Latin Modern Sans; Latin Modern Sans Demi Cond; Lato; League Mono; Liberation Mono; Liberation Sans;
Liberation Sans Narrow; Liberation Serif; Libris ADF Std; Linden Hill; Linux Biolinum O;
Linux Libertine Display O; Linux Libertine Mono O; Linux Libertine O; M PLUS 1; M PLUS 1 Code;
M PLUS 2; M PLUS Code Latin 50; M PLUS Code Latin 60; Manrope; Mekanus ADF Std; Monoid;
National Park; Nimbus Mono PS; Nimbus Roman; Nimbus Sans; Nimbus Sans Narrow; Noto Mono; Noto Sans;
Noto Sans Display; Noto Sans Mono; Noto Serif; Noto Serif Display; OCR B; OSP-DIN; Old Standard TT;
Open Sans; Open Sans Condensed; P052; Play; Prociono; Quicksand; Quicksand Light; Quicksand Medium;
Rasa; Roadgeek 2014 Series C; Roadgeek 2014 Series D; Roadgeek 2014 Series E; Roboto;
Roboto Condensed; Roboto Slab; Romande ADF No2 Std; Romande ADF Std; Routed Gothic;
Routed Gothic Narrow; STIX; STIXGeneral; Solothurn; Sora; Switzera ADF; TeX Gyre Adventor;
TeX Gyre Bonum; TeX Gyre Cursor; TeX Gyre Heros; TeX Gyre Heros Cn; TeX Gyre Pagella;
TeX Gyre Schola; TeX Gyre Termes; Tinos; Tiresias Infofont; Tiresias LPfont; Tiresias PCfont;
Tiresias Signfont; Tribun ADF Std; Tuffy; URW Bookman; URW Gothic; Universalis ADF Std; Verana;
Verana Sans; Yanone Kaffeesatz; Yrsa; eurofurence; mononoki; osifont
""".split(";")
)

SKIPPED_STYLES = ("Thin", "Hairline", "ExtraLight", "UltraLight", "Smallcaps", "Keyboard", "Initials")


@dataclass(frozen=True)
class Face:
    """One font file that has at least every character of `BASIC`."""

    path: str
    family: str
    style: str
    characters: frozenset[str]


def faces(side: str) -> list[Face]:
    """Every usable face of one side, "train" or "held-out", sorted by family and path."""
    if side not in ("train", "held-out"):
        raise ValueError(f"side: expected 'train' or 'held-out', got {side!r}")
    wanted, other = (TRAIN, HELD_OUT) if side == "train" else (HELD_OUT, TRAIN)
    found = []
    paths = {
        path.resolve() for root in FONT_ROOTS for path in root.rglob("*") if path.suffix.lower() in (".ttf", ".otf")
    }
    for path in sorted(paths):
        names = _names(path)
        if names is None or names["family"] not in wanted:
            continue
        if any(style in names["style"] or style in path.stem for style in SKIPPED_STYLES):
            continue
        if other & names["all"]:
            raise ValueError(f"{path}: named {sorted(names['all'])}, which is on both sides of the split")
        characters = _drawable(path, names["cmap"])
        if characters >= BASIC:
            found.append(Face(str(path), names["family"], names["style"], characters))
    if not found:
        raise FileNotFoundError(f"no {side} fonts under {FONT_ROOTS}: apt-get install the packages of fonts.py first")
    return sorted(found, key=lambda face: (face.family, face.path))


def by_family(found: list[Face]) -> dict[str, list[Face]]:
    """Faces grouped by family, families in alphabetical order."""
    groups: dict[str, list[Face]] = {}
    for face in found:
        groups.setdefault(face.family, []).append(face)
    return dict(sorted(groups.items()))


@functools.lru_cache(maxsize=4096)
def load(path: str, size: int) -> ImageFont.FreeTypeFont:
    """The font at `size` pixels, in the plain layout: no ligature hides two characters in one glyph."""
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _names(path: Path) -> dict | None:
    """Family, style, every family-like name record and the character map of a font file."""
    try:
        font = TTFont(path, lazy=True, fontNumber=0)
        table = font["name"]
        family = table.getDebugName(16) or table.getDebugName(1)
        if family not in TRAIN | HELD_OUT:
            return None
        style = table.getDebugName(17) or table.getDebugName(2) or ""
        every = frozenset(filter(None, (table.getDebugName(i) for i in (1, 16, 21))))
        return {"family": family, "style": style, "all": every, "cmap": set(font.getBestCmap() or {})}
    except (KeyError, OSError, AssertionError):
        return None


def _drawable(path: Path, cmap: set[int]) -> frozenset[str]:
    """Characters that the font really draws: some fonts map a character to an empty or missing glyph."""
    font = load(str(path), 24)
    missing = bytes(font.getmask("\U0010fffe"))
    good = {" "}
    for character in ALPHABET:
        if ord(character) in cmap:
            mask = font.getmask(character)
            if mask.getbbox() and bytes(mask) != missing:
                good.add(character)
    return frozenset(good)


def check_split() -> None:
    """No family is on both sides, and no name continues a name of the other side ("Go" and "Go Mono")."""
    for held in HELD_OUT:
        for train in TRAIN:
            if held == train or train.startswith(held + " ") or held.startswith(train + " "):
                raise ValueError(f"font split: {held!r} is held out and {train!r} is trained on")


check_split()

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", action="store_true", help="print the Debian packages and stop")
    if parser.parse_args().packages:
        print(" ".join(PACKAGES))
    else:
        for side in ("train", "held-out"):
            groups = by_family(faces(side))
            print(f"{side}: {len(groups)} families, {sum(map(len, groups.values()))} faces")
            for family, members in groups.items():
                gaps = "".join(sorted(set(ALPHABET) - frozenset.intersection(*(m.characters for m in members))))
                print(f"  {family}: {len(members)}" + (f", without {gaps}" if gaps else ""))
