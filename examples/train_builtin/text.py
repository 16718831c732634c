"""What the lines say: a seeded sampler of texts, and the rule that keeps evaluation texts apart.

A word of the word lists belongs to evaluation when its hash says so (one word in ten), whatever its case; so
does a paragraph of the prose. A line that is made of neither (a price, a date, a code, a letterhead) belongs
to evaluation by the hash of the whole line. Training never draws any of these.
"""

import gzip
import html
import itertools
import random
import re
import string
import subprocess
import unicodedata
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

PACKAGES = """
bible-kjv bible-kjv-text debian-handbook fortune-anarchism fortunes fortunes-br fortunes-de fortunes-es
fortunes-it fortunes-min miscfiles
""".split()

DICTIONARIES = Path("/usr/share/dict")
FORTUNES = Path("/usr/share/games/fortunes")
HANDBOOK = Path("/usr/share/doc/debian-handbook/html")
MISC = Path("/usr/share/misc")
OTHER_PROSE = (Path("/usr/share/common-licenses"), Path("/usr/share/state"))
LANGUAGES = {  # word list: how often it is used
    "american-english": 4, "british-english": 2, "french": 3, "ngerman": 3, "spanish": 2, "italian": 2,
    "portuguese": 1, "dutch": 1, "swedish": 1, "danish": 1, "bokmaal": 1,
}  # fmt: skip

BASIC = frozenset(string.ascii_letters + string.digits + " .,:-")
ACCENTED = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÐÑÒÓÔÕÖØÙÚÛÜÝÞßàáâãäåæçèéêëìíîïðñòóôõöøùúûüýþÿŒœŠšŽžŸ"
SIGNS = "€£¥¢§°©®±×÷«»¿¡–—‘’“”„…·•™ªº²³½¼¾µ"
ALPHABET = string.digits + string.ascii_letters + string.punctuation + " " + ACCENTED + SIGNS

ENDINGS = [
    "{}.", "{},", "{}:", "{};", "{}!", "{}?", "({})", '"{}"', "'{}'", "“{}”", "«{}»", "{}...", "{}…",
    "[{}]", "¿{}?", "¡{}!", "{}*", "{} –", "– {}", "• {}", "„{}“", "‘{}’", "#{}", "@{}", "<{}>",
    "{{{}}}", "~{}", "{}®",
]  # fmt: skip
AMOUNTS = [
    "{n}", "{s}{n}", "{s} {n}", "{n} {s}", "{n}{s}", "-{n}", "+{n}", "±{n}", "{n}%", "{n} kg",
    "{n} CHF", "EUR {n}", "Total {n}", "Total: {s}{n}", "No. {n}", "Nº {n}", "x{n}", "{n} m²",
    "{n} km/h", "{n} cm", "({n})", "#{n}", "{n} × {n2}", "{n} = {n2}", "{n2}/{n}", "+{n2} {n}",
    "{n2} {n} {n3}", "½ {n}", "{n} g", "{n} ml", "~{n}",
]  # fmt: skip

PROSE = {  # source: how often it is used; half is English
    "bible": 18, "fortunes": 28, "handbook/en-US": 5, "other": 4, "fortunes/de": 8, "handbook/de-DE": 3,
    "handbook/fr-FR": 11, "fortunes/es": 5, "handbook/es-ES": 2, "fortunes/it": 5, "handbook/it-IT": 2,
    "fortunes/br": 3, "handbook/pt-BR": 1, "handbook/nl-NL": 2, "handbook/sv-SE": 1, "handbook/da-DK": 1,
    "handbook/nb-NO": 1,
}  # fmt: skip

STATES = [
    "Cal.", "Mass.", "N. Y.", "Ill.", "Pa.", "Ohio", "Va.", "Ore.", "Wash.", "Conn.", "Mo.", "Ky.", "Tenn.", "Ga.",
    "La.", "D. C.", "N. J.", "Md.", "Mich.", "Wis.", "Minn.", "Ind.", "Kan.", "Neb.", "Tex.", "Colo.", "Vt.",
    "N. H.", "Me.", "R. I.", "Iowa", "Utah", "Nev.", "Ariz.", "Fla.", "England", "Germany", "France", "Canada",
]  # fmt: skip
MONTHS = (
    "January February March April May June July August September October November December "
    "Jan. Feb. Mar. Apr. Aug. Sept. Oct. Nov. Dec."
).split()
TITLES = [
    "Mr.", "Mrs.", "Miss", "Messrs.", "Hon.", "Dr.", "Prof.", "Rev.", "Col.", "Gen.", "Capt.", "Judge", "Pres.",
    "Professor", "President", "Senator", "Sir", "Madam", "Herrn", "Frau", "Monsieur", "Madame", "Signor", "Señor",
]  # fmt: skip
SHORT_NAMES = [
    "Wm.", "Geo.", "Chas.", "Jas.", "Thos.", "Jno.", "Jos.", "Robt.", "Saml.", "Benj.", "Edw.", "Fred'k", "Alex.",
]  # fmt: skip
STREETS = [
    "Street", "St.", "Avenue", "Ave.", "Road", "Place", "Square", "Lane", "Boulevard", "Terrace", "Court", "Drive",
]  # fmt: skip
NUMBERED = [
    "First", "Second", "Third", "Fourth", "Fifth", "Sixth", "Seventh", "Eighth", "Ninth", "Tenth", "11th", "12th",
    "14th", "21st", "22nd", "33rd", "42nd",
]  # fmt: skip
CLOSINGS = (
    ["Very", "Yours very", "Most", "Yours", "Ever", "Believe me,", "I am,", "I remain,"],
    ["sincerely", "truly", "respectfully", "cordially", "faithfully", "gratefully", "affectionately"],
    ["yours,", "yours.", "Yours,", ",", "yours"],
)
ROLES = [
    "President", "Secretary", "Treasurer", "Chairman", "Attorney at Law", "Attorneys and Counselors", "Manager",
    "Librarian", "Architect", "Notary Public", "Physician and Surgeon", "Superintendent", "Editor", "Vice-President",
    "Director", "Registrar", "Auditor", "Principal", "Agent", "Proprietor", "Stenographer", "Cashier", "Clerk",
]  # fmt: skip
BODIES = [
    "Company", "& Co.", "& Sons", "Bros.", "Bank", "Railway", "University", "College", "Society", "Library", "Club",
    "Hotel", "Press", "School", "Association", "Church", "Museum", "Insurance Co.", "Publishing Co.", "Committee",
    "Department", "Institute", "Trust Company", "Manufacturing Co.", "GmbH", "Ltd.", "S.A.", "Inc.",
]  # fmt: skip
OPENINGS = ["My dear", "Dear", "Dear", "Dear", "My Dear", "Lieber", "Liebe", "Cher", "Chère", "Caro", "Querido"]
FIELDS = [
    "Name", "Date", "Address", "City", "Tel.", "Phone", "Signature", "Amount", "No.", "Room", "Born", "Age", "Page",
    "Subject", "From", "To", "Re", "Datum", "Ort", "Betrag", "Nom", "Prénom", "Adresse", "Fecha", "Nombre", "Data",
    "Invoice", "Order", "Account", "Customer", "Qty", "Price", "Tax", "Weight", "Title", "Author", "Remarks",
]  # fmt: skip
PAPERS = ["Invoice", "Order", "Receipt", "Rechnung", "Facture", "Bill", "Contract", "File", "Ticket", "Cheque"]
# of the real lines that the project is measured on: no training text has them
FORBIDDEN = ("stanford", "duniway", "crossley", "ellinwood")

NOT_LETTERS = bytes(i for i in range(256) if not chr(i).isalpha())

HELD_OUT_SHARE = 10  # one in so many
MAX_LENGTH = 80


def held_out(text: str) -> bool:
    """Whether a word, a paragraph or a whole line is kept for evaluation."""
    return zlib.crc32(text.lower().encode()) % HELD_OUT_SHARE == 0


@lru_cache(maxsize=2)
def words(evaluation: bool) -> dict[str, list[str]]:
    """Words of one side that the alphabet can write, by language; "accented" is all with an accent."""
    allowed = set(ALPHABET)
    lists: dict[str, list[str]] = {"accented": []}
    for language in LANGUAGES:
        text = (DICTIONARIES / language).read_text(encoding="utf-8", errors="ignore")
        for name in FORBIDDEN:
            text = text.replace(name.title(), " ")
        # `held_out`, spelled out for half a million words
        lists[language] = [
            word
            for word, lower in zip(text.split(), text.lower().split(), strict=True)
            if (zlib.crc32(lower.encode()) % HELD_OUT_SHARE == 0) == evaluation
            and 1 < len(word) <= 24
            and (word.isascii() or allowed.issuperset(word))
        ]
        lists["accented"] += [w for w in lists[language] if not w.isascii()]
    return lists


@lru_cache(maxsize=2)
def names(evaluation: bool) -> dict[str, list[str]]:
    """Given names, family names and towns of one side; a name in "any" may be a place or a person."""
    lists = {"given": _zipped(DICTIONARIES / "propernames.gz").split()}
    lists["town"] = [part.split("\n")[0].strip() for part in _zipped(MISC / "cities.dat.gz").split("Name        :")[1:]]
    lists = {kind: [n for n in found if n and set(n) <= set(ALPHABET)] for kind, found in lists.items()}
    lists = {
        kind: [n for n in found if held_out(n) == evaluation and n.lower() not in FORBIDDEN]
        for kind, found in lists.items()
    }
    own = words(evaluation)["american-english"]
    lists["any"] = [w for w in own if w[0].isupper() and w[1:].islower() and len(w) > 3 and "'" not in w]
    return lists


@lru_cache(maxsize=2)
def prose(evaluation: bool) -> dict[str, list[str]]:
    """Paragraphs of one side by source (the keys of `PROSE`), whitespace as single spaces."""
    return {source: [p for p in found if held_out(p) == evaluation] for source, found in _paragraphs().items()}


@lru_cache(maxsize=1)
def _paragraphs() -> dict[str, list[str]]:
    """Every usable paragraph by source: real text, every character of it in the alphabet."""
    allowed = frozenset(ALPHABET)
    found: dict[str, list[str]] = {}
    for source in PROSE:
        kept = []
        for paragraph in _read(source):
            text = " ".join(unicodedata.normalize("NFC", paragraph).split())[:4000]
            # not a drawing, not a table, not a line of numbers
            if len(text) >= 20 and allowed.issuperset(text) and _letters(text) > 0.7 * len(text):
                kept.append(text)
        kept = [text for text in kept if not any(name in text.lower() for name in FORBIDDEN)]
        if not kept:
            raise FileNotFoundError(f"no prose of {source!r}: apt-get install the packages of text.py first")
        found[source] = kept
    return found


def _letters(text: str) -> int:
    """How many letters a text has, nearly: what Latin-1 lacks isn't counted."""
    return len(text.encode("latin-1", "ignore").translate(None, NOT_LETTERS))


def _read(source: str) -> Iterator[str]:
    """Raw paragraphs of one source."""
    kind, _, language = source.partition("/")
    if kind == "bible":
        lines = subprocess.run(
            ["bible", "-l9999", "Gen1:1-Rev22:21"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True
        ).stdout.split("\n")
        verses = [re.sub(r"^ *\d+ ", "", line) for line in lines if re.match(r" *\d+ ", line)]
        for i in range(0, len(verses), 4):
            yield " ".join(verses[i : i + 4])
    elif kind == "handbook":
        for path in sorted((HANDBOOK / language).glob("*.html")):
            for part in re.findall(r'<div class="para">(.*?)</div>', _text(path), re.DOTALL):
                yield html.unescape(re.sub(r"<[^>]*>", "", part))
    elif kind == "fortunes":
        folder = FORTUNES / language if language not in ("", "br") else FORTUNES
        for path in sorted(folder.glob("brasil*" if language == "br" else "*")):
            # the links of the Italian package lead to another language; .dat and .u8 are an index and a link
            plain = path.is_file() and not path.is_symlink() and path.suffix in ("", ".fortunes")
            if plain and (language or path.name != "brasil"):
                yield from re.split(r"\n%+\n", _text(path))
    else:
        for folder in OTHER_PROSE:
            for path in sorted(folder.glob("*")):
                if path.is_file() and not path.is_symlink():
                    yield from re.split(r"\n\s*\n", _zipped(path) if path.suffix == ".gz" else _text(path))


def _text(path: Path) -> str:
    """The file as UTF-8, or nothing: other encodings and binary files aren't guessed."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _zipped(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")


class Sampler:
    """Draws texts of 1 to `max_length` characters; the same seed gives the same texts."""

    def __init__(self, rng: random.Random, evaluation: bool, max_length: int = MAX_LENGTH) -> None:
        self.rng = rng
        self.evaluation = evaluation
        self.max_length = max_length
        self.words = words(evaluation)
        self.names = names(evaluation)
        self.prose = prose(evaluation)
        self.kinds = {
            self._prose: 40,
            self._words: 14,
            self._letter: 14,
            self._name: 4,
            self._amount: 5,
            self._date: 3,
            self._code: 6,
            self._form: 6,
            self._sentence: 2,
            self._address: 2,
            self._characters: 0 if evaluation else 4,  # nobody photographs random characters
        }
        self.shares = list(itertools.accumulate(self.kinds.values()))
        self.languages = list(itertools.accumulate(LANGUAGES.values()))
        self.sources = list(itertools.accumulate(PROSE.values()))

    def text(self, characters: frozenset[str]) -> str:
        """One text that uses only `characters` (those of the font it will be drawn in)."""
        capitals = "a" not in characters  # a face of capitals only
        for _ in range(200):
            kind = self.rng.choices(list(self.kinds), cum_weights=self.shares)[0]
            made_of_words = kind in (self._prose, self._words, self._name, self._sentence)
            length = self._length()  # one for all tries: the hash rule mustn't prefer a length
            for _ in range(100):  # the same kind again, or evaluation would have few numbers
                line = kind(length)
                while len(line) + 10 < length and self.rng.random() < 0.7:  # things share a line: a date and a sum
                    other = self.rng.choices((kind, self._words, self._prose), (5, 2, 0 if made_of_words else 1))[0]
                    line += " " + other(length - len(line) - 1)
                line = " ".join((line.upper() if capitals else line)[: self.max_length].split())
                if not line or not characters.issuperset(line):
                    continue
                if made_of_words or len(line) < 4 or held_out(line) == self.evaluation:
                    return line
        raise ValueError(f"no text of 1 to {self.max_length} characters can be written with {sorted(characters)}")

    def _length(self) -> int:
        """How long the next line should be: labels, lines of columns and full lines; about 30 on average."""
        low, high = self.rng.choices(((1, 24), (8, 52), (40, 80)), (2, 2, 1))[0]
        return min(self.rng.randint(low, high), self.max_length)

    def _prose(self, length: int) -> str:
        """A run of whole words of a real paragraph, now and then with a word broken at the line's end."""
        pick = self.rng
        source = self.prose[pick.choices(list(PROSE), cum_weights=self.sources)[0]]
        for _ in range(6):  # a short saying seldom fills a long line
            paragraph = pick.choice(source)
            if len(paragraph) >= length:
                break
        start, length = 0, min(length + 3, self.max_length)  # the last word is cut, half of it on average
        if len(paragraph) > length and pick.random() < 0.85:  # most lines begin somewhere inside
            start = paragraph.find(" ", pick.randint(0, len(paragraph) - length)) + 1
        line = paragraph[start : start + length + 1]
        if len(line) > length:  # it goes on
            line, _, cut = line.rpartition(" ") if " " in line else (line[:length], "", "")
            if len(cut) > 4 and cut.isalpha() and pick.random() < 0.35:
                line = f"{line} {cut[: pick.randint(2, len(cut) - 2)]}-"
        style = pick.random()
        if style < 0.80:
            return line
        if style < 0.92:
            return line.upper() if "ß" not in line else line
        if style < 0.95:
            return line.lower()
        return line[:1].upper() + line[1:] if style < 0.98 else string.capwords(line)

    def _word(self) -> str:
        if self.rng.random() < 0.15:
            return self.rng.choice(self.words["accented"])
        language = self.rng.choices(list(LANGUAGES), cum_weights=self.languages)[0]
        return self.rng.choice(self.words[language])

    def _cased(self, word: str) -> str:
        style = self.rng.random()
        if style < 0.45:
            return word
        if style < 0.70:
            return word[:1].upper() + word[1:]
        # "ß".upper() is two letters: such words stay as they are
        return word.upper() if style < 0.93 and len(word.upper()) == len(word) else word.title()

    def _words(self, length: int) -> str:
        upper = self.rng.random() < 0.2
        line = self._cased(self._word())
        for _ in range(60):
            if len(line) >= length:
                break
            word = self._word() if self.rng.random() < 0.3 else self._cased(self._word())
            glue = self.rng.choices([" ", "-", ", ", " & ", "/", ": ", ". "], [40, 2, 3, 1, 1, 1, 1])[0]
            if len(line) + len(glue) + len(word) <= length + 2:
                line += glue + word
        if upper and len(line.upper()) == len(line):
            line = line.upper()
        return self._ending(line) if self.rng.random() < 0.25 else line

    def _ending(self, line: str) -> str:
        return self.rng.choice(ENDINGS).format(line)

    def _sentence(self, length: int) -> str:
        line = self._word()
        while len(line) < length:
            line += " " + self._word()
        line = line[0].upper() + line[1:]
        return line[: max(1, length - 1)].rstrip() + self.rng.choice(".,:;!?-") if length > 2 else line[:length]

    def _name(self, length: int) -> str:
        pick = self.rng
        initial = f"{pick.choice(string.ascii_uppercase)}. " if pick.random() < 0.4 else ""
        title = pick.choice(["Dr. ", "Mr ", "Mrs ", "Prof. ", "St. ", "Mme ", "Herr "]) if pick.random() < 0.25 else ""
        names = [self._word().title() for _ in range(1 if length < 9 else 2)]
        joint = pick.choice([" ", " ", " ", "-", " & ", " de ", " von ", "'"])
        return title + initial + joint.join(names)

    def _digits(self, low: int, high: int) -> str:
        return "".join(self.rng.choice(string.digits) for _ in range(self.rng.randint(low, high)))

    def _amount(self, length: int) -> str:
        pick = self.rng
        value = pick.randint(0, 10 ** pick.randint(1, 6))
        form = pick.choice(["{:d}", "{:d}.{c}", "{:d},{c}", "{:,d}.{c}", "{:,d}", "{:d}.-", "{:d},–"])
        number = form.format(value, c=self._digits(2, 2))
        if pick.random() < 0.2:
            number = number.replace(",", " ") if pick.random() < 0.5 else number.replace(",", "'")
        sign = pick.choice("€€$$££¥¢%°")
        line = pick.choice(AMOUNTS).format(n=number, s=sign, n2=self._digits(1, 4), n3=self._digits(2, 4))
        if length < 16 or pick.random() < 0.4:
            return line[: max(length, 4)]
        # a row of a table, or the line of a receipt
        if pick.random() < 0.5:
            return self._joined(lambda: self._amount(0 if pick.random() < 0.1 else 12), length)
        count = pick.choice(["", "", f"{pick.randint(1, 24)} x ", f"{pick.randint(1, 9)}× ", f"{pick.randint(1, 99)} "])
        thing = self._joined(self._word, pick.randint(6, max(7, length - len(line) - len(count))))
        return count + (thing[:1].upper() + thing[1:] if pick.random() < 0.8 else thing.upper()) + " " + line

    def _joined(self, part, length: int, glue: str = " ") -> str:
        """Parts one after the other while they fit; at least one."""
        line = part()
        for _ in range(12):
            more = glue + part()
            if len(line) + len(more) > length:
                break
            line += more
        return line

    def _date(self, length: int) -> str:
        pick = self.rng
        day, month, year = pick.randint(1, 31), pick.randint(1, 12), pick.randint(1850, 2049)
        word = pick.choice("Jan Feb Mar Apr May June July Aug Sept Oct Nov Dec März mai août octobre décembre".split())
        forms = [
            f"{day:02d}.{month:02d}.{year}",
            f"{day}/{month}/{year % 100:02d}",
            f"{year}-{month:02d}-{day:02d}",
            f"{day} {word} {year}",
            f"{word} {day}, {year}",
            f"{pick.randint(0, 23):02d}:{pick.randint(0, 59):02d}",
            f"{pick.randint(1, 12)}:{pick.randint(0, 59):02d} {pick.choice(['am', 'pm', 'AM', 'PM'])}",
            f"© {year}",
            f"{day}. {word}",
            f"{year}-{month:02d}-{day:02d} {pick.randint(0, 23):02d}:{pick.randint(0, 59):02d}",
            f"{month:02d}/{year % 100:02d}",
            f"{word.upper()} {year}",
            f"{year}–{year + pick.randint(1, 60)}",
        ]
        fitting = [form for form in forms if len(form) <= max(length, 5)]
        line = pick.choice(fitting)
        return line if length < 20 or pick.random() < 0.6 else f"{line} {self._joined(self._word, length - len(line))}"

    def _code(self, length: int) -> str:
        pick = self.rng
        sets = [
            string.ascii_uppercase + string.digits,
            string.digits,
            string.hexdigits[:16],
            string.ascii_uppercase,
            string.ascii_letters + string.digits,
        ]
        letters, joint = pick.choice(sets), pick.choice(["-", "-", "", " ", "/", ".", "_", ":"])
        line = pick.choice(["", "", "", "SN ", "No ", "Ref ", "ID: ", "Lot ", "A-", "#", "(", "PO-"])
        line += "".join(pick.choice(letters) for _ in range(pick.randint(1, 6)))
        length = min(length, pick.randint(4, 40))  # nobody reads codes of a whole line
        while len(line) < length:
            line += joint + "".join(pick.choice(letters) for _ in range(pick.randint(1, 6)))
        return line[: max(length, 1)].rstrip("-/._:")

    def _address(self, length: int) -> str:
        pick = self.rng
        word = self._word().lower()
        forms = [
            f"www.{word}.{pick.choice(['com', 'de', 'fr', 'org', 'eu'])}",
            f"{word}@{self._word().lower()}.net",
            f"{self._word().title()} {pick.randint(1, 250)}",
            f"{self._digits(4, 5)} {word.title()}",
            f"https://{word}",
            f"{word}_{pick.randint(1, 99)}.txt",
            f"{word}={pick.randint(0, 99)}",
        ]
        return pick.choice(forms)

    def _form(self, length: int) -> str:
        """Lines of forms and bills: labels with values, references with dates."""
        pick = self.rng

        def field() -> str:
            value = pick.choice(
                [self._person, lambda: self._date(12), lambda: self._amount(10), self._word, self._town]
            )
            blank = pick.random() < 0.08
            return f"{pick.choice(FIELDS)}{pick.choice([': ', ': ', ' ', '. '])}{'____' if blank else value()}"

        if pick.random() < 0.6:
            return self._joined(field, length, pick.choice([" ", " ", ", ", " / ", "; "]))
        number = f"{pick.choice(['No.', 'Nr.', 'N°', '#', 'Nº', ''])} {self._digits(2, 7)}"
        line = (
            f"{pick.choice(PAPERS)} {number} {pick.choice(['of', 'dated', 'vom', 'du', 'from', '-'])} {self._date(12)}"
        )
        return line if len(line) + 8 > length else f"{line}, {self._joined(self._word, length - len(line) - 2)}"

    def _family(self) -> str:
        return self.rng.choice(self.names["any"])

    def _town(self) -> str:
        return self.rng.choice(self.names["town" if self.rng.random() < 0.6 else "any"])

    def _person(self) -> str:
        """A person as letters write one: "Hon. Wm. T. Surname", "Mrs. Given A. Surname"."""
        pick = self.rng
        style = pick.random()
        given = pick.choice(self.names["given"])
        if style < 0.2:
            given = pick.choice(SHORT_NAMES)
        elif style < 0.5:
            given = pick.choice(string.ascii_uppercase) + "."
        title = pick.choice(TITLES) + " " if pick.random() < 0.5 else ""
        middle = pick.choice(string.ascii_uppercase) + ". " if pick.random() < 0.6 else ""
        return f"{title}{given} {middle}{self._family()}"

    def _letter(self, length: int) -> str:
        """Lines of correspondence: heads, addresses, dates, greetings and closings of letters, and their rows."""
        pick = self.rng
        forms = [
            self._letter_person, self._letter_person, self._letter_place, self._letter_date, self._letter_greeting,
            self._letter_closing, self._letter_street, self._letter_room, self._letter_phone, self._letter_body,
            self._letter_role,
        ]  # fmt: skip
        line = pick.choice(forms)()
        for _ in range(5):
            more = pick.choice(forms)()
            if pick.random() < 0.1 or len(line) + 2 >= length:
                break
            if len(line) + len(more) + 2 > length:
                continue
            line = line.rstrip(".,:") + pick.choice([", ", ", ", " ", ". ", " - "]) + more
        style = pick.random()
        return line if style < 0.72 else line.upper() if style < 0.95 else line.lower()

    def _letter_person(self) -> str:
        return self._person() + self.rng.choice(
            [",", ",", "", ".", ", " + self.rng.choice(["Esq.", "Jr.", "Ph. D.", "M. D."])]
        )

    def _letter_place(self) -> str:
        line = f"{self._town()}, {self.rng.choice(STATES)}" + self.rng.choice([",", "", "", "."])
        return line.replace("..", ".")

    def _letter_date(self) -> str:
        pick = self.rng
        day, year = pick.randint(1, 31), pick.randint(1860, 1960)
        month = pick.choice(MONTHS)
        ending = pick.choice([".", "", ","])
        forms = [
            f"{month} {day}, {year}",
            f"{month} {day}{pick.choice(['th', 'st', 'd', 'rd'])}, {year}",
            f"{day} {month} {year}",
        ]
        line = pick.choice([*forms, forms[0], forms[0], f"{month} {day}"]) + ending
        return f"{self._town()}, {line}" if pick.random() < 0.3 else line

    def _letter_greeting(self) -> str:
        pick = self.rng
        if pick.random() < 0.15:
            return pick.choice(["Dear Sir", "Dear Sirs", "Gentlemen", "My dear Sir", "Dear Madam"]) + pick.choice(
                ",:;-"
            )
        who = self.rng.choice(self.names["given"]) if pick.random() < 0.3 else f"{pick.choice(TITLES)} {self._family()}"
        return f"{pick.choice(OPENINGS)} {who}" + pick.choice([",", ",", ":", ":-", ";"])

    def _letter_closing(self) -> str:
        line = " ".join(map(self.rng.choice, CLOSINGS)).replace(" ,", ",")
        return line if self.rng.random() < 0.6 else f"{line} {self._person()}"

    def _letter_street(self) -> str:
        pick = self.rng
        name = pick.choice(NUMBERED) if pick.random() < 0.35 else self._family()
        part = pick.choice(["", "", "", ", N. W.", ", S. E.", ", West", " N.", " East"])
        return f"{pick.randint(1, 2999)} {name} {pick.choice(STREETS)}{part}" + pick.choice([",", "", ".", ","])

    def _letter_room(self) -> str:
        pick = self.rng
        label = pick.choice(["Room", "Rooms", "Suite", "Office", "Floor", "Box", "P. O. Box", "Apt."])
        room = f"{label} {pick.randint(1, 999)}"
        where = f"{self._family()} {pick.choice(['Building', 'Bldg.', 'Block', 'House', 'Hall', 'Hotel', 'Chambers'])}"
        return pick.choice([f"{room}, {where}", f"{room}, {where}", where, room, f"{pick.randint(1, 999)} {where}"])

    def _letter_phone(self) -> str:
        pick = self.rng
        label = pick.choice(
            ["Telephone", "Tel.", "Phone", "Telephone No.", "Cable Address:", "Long Distance", "Private Exchange"]
        )
        return f"{label} {self._family() + ' ' if pick.random() < 0.6 else ''}{pick.randint(1, 9999)}"

    def _letter_body(self) -> str:
        pick = self.rng
        line = f"{self._family()} {pick.choice(BODIES)}"
        if pick.random() < 0.4:
            line = f"{self._family()}, {line}" if pick.random() < 0.4 else f"{self._town()} {line}"
        return (
            line if pick.random() < 0.8 else f"{pick.choice(['The', 'Office of', 'Office of the', 'From the'])} {line}"
        )

    def _letter_role(self) -> str:
        line = self.rng.choice(ROLES)
        return line if self.rng.random() < 0.3 else f"{self._person()}, {line}" + self.rng.choice(["", ".", ","])

    def _characters(self, length: int) -> str:
        """No language at all, so that every character is seen and the decoder can't only guess."""
        pick = self.rng
        pool = pick.choice(
            [
                ALPHABET,
                string.ascii_letters + string.digits,
                ACCENTED + string.ascii_letters,
                SIGNS + string.punctuation,
            ]
        )
        length = min(length, pick.choice((8, 16, 30)))
        return "".join(pick.choice(pool) if pick.random() < 0.9 else " " for _ in range(length))
