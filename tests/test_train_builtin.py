"""The recipe of the built-in model, as far as it goes without the fonts and word lists that training needs."""

import importlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from trocr_fast.image_config import ImageConfig
from trocr_fast.images import ImageProcessor

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "train_builtin"
MODULES = ("text", "fonts", "ink", "paper", "render", "model", "train", "export", "sample_lines", "draw_outside")


@pytest.fixture(scope="module")
def recipe() -> Iterator[SimpleNamespace]:
    """The recipe's files as modules. They import each other by plain names, which must not stay importable."""
    sys.path.insert(0, str(FOLDER))
    try:
        modules = {name: importlib.import_module(name) for name in MODULES}
        yield SimpleNamespace(**modules)
    finally:
        sys.path.remove(str(FOLDER))
        for path in FOLDER.glob("*.py"):
            sys.modules.pop(path.stem, None)


@pytest.fixture(scope="module")
def face(recipe: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> object:
    """The font inside Pillow, as a file."""
    path = tmp_path_factory.mktemp("font") / "pillow.ttf"
    path.write_bytes(ImageFont.load_default(20).font_bytes)
    characters = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:-")
    return recipe.fonts.Face(str(path), "Pillow", "Regular", characters)


@pytest.fixture
def small_lists(recipe: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`text` with a few words in place of the Debian packages."""
    text = recipe.text
    stems = [a + b + c for a in ("ka", "lo", "mi", "ne", "su") for b in ("ta", "ri", "po", "du") for c in ("n", "ra")]

    def side(evaluation: bool) -> list[str]:
        return [
            word for word in (*stems, *(stem.title() + "ek" for stem in stems)) if text.held_out(word) is evaluation
        ]

    lists = {
        "words": lambda evaluation: {name: side(evaluation) for name in (*text.LANGUAGES, "accented")},
        "names": lambda evaluation: {name: side(evaluation) for name in ("given", "town", "any")},
        "prose": lambda evaluation: {name: [" ".join(side(evaluation) * 20)] for name in text.PROSE},
    }
    for name, made in lists.items():
        monkeypatch.setattr(text, name, made)
    return text


def test_tokens_are_characters_and_come_back(recipe: SimpleNamespace) -> None:
    model, alphabet = recipe.model, recipe.text.ALPHABET
    assert len(set(alphabet)) == len(alphabet) == len(model.VOCABULARY) - len(model.SPECIAL)
    assert model.decode(model.encode(alphabet)) == alphabet
    assert model.decode([model.EOS, *model.encode("a b"), model.EOS, model.PAD]) == "a b"
    recipe.export.check_tokens(model.processor())


def test_lines_and_their_end_fit_the_model(recipe: SimpleNamespace) -> None:
    model, longest = recipe.model, recipe.text.MAX_LENGTH
    columns = model.IMAGE_SIZE[1] // model.PATCH_SIZE[1]
    assert model.PATCH_SIZE[0] == model.IMAGE_SIZE[0] and columns * model.PATCH_SIZE[1] == model.IMAGE_SIZE[1]
    assert longest < columns  # CTC needs a column for each character, and more where one is doubled
    assert longest + 2 <= model.MAX_LENGTH <= model.MAX_POSITIONS


def test_training_sees_the_pixels_that_reading_sees(recipe: SimpleNamespace, tmp_path: Path) -> None:
    recipe.model.processor().image_processor.save_pretrained(tmp_path)
    reader = ImageProcessor(ImageConfig.from_folder(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (37, 411, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    trained_on = recipe.train.to_pixels(np.stack([recipe.render.squash(picture, *recipe.model.IMAGE_SIZE)]))
    read = reader.normalise(torch.from_numpy(reader.load(picture)[None]))
    torch.testing.assert_close(trained_on, read, rtol=0, atol=1e-6)


def test_a_larger_model_starts_as_the_smaller_one_ended(
    recipe: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = recipe.model
    sizes = {"width": 24, "encoder_layers": 1, "decoder_layers": 1, "heads": 2}
    monkeypatch.setattr(model, "IMAGE_SIZE", (32, 96))
    monkeypatch.setattr(model, "PATCH_SIZE", (32, 6))
    torch.manual_seed(1)
    old = model.build(**sizes)
    monkeypatch.undo()
    new = model.build(**sizes)
    untrained = new.encoder.embeddings.position_embeddings.detach().clone()
    with torch.no_grad():
        old.encoder.embeddings.position_embeddings.add_(0.1)
    model.start_from(new, old.state_dict())

    # A picture that does not change from top to bottom looks the same to both, in the columns that both have.
    row = torch.rand(1, 3, 1, 96, generator=torch.Generator().manual_seed(2))
    height, width = model.IMAGE_SIZE
    wide = torch.nn.functional.pad(row, (0, width - 96)).expand(-1, -1, height, -1)
    with torch.no_grad():
        seen, expected = new.encoder.embeddings(wide), old.encoder.embeddings(row.expand(-1, -1, 32, -1))
    torch.testing.assert_close(seen[:, :17], expected, rtol=1e-4, atol=1e-4)  # the start token and 16 columns
    torch.testing.assert_close(new.encoder.embeddings.position_embeddings[:, 17:], untrained[:, 17:])
    for name, weight in old.decoder.state_dict().items():
        assert torch.equal(new.decoder.state_dict()[name], weight), name
    wider = model.build(**sizes | {"width": 36})
    with pytest.raises(RuntimeError, match="size"):
        model.start_from(wider, old.state_dict())


@pytest.fixture
def trainer(recipe: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a Trainer of a tiny model that works in `tmp_path`."""
    sizes = "--width 24 --encoder-layers 1 --decoder-layers 1 --heads 2 --batch 2 --learning-rate 0.01 --warmup 1"
    arguments = ["train.py", "--work", str(tmp_path), "--budget-minutes", "1", *sizes.split()]

    def make(*more: str):
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        return recipe.train.Trainer(recipe.train.parse())

    return make


class _Pool:
    """Two lines, always the same; a stand-in for the pool that renders."""

    def __init__(self, image_size: tuple[int, int]) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (2, *image_size, 3), dtype=np.uint8)

    def batch(self, count: int, max_length: int, rng: random.Random) -> tuple[np.ndarray, list[str]]:
        return self.images, ["ab", "cde 1"]


def test_a_stopped_run_goes_on_where_it_was(recipe: SimpleNamespace, trainer) -> None:
    pool, first = _Pool(recipe.model.IMAGE_SIZE), trainer()
    first.progress.joint, first.progress.guide_loss = True, 0.0  # the decoder and CTC, which wait at first
    losses = [first.step(pool) for _ in range(4)]
    assert losses[-1]["ctc"] < losses[0]["ctc"] and losses[-1]["ce"] < losses[0]["ce"]
    first.save()
    again = trainer()
    assert again.progress == first.progress and again.progress.step == 4
    assert again.rng.getstate() == first.rng.getstate()
    for _ in range(3):  # the optimiser's state shows from the second step on
        assert again.step(pool) == pytest.approx(first.step(pool), rel=1e-2)
    weights = recipe.export.trained(first.checkpoint.parent).state_dict()
    assert weights.keys() == first.model.state_dict().keys()  # without the CTC head


def test_columns_are_told_their_letters_until_ctc_begins(recipe: SimpleNamespace, trainer) -> None:
    def over(text: str) -> str:
        return recipe.model.decode(recipe.train.letters_over([text], 20)[0].tolist())

    assert over("a") == "a" * 20 and over("abcd") == "a" * 5 + "b" * 5 + "c" * 5 + "d" * 5
    assert over("iM").count("i") < 8 < 12 < over("iM").count("M") and over("iM").startswith("i")

    pool, run = _Pool(recipe.model.IMAGE_SIZE), trainer("--guide-above", "5")
    seen = [run.step(pool) for _ in range(60)]
    guided = [losses for losses in seen if "guide" in losses]
    assert 5 < len(guided) < 55 and seen[: len(guided)] == guided
    assert guided[-1]["guide"] < guided[0]["guide"] / 2  # these are learned
    assert seen[-1]["ctc"] < guided[-1]["ctc"] / 2  # and only then CTC
    assert run.progress.guide_loss <= 5 < 9


def test_a_first_run_may_be_on_smaller_pictures_and_shorter_lines(recipe: SimpleNamespace, trainer) -> None:
    small = trainer("--image-size", "32", "384", "--max-length", "24")
    assert "guide" in small.step(_Pool((32, 384)))
    small.save()
    larger = small.checkpoint.rename(small.checkpoint.with_name("small.pt"))
    assert "ctc" in trainer("--start-from", str(larger)).step(_Pool(recipe.model.IMAGE_SIZE))


def test_a_run_from_anothers_weights_has_its_own_clock(recipe: SimpleNamespace, trainer, tmp_path: Path) -> None:
    first = trainer()
    first.progress.seconds, first.progress.step, first.progress.joint, first.progress.max_length = 50.0, 9, True, 24
    first.save()
    checkpoint = first.checkpoint.rename(tmp_path / "other.pt")
    begun = trainer("--start-from", str(checkpoint)).progress
    assert (begun.seconds, begun.step) == (0.0, 0) and (begun.joint, begun.max_length) == (True, 24)


def test_the_learning_rate_follows_the_clock(recipe: SimpleNamespace) -> None:
    train = recipe.train

    def rate(step: int, seconds: float) -> float:
        return train.learning_rate(train.Progress(step=step, seconds=seconds), 1e-3, budget=600, warmup=100)

    assert rate(0, 0) == pytest.approx(1e-5) and rate(99, 0) == pytest.approx(1e-3)
    assert rate(500, 300) == pytest.approx(0.505e-3)
    assert rate(500, 600) == rate(900, 1e6) == pytest.approx(1e-5)


def test_one_text_in_ten_is_kept_for_evaluation(recipe: SimpleNamespace) -> None:
    held_out = recipe.text.held_out
    kept = sum(held_out(f"line {number}") for number in range(5000)) / 5000
    assert kept == pytest.approx(0.1, abs=0.02)
    assert all(held_out(f"Total {number} àb") == held_out(f"TOTAL {number} ÀB") for number in range(200))


@pytest.mark.parametrize("evaluation", [False, True])
def test_texts_stay_on_their_side(small_lists: ModuleType, evaluation: bool) -> None:
    own = {word for words in small_lists.words(evaluation).values() for word in words}
    letters = frozenset("".join(own) + " ")
    sampler = small_lists.Sampler(random.Random(1), evaluation, max_length=40)
    for _ in range(100):
        line = sampler.text(letters)
        assert 1 <= len(line) <= 40 and letters.issuperset(line) and line == " ".join(line.split())
    # Lines that are made of no words at all, such as codes, are told apart as a whole.
    digits = [sampler.text(frozenset("0123456789 .,:-")) for _ in range(60)]
    assert all(small_lists.held_out(line) is evaluation for line in digits if len(line) >= 4)


def test_texts_are_seeded(small_lists: ModuleType) -> None:
    letters = frozenset(small_lists.ALPHABET)
    first, same, other = (
        [sampler.text(letters) for _ in range(50)]
        for sampler in (small_lists.Sampler(random.Random(seed), evaluation=False) for seed in (1, 1, 2))
    )
    assert first == same != other
    assert max(map(len, first)) <= small_lists.MAX_LENGTH


def test_no_family_is_on_both_sides(recipe: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    fonts = recipe.fonts
    fonts.check_split()
    for name in ("DejaVu Sans", "DejaVu", "Lato Medium"):
        monkeypatch.setattr(fonts, "HELD_OUT", frozenset({name}))
        with pytest.raises(ValueError, match=f"'{name}' is held out"):
            fonts.check_split()


@pytest.mark.parametrize("degrade", [0.0, 0.8])
def test_lines_are_drawn_the_same_again(recipe: SimpleNamespace, face: object, degrade: float) -> None:
    for seed in range(40):
        pictures = []
        for _ in range(2):
            rng = random.Random(seed)
            text = "Ab " * (1 + seed % 26)
            ink = recipe.ink.line_ink(text.strip(), face, ("above it", "below it"), rng, degrade)
            assert ink.dtype == np.float32 and ink.ndim == 2 and 0 <= ink.min() < 0.1 < ink.max() <= 1 + 1e-5
            pictures.append(recipe.paper.photograph(ink, rng, degrade))
        one, same = pictures
        assert one.mode == "RGB" and one.tobytes() == same.tobytes()
        assert one.width <= 2 * recipe.ink.LARGEST_WIDTH
        low, high = one.convert("L").getextrema()
        assert high - low > 15  # the text is to be seen


def test_lines_outside_are_longer_than_any_trained_on(recipe: SimpleNamespace) -> None:
    draw_outside = recipe.draw_outside
    sampler = SimpleNamespace(text=lambda characters: "some words, 12")
    longer = draw_outside.Longer(random.Random(3), sampler)
    lengths = [len(longer.text(frozenset())) for _ in range(300)]
    assert min(lengths) > recipe.text.MAX_LENGTH and 130 < max(lengths) <= draw_outside.LONGEST
    for words in (draw_outside.GREEK, draw_outside.CYRILLIC):
        assert not set("".join(words)) & set(recipe.text.ALPHABET)
    assert all(set(word) - set(recipe.text.ALPHABET) for word in draw_outside.EASTERN)


def test_the_sample_pictures_are_those_of_the_recipe(recipe: SimpleNamespace) -> None:
    folder = ROOT / "examples" / "lines"
    wanted = {row[0]: row[1] for row in recipe.sample_lines.LINES}
    assert wanted.keys() == {path.name for path in folder.iterdir() if path.suffix != ".txt"}
    for name, text in wanted.items():
        assert (folder / name).with_suffix(".gt.txt").read_text(encoding="utf-8") == text + "\n"
    assert max(map(len, wanted.values())) > 70
    families = {row[2] for row in recipe.sample_lines.LINES}
    assert families <= recipe.fonts.HELD_OUT
