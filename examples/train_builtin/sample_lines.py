"""Draws `examples/lines/`: printed lines in held-out fonts, many colours, file formats and modes.

    python examples/train_builtin/sample_lines.py [--out examples/lines]

Each row of LINES is one picture: file name, text, family and style, size, colours, what happens to it,
picture mode. The same script gives the same pictures (with the same fonts and Pillow); rows are added at the end,
since all of them share one random stream.
"""

import argparse
import random
from pathlib import Path

import fonts
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

BLACK, WHITE = "#000000", "#ffffff"
LINES = [
    # file, text, family, style, size, ink, paper, degradation, mode
    ("invoice.png", "Invoice 2041", "PT Sans", "Bold", 26, BLACK, WHITE, "", "RGB"),
    ("price_euro.png", "€ 1.249,00", "Clear Sans", "Regular", 28, "#1a1a1a", "#f7f7f2", "", "RGB"),
    ("station.jpg", "Zürich HB", "Cabin", "Regular", 32, "#ffffff", "#1f3d7a", "", "RGB"),
    ("avenue.png", "CHAMPS-ÉLYSÉES", "PT Sans Caption", "Bold", 24, "#f2f2f2", "#14532d", "", "RGB"),
    ("letter_date.jpg", "12 March 2024", "PT Serif", "Regular", 27, "#222222", "#efe6d0", "blur", "RGB"),
    ("serial.png", "SN 7F3K-2290-QX", "Go Mono", "Regular", 22, "#202020", "#d8d8d8", "", "L"),
    ("total.png", "Total: $58.20", "Oxygen-Sans", "Sans-Bold", 24, BLACK, WHITE, "", "1"),
    ("spanish.webp", "Niño y señora", "Vollkorn", "Regular", 30, "#3b2a1a", "#f4ecd8", "", "RGB"),
    ("shoe_size.png", "Größe 42", "Go", "Regular", 28, "#7a1020", WHITE, "", "P"),
    ("quote.png", "Garçon, l'addition!", "Caladea", "Italic", 27, BLACK, WHITE, "", "RGBA"),
    ("platform.gif", "Platform 9", "B612", "Bold", 26, "#ffd54a", "#101010", "", "P"),
    ("timestamp.bmp", "2023-11-05 08:45", "B612 Mono", "Regular", 20, "#0a0a0a", "#ffffff", "", "RGB"),
    ("doctor.tiff", "Dr. A. Meyer", "Quattrocento", "Regular", 29, "#111111", "#fbfbfb", "", "L"),
    ("pound.jpg", "£3.75 each", "Inconsolata", "Medium", 26, "#003366", "#fff7cc", "noise", "RGB"),
    ("sign.png", "NO ENTRY", "PT Sans Narrow", "Bold", 34, WHITE, "#b3121d", "", "RGB"),
    ("company.png", "Møller & Søn", "EB Garamond", "12 Regular", 32, "#101010", "#ffffff", "", "L"),
    ("address.jpg", "Rua São João, 17", "PT Serif Caption", "Regular", 24, "#2b2b2b", "#e4e9ee", "noise", "RGB"),
    ("expiry.png", "Best before 06/27", "Courier Prime", "Light", 24, "#1c1c1c", "#f0f0f0", "blur", "L"),
    ("lot.tif", "Lot No. B-00918", "PT Mono", "Regular", 22, BLACK, WHITE, "", "1"),
    ("swedish.png", "Smörgåsbord", "Caladea", "Bold", 30, "#004b87", "#ffcd00", "", "RGB"),
    ("chapter.png", "Chapter Twelve", "EB Garamond", "12 Italic", 34, "#000000", "#ffffff", "", "LA"),
    ("phone.png", "+44 20 7946 0018", "Clear Sans", "Regular", 23, "#e8e8e8", "#2a2a2e", "", "RGB"),
    ("menu.jpg", "crème brûlée", "Vollkorn", "Italic", 31, "#40241a", "#f1e3c6", "", "CMYK"),
    ("sale.webp", "50% OFF", "Cabin", "Bold", 36, "#ffffff", "#c2185b", "", "RGBA"),
    ("gate.png", "Gate A14 (north)", "Oxygen-Sans", "Sans-Book", 25, "#1d1d1d", "#e9e9e9", "low", "RGB"),
    ("city.png", "WIEN MITTE", "B612", "Regular", 27, WHITE, "#0b4a8f", "", "RGB"),
    ("isbn.png", "ISBN 978-3-16", "Go Mono", "Bold", 22, "#151515", "#fafafa", "", "I;16"),
    ("figure.png", "fig. 7: results", "Quattrocento", "Regular", 28, "#181818", "#ffffff", "blur", "RGB"),
    ("hello.jpg", "Hello, world!", "PT Sans", "Regular", 30, "#263238", "#eceff1", "", "L"),
    ("french.tiff", "à bientôt", "Cabin", "Italic", 30, "#1b1b1b", "#fdf6e3", "", "RGB"),
    ("church.png", "Rue de l'Église 5", "Go", "Italic", 25, "#0c0c0c", "#ffffff", "noise", "L"),
    ("milestone.bmp", "KM 128", "Clear Sans", "Bold", 30, "#222222", "#d9c9a3", "", "P"),
    (
        "receipt.jpg", "3 x Oat biscuits 250 g 2.19 6.57 EUR",
        "B612 Mono", "Regular", 20, "#4a4a52", "#f4f4f0", "noise low", "L",
    ),
    (
        "book.jpg", "along the quay the lamps were lit one after another, and nobody spo-",
        "EB Garamond", "12 Regular", 30, "#1d1a16", "#e9dfc8", "light", "RGB",
    ),
    (
        "form.png", "Name: Hannah Okafor Date: 14/09/2031 Room: 212 B",
        "PT Sans", "Regular", 24, "#15233d", "#eef3ea", "underline", "P",
    ),
    (
        "typewriter.jpg", "We acknowledge with thanks your letter of the 9th inst., and beg",
        "Courier Prime", "Courier Prime", 25, "#2b2833", "#dfd5bd", "noise light", "RGB",
    ),
    ("label.png", "GRIMALDI & SONS, 48 HARBOUR STREET, BRISTOL BS1 6QN", "PT Serif", "Bold", 23, BLACK, WHITE, "", "L"),
    ("numbers.tif", "0471-B 0472-B 0475-C 0480-A 0483-F 0491-K", "Go Mono", "Regular", 21, BLACK, WHITE, "", "1"),
    (
        "ferry.webp", "The ferry leaves at half past six; pack your bags before the rain sets in.",
        "Clear Sans", "Regular", 22, "#f5f5f5", "#22313f", "", "RGB",
    ),
    (
        "autumn.png", "Después del otoño, el señor Núñez volvió a la estación con su perro.",
        "Vollkorn", "Regular", 27, "#2a211a", "#f1ead9", "blur", "L",
    ),
]  # fmt: skip
AROUND = {  # the lines above and below, of which the crop shows a part
    "book.jpg": (
        "The harbour clock had stopped at twenty minutes to four, and",
        "ke until the pilot came up the steps with his hat in his hand.",
    ),
    "form.png": ("REGISTRATION OF GUESTS", "Signature: ______________ Nights: 3"),
    "typewriter.jpg": ("Gentlemen:-", "to enclose herewith the plans which you so kindly lent us in"),
    "autumn.png": (
        "lloviendo en la ciudad vieja",
        "Nadie lo esperaba; el tren había llegado con dos horas de retraso,",
    ),
}  # fmt: skip


def draw(row: tuple, held_out: dict[str, list[fonts.Face]], rng: random.Random) -> Image.Image:
    """One line as an RGB picture, 20 to 60 pixels high, of its natural width."""
    name, text, family, style, size, ink, paper, degradation, _ = row
    # by the file's name, too: every face of Courier Prime is called Light
    face = next((f for f in held_out[family] if style in (f.style, Path(f.path).stem)), None)
    if face is None or not set(text) <= face.characters:
        raise ValueError(f"{family} {style}: no such held-out face, or it can't write {text!r}")
    font = fonts.load(face.path, size)
    ascent, descent = font.getmetrics()
    left, _, right, _ = font.getbbox(text)
    pads = [rng.randint(2, size // 2) for _ in range(2)] + [rng.randint(1, size // 5) for _ in range(2)]
    if name in AROUND:
        pads[2:] = rng.randint(size // 4, size // 2), rng.randint(size // 4, size // 2)
    picture = Image.new("RGB", (right - left + pads[0] + pads[1], ascent + descent + pads[2] + pads[3]), paper)
    pen = ImageDraw.Draw(picture)
    pen.text((pads[0] - left, pads[2]), text, fill=ink, font=font)
    for other, rows in zip(AROUND.get(name, ()), (-1, 1), strict=False):
        pen.text((pads[0] - left, pads[2] + rows * (ascent + descent)), other, fill=ink, font=font)
    effects = degradation.split()
    if "underline" in effects:
        row = pads[2] + ascent + size // 6
        pen.line((0, row, picture.width, row), fill=ink)
    if "light" in effects:
        picture = uneven_light(picture)
    if "blur" in effects:
        picture = picture.filter(ImageFilter.GaussianBlur(0.7))
    if "noise" in effects:
        noise = np.random.default_rng(rng.randrange(2**32)).normal(0, 9, (*picture.size[::-1], 1))  # [height, width, 1]
        picture = Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
    if "low" in effects:
        small = picture.resize((picture.width * 3 // 5, picture.height * 3 // 5), Image.Resampling.BOX)
        picture = small.resize(picture.size, Image.Resampling.BILINEAR)
    return picture


def uneven_light(picture: Image.Image) -> Image.Image:
    """Darker towards the right end, as a page near its spine, with the shadow of a fold."""
    place = np.linspace(0, 1, picture.width)[:, None]  # [width, 1]
    light = 1 - 0.3 * place**2 - 0.2 * np.exp(-(((place - 0.4) / 0.02) ** 2))
    return Image.fromarray((np.asarray(picture) * light).astype(np.uint8))


def in_mode(picture: Image.Image, row: tuple) -> Image.Image:
    """The picture in the mode of its row; with alpha the paper becomes transparent, the ink stays dark."""
    ink, mode = row[5], row[8]
    if mode in ("RGB", "L", "CMYK"):
        return picture.convert(mode)
    if mode == "1":
        return (
            picture.convert("L").point(lambda value: 255 if value > 140 else 0).convert("1", dither=Image.Dither.NONE)
        )
    if mode == "P":
        return picture.quantize(32)
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    coverage = 255 - np.asarray(picture.convert("L"))  # of dark ink on white paper
    if row[0] == "sale.webp":  # a coloured label: opaque, but with an alpha channel
        return picture.convert("RGBA")
    solid = Image.new("L" if mode == "LA" else "RGB", picture.size, ink)
    solid.putalpha(Image.fromarray(coverage))
    return solid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "lines")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    held_out = fonts.by_family(fonts.faces("held-out"))
    rng = random.Random(1912)
    for row in LINES:
        path = out / row[0]
        options = {"quality": 88} if path.suffix in (".jpg", ".webp") else {}
        if path.suffix in (".tif", ".tiff") and row[8] != "1":
            options = {"compression": "tiff_lzw"}
        in_mode(draw(row, held_out, rng), row).save(path, **options)
        path.with_suffix(".gt.txt").write_text(row[1] + "\n", encoding="utf-8")
    print(f"{len(LINES)} lines in {out}")


if __name__ == "__main__":
    main()
