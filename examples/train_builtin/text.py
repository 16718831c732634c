"""What the lines say: a seeded sampler of short texts, and the rule that keeps evaluation texts apart.

A word of the word lists belongs to evaluation when its hash says so (one word in ten), whatever its case; a
line that is not made of words (a price, a date, a code) belongs to evaluation by the hash of the whole
line. Training never draws either.
"""

import random
import string
import zlib
from functools import lru_cache
from pathlib import Path

DICTIONARIES = Path("/usr/share/dict")
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

HELD_OUT_SHARE = 10  # one in so many
MAX_LENGTH = 24


def held_out(text: str) -> bool:
    """Whether a word or a whole line is kept for evaluation."""
    return zlib.crc32(text.lower().encode()) % HELD_OUT_SHARE == 0


@lru_cache(maxsize=2)
def words(evaluation: bool) -> dict[str, list[str]]:
    """Words of one side that the alphabet can write, by language; "accented" is all with an accent."""
    allowed = set(ALPHABET)
    lists: dict[str, list[str]] = {"accented": []}
    for language in LANGUAGES:
        text = (DICTIONARIES / language).read_text(encoding="utf-8", errors="ignore")
        kept = [w for w in text.split() if 1 < len(w) <= MAX_LENGTH and set(w) <= allowed]
        lists[language] = [w for w in kept if held_out(w) == evaluation]
        lists["accented"] += [w for w in lists[language] if not w.isascii()]
    return lists


class Sampler:
    """Draws texts of 1 to `max_length` characters; the same seed gives the same texts."""

    def __init__(self, rng: random.Random, evaluation: bool, max_length: int = MAX_LENGTH) -> None:
        self.rng = rng
        self.evaluation = evaluation
        self.max_length = max_length
        self.words = words(evaluation)
        self.kinds = {
            self._words: 44,
            self._name: 8,
            self._amount: 11,
            self._date: 7,
            self._code: 11,
            self._sentence: 6,
            self._address: 2,
            self._characters: 0 if evaluation else 11,  # nobody photographs random characters
        }

    def text(self, characters: frozenset[str]) -> str:
        """One text that uses only `characters` (those of the font it will be drawn in)."""
        while True:
            kind = self.rng.choices(list(self.kinds), list(self.kinds.values()))[0]
            made_of_words = kind in (self._words, self._name, self._sentence)
            for _ in range(100):  # the same kind again, or evaluation would have few numbers
                line = kind(self.rng.randint(1, self.max_length))
                line = " ".join(line[: self.max_length].split())
                if not line or not set(line) <= characters:
                    continue
                if made_of_words or len(line) < 4 or held_out(line) == self.evaluation:
                    return line

    def _word(self) -> str:
        if self.rng.random() < 0.15:
            return self.rng.choice(self.words["accented"])
        language = self.rng.choices(list(LANGUAGES), list(LANGUAGES.values()))[0]
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
        for _ in range(40):
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
        return pick.choice(AMOUNTS).format(n=number, s=sign, n2=self._digits(1, 4), n3=self._digits(2, 4))[
            : max(length, 4)
        ]

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
        return pick.choice(fitting)

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
        if pick.random() < 0.5:
            length = min(length, 8)
        return "".join(pick.choice(pool) if pick.random() < 0.9 else " " for _ in range(length))
