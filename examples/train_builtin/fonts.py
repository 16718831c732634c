"""Which fonts draw the training lines, and which are kept for evaluation only.

The split is by design family, not by file: a family and its close relatives (Arimo and Liberation Sans,
Hack and DejaVu Sans Mono, Carlito and Lato) stay on the same side. Both sides are written out below, and
`faces` refuses to hand out a face whose name records say that it belongs to the other side.

    python examples/train_builtin/fonts.py --packages     the Debian packages, one line, for apt-get install
    python examples/train_builtin/fonts.py --texlive      as root: faces of texlive-fonts-extra without TeX itself
    python examples/train_builtin/fonts.py                what was found, by side
"""

import argparse
import functools
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fontTools.ttLib import TTFont
from PIL import ImageFont
from text import ALPHABET, BASIC
from text import PACKAGES as TEXT_PACKAGES

FONT_ROOTS = (Path("/usr/share/fonts"), Path("/usr/share/texmf/fonts"))

PACKAGES = """
fonts-3270 fonts-adf-accanthis fonts-adf-baskervald fonts-adf-berenis fonts-adf-gillius fonts-adf-ikarius
fonts-adf-irianis fonts-adf-libris fonts-adf-mekanus fonts-adf-oldania fonts-adf-romande fonts-adf-solothurn
fonts-adf-switzera fonts-adf-tribun fonts-adf-universalis fonts-adf-verana fonts-agave fonts-allerta
fonts-anonymous-pro fonts-apropal fonts-arapey fonts-averia-sans-gwf fonts-averia-serif-gwf fonts-b612
fonts-bebas-neue fonts-beteckna fonts-cabin fonts-cantarell fonts-cardo fonts-century-catalogue
fonts-clear-sans fonts-cmu fonts-comfortaa fonts-comic-neue fonts-compagnon fonts-courier-prime
fonts-croscore fonts-crosextra-caladea fonts-crosextra-carlito fonts-dejavu-core fonts-dejavu-extra
fonts-dosis fonts-dustin fonts-ebgaramond fonts-elstob fonts-essays1743 fonts-eurofurence
fonts-fantasque-sans fonts-fanwood fonts-firacode fonts-freefont-ttf fonts-gamaliel fonts-georgewilliams
fonts-gfs-artemisia fonts-gfs-didot fonts-gfs-neohellenic fonts-glasstty fonts-gnutypewriter fonts-go
fonts-gotico-antiqua fonts-goudybookletter fonts-hack fonts-hermit fonts-inconsolata fonts-inter
fonts-jetbrains-mono fonts-johnsmith-induni fonts-junction fonts-junicode fonts-jura fonts-karla fonts-lato
fonts-league-mono fonts-league-spartan fonts-liberation fonts-lindenhill fonts-linex fonts-linuxlibertine
fonts-lmodern fonts-manrope fonts-monofur fonts-monoid fonts-mononoki fonts-mplus fonts-national-park
fonts-noto-core fonts-noto-mono fonts-ocr-a fonts-ocr-b fonts-okolaks fonts-oldstandard fonts-open-sans
fonts-opendin fonts-osifont fonts-oxygen fonts-paratype fonts-pc fonts-play fonts-prociono
fonts-quattrocento fonts-quicksand fonts-roadgeek fonts-roboto-slab fonts-roboto-unhinted
fonts-routed-gothic fonts-sil-andika fonts-sil-charis fonts-sil-doulos fonts-sil-gentiumplus fonts-sora
fonts-spleen fonts-stix fonts-texgyre fonts-tiresias fonts-tlwg-kinnari-ttf fonts-tlwg-laksaman-ttf
fonts-tlwg-mono-ttf fonts-tlwg-norasi-ttf fonts-tlwg-typewriter-ttf fonts-tlwg-typist-ttf
fonts-tlwg-typo-ttf fonts-tuffy fonts-urw-base35 fonts-vollkorn fonts-yanone-kaffeesatz fonts-yrsa-rasa
wamerican wbritish wdanish wdutch wfrench witalian wngerman wnorwegian wportuguese wspanish wswedish
""".split()

# folders of the Debian package texlive-fonts-extra, 500 MB that would bring TeX along: `--texlive` takes these out
TEXLIVE_FOLDERS = """
opentype/adobe/sourcecodepro opentype/adobe/sourceserifpro opentype/gust/poltawski opentype/huerta/alegreya
opentype/ibm/plex opentype/iginomarini/imfellenglish opentype/impallari/librebodoni
opentype/impallari/librecaslon opentype/impallari/librefranklin opentype/nowacki/kurier
opentype/kosch/crimson opentype/public/alfaslabone opentype/public/antt opentype/public/baskervillef
opentype/public/coelacanth opentype/public/cooperhewitt opentype/public/courierten opentype/public/eczar
opentype/public/etbb opentype/public/fbb opentype/public/forum opentype/public/gfsbodoni
opentype/public/heuristica opentype/public/ibarra opentype/public/kpfonts-otf opentype/public/montserrat
opentype/public/playfair opentype/public/qualitype opentype/public/step opentype/public/umtypewriter
opentype/public/xcharter opentype/sorkin/merriweather opentype/tipo/overlock truetype/huerta/bitter
truetype/impallari/librebaskerville truetype/public/arvo truetype/public/cuprum truetype/public/josefin
truetype/public/marcellus
truetype/production/spectral
""".split()
TEXLIVE_TARGET = Path("/usr/share/fonts/texlive-fonts-extra")

HELD_OUT = frozenset(
    name.strip()
    for name in """
B612; B612 Mono; Cabin; Caladea; Clear Sans; Clear Sans Light; Clear Sans Medium; Courier Prime;
EB Garamond; Glass TTY VT220; Go; Go Medium; Go Mono; Inconsolata; Oxygen-Sans; Oxygen Mono; PT Mono;
PT Sans; PT Sans Caption; PT Sans Narrow; PT Serif; PT Serif Caption; Quattrocento; Vollkorn
""".split(";")
)

TRAIN = frozenset(
    name.strip()
    for name in """
Accanthis ADF Std; Accanthis ADF Std No2; Accanthis ADF Std No3; Agave; Alegreya; Alegreya SC; Allerta;
Alpha Slab One; Andika; Anonymous Pro; Antykwa Poltawskiego; Antykwa Torunska; Antykwa Torunska Condensed;
Apropal; Arapey; Arimo; Arvo; Averia Sans GWF; Averia Serif GWF; Baskervald ADF Std; BaskervilleF;
Bebas Neue; Berenis ADF Pro; BetecknaGS; BetecknaGSCondensed; Bitter; C059; CMU Bright; CMU Concrete;
CMU Sans Serif; CMU Sans Serif Demi Condensed; CMU Serif; CMU Typewriter Text; Cantarell; Cardo; Carlito;
Caslon; Century Catalogue; Charis SIL; Coelacanth; Comfortaa; Comic Neue; Compagnon; Cooper Hewitt;
Courier 10 Pitch; Cousine; Crimson; Cuprum; DejaVu Sans; DejaVu Sans Mono; DejaVu Serif; Dosis; Doulos SIL;
Dustismo; Dustismo Roman; ETbb; Eczar; ElstobD; Essays1743; Fantasque Sans Mono; Fanwood; Fanwood Text;
Fira Code; Forum; FreeMono; FreeSans; FreeSerif; GFS Artemisia; GFS Bodoni; GFS Didot; GFS Neohellenic;
GNUTypewriter; GWMonospace; Gamaliel; Gentium Book Plus; Gentium Plus; Gillius ADF; Gillius ADF No2;
Goudy Bookletter 1911; Hack; Hamlet; Hermit; Heuristica; IBM 3270; IBM 3270 Condensed;
IBM 3270 Semi-Condensed; IBM Plex Mono; IBM Plex Sans; IBM Plex Sans Condensed; IBM Plex Serif;
IM FELL English; IM FELL English SC; Ibarra Real Nova; Ikarius ADF No2 Std; Ikarius ADF Std; IndUni-C;
IndUni-H; IndUni-N; IndUni-P; IndUni-T; Inter; Inter Display; Irianis ADF Std; Jessen; JetBrains Mono;
Josefin Sans; Junction; Junicode Two Beta; Jura; Karla; Kinnari; KpMono; KpRoman; KpSans; Kurier;
Kurier Cond; Laksaman; Latin Modern Mono; Latin Modern Mono Light; Latin Modern Mono Light Cond;
Latin Modern Mono Prop; Latin Modern Roman; Latin Modern Roman Demi; Latin Modern Roman Slanted;
Latin Modern Sans; Latin Modern Sans Demi Cond; Lato; League Mono; League Spartan; Liberation Mono;
Liberation Sans; Liberation Sans Narrow; Liberation Serif; Libre Baskerville; Libre Bodoni;
Libre Caslon Text; Libre Franklin; Libris ADF Std; Linden Hill; Linux Biolinum O; Linux Libertine Display O;
Linux Libertine Mono O; Linux Libertine O; Manrope; Marcellus; Marcellus SC; Mekanus ADF Std;
Mekanus ADF Titling Std; Merriweather; Merriweather Sans; Monoid; Montserrat; M PLUS 1; M PLUS 1 Code;
M PLUS 2; M PLUS Code Latin 50; M PLUS Code Latin 60; National Park; Nimbus Mono PS; Nimbus Roman;
Nimbus Sans; Nimbus Sans Narrow; Norasi; Noto Mono; Noto Sans; Noto Sans Display; Noto Sans Mono;
Noto Serif; Noto Serif Display; OCRA; OCRACondensed; OCR B; OSP-DIN; Oldania ADF Std; Old Standard TT;
Open Sans; Open Sans Condensed; Overlock; P052; Play; Playfair Display; Prociono; Px IBM CGA-2y; Px IBM MDA;
Px IBM VGA8; QTAgateType; QTAncientOlive; QTAntiquePost; QTAtchen; QTAvanti; QTBasker; QTBengal; QTBodini;
QTBodiniPoster; QTBookmann; QTCaslan; QTChicagoland; QTCloisteredMonk; QTDoghaus; QTEraType; QTEurotype;
QTFloraline; QTFraktur; QTFrank; QTFrankHeavy; QTFrizQuad; QTFuture; QTGraphLite; QTGraveure; QTGreece;
QTHeidelbergType; QTHelvet-Black; QTHelvetCnd; QTHelvetCnd-Black; QTHelvetCnd-Light; QTHoboken; QTJupiter;
QTKooper; QTKorrin; QTLetterGoth; QTLondonScroll; QTMilitary; QTOKCorral; QTOKCorral-Ext; QTOldGoudy;
QTOptimum; QTPalatine; QTPristine; QTSanDiego; QTSchoolCentury; QTVagaRound; QTWeise; Quercus; Quicksand;
Quicksand Light; Quicksand Medium; Rasa; Roadgeek 2014 Series B; Roadgeek 2014 Series C;
Roadgeek 2014 Series D; Roadgeek 2014 Series E; Roboto; Roboto Condensed; Roboto Slab; Romande ADF No2 Std;
Romande ADF Std; Routed Gothic; Routed Gothic Narrow; Routed Gothic Wide; STEP; STIX; STIXGeneral;
Solothurn; Sora; Source Code Pro; Source Serif Pro; Spectral; Spleen 12x24; Spleen 8x16; Switzera ADF;
TeX Gyre Adventor; TeX Gyre Bonum; TeX Gyre Cursor; TeX Gyre Heros; TeX Gyre Heros Cn; TeX Gyre Pagella;
TeX Gyre Schola; TeX Gyre Termes; Tinos; Tiresias Infofont;
Tiresias LPfont; Tiresias PCfont; Tiresias Signfont; Tlwg Mono; Tlwg Typewriter; Tlwg Typist; Tlwg Typo;
Tribun ADF Std; Tuffy; UM Typewriter; URW Bookman; URW Gothic; Universalis ADF Std; Verana; Verana Sans;
XCharter; Yanone Kaffeesatz; Yrsa; eurofurence; fbb; monofur; mononoki; okolaks; osifont
""".split(";")
)

# lower case drawn as capitals: only their capitals, digits and signs are used
CAPITALS = frozenset(
    name.strip()
    for name in """
Alegreya SC; Bebas Neue; IM FELL English SC; Marcellus SC; Mekanus ADF Titling Std; QTGraveure; QTGreece;
QTJupiter; QTMilitary
""".split(";")
)

# fixed pitch with slab serifs, as typewriters write; the Courier-like and Computer Modern ones share theirs
TYPEWRITERS = {
    "Compagnon": 4.0, "Courier 10 Pitch": 4.0, "GNUTypewriter": 4.0, "IBM Plex Mono": 4.0, "QTPristine": 4.0,
    "FreeMono": 3.0, "KpMono": 3.0, "UM Typewriter": 3.0, "CMU Typewriter Text": 3.0, "Latin Modern Mono": 3.0,
    "Nimbus Mono PS": 2.0, "TeX Gyre Cursor": 2.0, "Tlwg Typewriter": 2.0, "Tlwg Typist": 2.0, "Tlwg Typo": 2.0,
    "Tlwg Mono": 2.0, "Latin Modern Mono Light": 1.5, "Latin Modern Mono Light Cond": 1.0,
    "Linux Libertine Mono O": 1.0,
}  # fmt: skip
BLACKLETTER = frozenset(
    {"Gamaliel", "Hamlet", "Jessen", "QTCloisteredMonk", "QTFraktur", "QTHeidelbergType", "QTLondonScroll"}
)
# one design in many families, by how the names begin: together they weigh 1.5
ALIKE = (
    ("CMU ", "Latin Modern "), ("IndUni-",), ("Linux ",), ("M PLUS ",), ("Noto ",), ("DejaVu Serif", "DejaVu Sans"),
    ("Liberation Sans", "Arimo", "Nimbus Sans", "FreeSans", "TeX Gyre Heros", "QTHelvet"),
    ("Liberation Serif", "Tinos", "Nimbus Roman", "FreeSerif", "TeX Gyre Termes", "STIX", "STEP"),
    ("Averia ",), ("Tiresias ",), ("Roadgeek ",), ("Routed Gothic",), ("IBM 3270",), ("Px ", "Spleen "),
    ("Charis SIL", "XCharter"), ("Gentium ",), ("Quicksand",), ("Inter",),
    ("C059", "TeX Gyre Schola", "QTSchoolCentury"),
    ("P052", "TeX Gyre Pagella", "QTPalatine"), ("URW Bookman", "TeX Gyre Bonum", "QTBookmann"), ("Fanwood",),
    ("URW Gothic", "TeX Gyre Adventor", "QTAvanti"), ("Gillius ADF",), ("Accanthis ADF",), ("Ikarius ADF",),
    ("Romande ADF",), ("Antykwa Torunska",), ("Kurier",), ("OCRA",), ("QTOKCorral",), ("Yrsa", "Rasa"),
)  # fmt: skip

# characters that a family draws as something else
WRONG = {"QTLondonScroll": "ß"}

SKIPPED_STYLES = ("Thin", "Hairline", "ExtraLight", "UltraLight", "Smallcaps", "Keyboard", "Initials")


@dataclass(frozen=True)
class Face:
    """One font file that has every character of `BASIC`, but for the small letters in a face of capitals."""

    path: str
    family: str
    style: str
    characters: frozenset[str]


@functools.cache
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
        if names["family"] == "Compagnon" and names["style"] == "Italic":  # a script
            continue
        if any(style in names["style"] or style in path.stem for style in SKIPPED_STYLES):
            continue
        if other & names["all"]:
            raise ValueError(f"{path}: named {sorted(names['all'])}, which is on both sides of the split")
        characters = _drawable(path, names["cmap"]).difference(WRONG.get(names["family"], ""))
        needed = BASIC
        if names["family"] in CAPITALS:
            characters, needed = (frozenset(c for c in found if not c.islower()) for found in (characters, BASIC))
        if characters >= needed:
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


@functools.cache
def weight(family: str) -> float:
    """How often to draw a family against a usual one, which is 1: more of typewriters, less of its like."""
    if family in TYPEWRITERS:
        return TYPEWRITERS[family]
    if family in BLACKLETTER or family in CAPITALS:
        return 0.5
    for names in ALIKE:
        if family.startswith(names):
            alike = [name for name in TRAIN if name.startswith(names) and name not in TYPEWRITERS]
            return min(1.0, 1.5 / len(alike)) if alike else 1.0
    return 1.0


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
            try:
                mask = font.getmask(character)
            except OSError:  # "raster overflow": a broken outline
                continue
            if mask.getbbox() and bytes(mask) != missing:
                good.add(character)
    return frozenset(good)


def check_split() -> None:
    """No family is on both sides, and no name continues a name of the other side ("Go" and "Go Mono")."""
    for held in HELD_OUT:
        for train in TRAIN:
            if held == train or train.startswith(held + " ") or held.startswith(train + " "):
                raise ValueError(f"font split: {held!r} is held out and {train!r} is trained on")


def install_texlive() -> None:
    """Download texlive-fonts-extra and unpack `TEXLIVE_FOLDERS` under `TEXLIVE_TARGET`; needs root."""
    TEXLIVE_TARGET.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "texlive-fonts-extra"], cwd=folder, check=True)
        (package,) = Path(folder).glob("*.deb")
        members = [f"./usr/share/texlive/texmf-dist/fonts/{name}" for name in TEXLIVE_FOLDERS]
        unpack = ["tar", "x", "-C", str(TEXLIVE_TARGET), "--strip-components=6", *members]
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as archive:
            subprocess.run(unpack, stdin=archive.stdout, check=True)


check_split()

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", action="store_true", help="print the Debian packages and stop")
    parser.add_argument("--texlive", action="store_true", help="add faces of texlive-fonts-extra and stop; as root")
    options = parser.parse_args()
    if options.packages:
        print(" ".join(PACKAGES + TEXT_PACKAGES))
    elif options.texlive:
        install_texlive()
    else:
        for side in ("train", "held-out"):
            groups = by_family(faces(side))
            print(f"{side}: {len(groups)} families, {sum(map(len, groups.values()))} faces")
            for family, members in groups.items():
                gaps = "".join(sorted(set(ALPHABET) - frozenset.intersection(*(m.characters for m in members))))
                print(f"  {family}: {len(members)}" + (f", without {gaps}" if gaps else ""))
