"""Token ids → text equals transformers, for every kind of tokenizer folder that a checkpoint may bring."""

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, decoders, models, trainers

from trocr_fast.errors import CheckpointError
from trocr_fast.text import TextDecoder

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def _lines() -> list[str]:
    rng = random.Random(0)
    letters = "abcdefghijklmnoprstuv,.!?'éÅ№漢"
    words = ["".join(rng.choice(letters) for _ in range(rng.randrange(1, 9))) for _ in range(300)]
    ends = ["", " .", "  n't !"]
    return [" ".join(rng.choice(words) for _ in range(8)) + rng.choice(ends) for _ in range(400)]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt; with 400 tokens many a token is one byte of a longer character."""
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(_lines(), vocab_size=400, special_tokens=SPECIAL)
    tokenizer.save_model(str(folder))
    return folder


@pytest.fixture(scope="module")
def piece_model() -> bytes:
    """A Unigram model with a control piece and a user-defined piece beside the usual ones."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_lines()), model_writer=model, vocab_size=200, model_type="unigram",
        user_defined_symbols=["<line>"], control_symbols=["<ctl>"], minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture
def reference() -> Callable[[Path], Any]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained


def _write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def _added(content: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    return {
        "content": content, "lstrip": False, "rstrip": False, "normalized": True, "single_word": False,
        "special": special, **flags,
    }  # fmt: skip


MASK = {"__type": "AddedToken", **_added("<mask>", lstrip=True)}
CLEAN = {"clean_up_tokenization_spaces": True}
FORCED = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}

# Folders with vocab.json and merges.txt, or with sentencepiece.bpe.model: what stands beside the vocabulary.
CONFIGS: dict[str, dict[str, Any]] = {
    "as published": {"tokenizer_config.json": {"mask_token": MASK}},
    "no special tokens named": {"tokenizer_config.json": {}},
    "clean-up": {"tokenizer_config.json": CLEAN},
    "clean-up forced": {"tokenizer_config.json": CLEAN | FORCED},
    "no prefix space": {"tokenizer_config.json": {"add_prefix_space": False}},
    "added_tokens_decoder": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "900": _added("<later>"),
                "5": _added("!", special=True),
                "800": _added("<sooner>", special=True, normalized=False),
            },
            "additional_special_tokens": ["<sooner>", "<extra>"],
        },
        "special_tokens_map.json": {"bos_token": "<ignored>"},
    },
    "legacy files": {
        "tokenizer_config.json": {"additional_special_tokens": ["<a>"]},
        "special_tokens_map.json": {"mask_token": _added("<mask>", lstrip=True), "cls_token": "<cls>"},
        "added_tokens.json": {"<a>": 700, "<b>": 600, "<cls>": 650},
    },
    "named extra tokens": {
        "tokenizer_config.json": {"image_token": "<image>", "extra_special_tokens": {"row_token": "<row>"}},
    },
    "other names": {
        "tokenizer_config.json": {"unk_token": "[UNK]", "mask_token": "[MASK]", "pad_token": "<pad>"},
    },
    "special_tokens_map extra": {
        "tokenizer_config.json": {"extra_special_tokens": ["<x>"]},
        "special_tokens_map.json": {"extra_special_tokens": ["<y>", "?"]},
    },
}


def _rows(num_tokens: int, special: list[int]) -> list[list[int]]:
    """Every id alone and after a word, then random rows: out of range, specials, repeats, the empty row."""
    rng = random.Random(1)
    few = [*special, num_tokens - 1, num_tokens, num_tokens + 40, 2**32 - 1]
    rows: list[list[int]] = [[]]
    for i in range(num_tokens + 60):
        rows += [[i], [30, i], [i, i]]
    for _ in range(600):
        pool = rng.choice([range(num_tokens + 20), few, range(num_tokens)])
        rows.append([rng.choice(pool if rng.random() < 0.8 else few) for _ in range(rng.randrange(40))])
    return rows


def _assert_same(folder: Path, tokenizer: Any) -> TextDecoder:
    ours = TextDecoder.from_folder(folder)
    assert ours.num_tokens == len(tokenizer)
    assert ours.special_ids == {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    rows = _rows(len(tokenizer), sorted(ours.special_ids))
    rows += [tokenizer(text)["input_ids"] for text in _lines()[:100]]
    expected = tokenizer.batch_decode(rows, skip_special_tokens=True)
    for row, text, want in zip(rows, ours.batch_decode(rows), expected, strict=True):
        assert text == want, row
    return ours


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["RobertaTokenizer", "RobertaTokenizerFast", "XLMRobertaTokenizer"])
def test_equals_transformers(
    name: str, kind: str, byte_level: Path, piece_model: bytes, reference: Any, tmp_path: Path
) -> None:
    files = {file: dict(content) for file, content in CONFIGS[name].items()}
    files["tokenizer_config.json"]["tokenizer_class"] = kind
    if kind == "XLMRobertaTokenizer":
        _write(tmp_path, {"sentencepiece.bpe.model": piece_model})
    else:
        _write(tmp_path, {file: (byte_level / file).read_bytes() for file in ("vocab.json", "merges.txt")})
    _write(tmp_path, files)
    _assert_same(tmp_path, reference(tmp_path))


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[PAD]", "[UNK]"])
    tokenizer.train_from_iterator((word for line in _lines() for word in line.split()), trainer)
    return tokenizer


def _formulas(byte_level: Path) -> Tokenizer:
    """As the formula recognisers ship it: pad 0, bos 1, eos 2, in a tokenizer.json alone."""
    files = [str(byte_level / name) for name in ("vocab.json", "merges.txt")]
    tokenizer = Tokenizer(models.BPE.from_file(*files))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("\\frac", normalized=False), "<mask>"])
    return tokenizer


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "TokenizersBackend", "RobertaTokenizer", "BertTokenizer"])
def test_tokenizer_json_equals_transformers(
    name: str, kind: str, byte_level: Path, reference: Any, tmp_path: Path
) -> None:
    files = {file: dict(content) for file, content in CONFIGS[name].items()}
    files["tokenizer_config.json"]["tokenizer_class"] = kind
    files["config.json"] = {"model_type": "vision-encoder-decoder", **_encoder_decoder()}
    tokenizer = _word_piece() if kind == "BertTokenizer" else _formulas(byte_level)
    if name == "as published":
        tokenizer.enable_padding(pad_token=",")  # its token is taken for the pad token where none is named
    _write(tmp_path, {**files, "tokenizer.json": json.loads(tokenizer.to_str())})
    # Files of lower precedence, with other contents.
    _write(tmp_path, {"vocab.json": {"<s>": 0}, "merges.txt": b"", "sentencepiece.bpe.model": b""})
    ours = _assert_same(tmp_path, reference(tmp_path))
    if name == "as published" and kind != "BertTokenizer":
        assert tokenizer.token_to_id(",") in ours.special_ids


def _encoder_decoder() -> dict[str, Any]:
    return {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "trocr"}, "is_encoder_decoder": True}


def test_processor_decodes_the_same(byte_level: Path, tmp_path: Path) -> None:
    """The promise is about `processor.batch_decode`: a whole TrOCRProcessor, saved and loaded."""
    from transformers import RobertaTokenizer, TrOCRProcessor, ViTImageProcessorPil

    tokenizer = RobertaTokenizer.from_pretrained(byte_level)
    TrOCRProcessor(ViTImageProcessorPil(), tokenizer).save_pretrained(tmp_path)
    processor = TrOCRProcessor.from_pretrained(tmp_path)
    ids = torch.randint(0, len(tokenizer) + 20, (200, 30), generator=torch.Generator().manual_seed(0))
    ours = TextDecoder.from_folder(tmp_path).batch_decode(ids)
    assert ours == processor.batch_decode(ids, skip_special_tokens=True)
    assert any("\N{REPLACEMENT CHARACTER}" in text for text in ours)  # some bytes were no UTF-8


def test_decode_is_one_row_of_batch_decode(byte_level: Path) -> None:
    decoder = TextDecoder.from_folder(byte_level)  # no tokenizer_config.json: the files tell the kind
    rows = _rows(decoder.num_tokens, [0, 2])[:200]
    assert [decoder.decode(row) for row in rows] == decoder.batch_decode(rows)
    assert decoder.batch_decode([]) == []
    assert decoder.decode((30, 31)) == decoder.decode(torch.tensor([30, 31])) == decoder.decode([30, 31])


@pytest.mark.parametrize("row", [[3, -100], [2**32]])
def test_impossible_ids(byte_level: Path, row: list[int]) -> None:
    with pytest.raises(ValueError, match=f"expected 0 to 4294967295, got .*{row[-1]}"):
        TextDecoder.from_folder(byte_level).batch_decode([[5], [], row])


def test_processor_subfolder(byte_level: Path, tmp_path: Path) -> None:
    files = {file: (byte_level / file).read_bytes() for file in ("vocab.json", "merges.txt")}
    _write(tmp_path / "processor", files)
    _write(tmp_path, {"config.json": _encoder_decoder()})
    inside = TextDecoder.from_folder(tmp_path)
    assert inside.decode([30, 31, 32]) == TextDecoder.from_folder(byte_level).decode([30, 31, 32]) != ""
    # Files beside config.json win.
    _write(tmp_path, {"vocab.json": {"<s>": 0, "x": 1}, "merges.txt": b""})
    assert TextDecoder.from_folder(tmp_path).decode([1]) == "x"


VOCABULARY = {"<s>": 0, "x": 1}
# name → (files, what the message says)
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"config.json": {}}, "no tokenizer files: expected tokenizer.json, or .*found config.json"),
    "bert": ({"vocab.txt": b"a"}, "BertTokenizer is not supported: expected .*found vocab.txt"),
    "named bert": (
        {"tokenizer_config.json": {"tokenizer_class": "BertTokenizerFast"}},
        "BertTokenizer is not supported",
    ),
    "gpt2": (
        {"vocab.json": VOCABULARY, "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}},
        "GPT2Tokenizer is not supported: .*found tokenizer_config.json, vocab.json",
    ),
    "wrong file for its class": (
        {"vocab.json": VOCABULARY, "tokenizer_config.json": {"tokenizer_class": "XLMRobertaTokenizer"}},
        "XLMRobertaTokenizer: expected sentencepiece.bpe.model or tokenizer.json, found .*vocab.json",
    ),
    "torn tokenizer.json": ({"tokenizer.json": b'{"model": '}, "tokenizer.json: expected a JSON file"),
    "no tokenizer in it": ({"tokenizer.json": {}}, "tokenizer.json: broken tokenizer files"),
    "list": ({"vocab.json": b"[]"}, "vocab.json: expected a JSON object, found list"),
    "words for ids": ({"vocab.json": {"a": "b"}}, "vocab.json: broken tokenizer files"),
    "empty model": ({"sentencepiece.bpe.model": b""}, "sentencepiece.bpe.model: broken tokenizer files"),
    "no model": ({"sentencepiece.bpe.model": b"no model"}, "sentencepiece.bpe.model: broken tokenizer files"),
    "bad configuration": (
        {"vocab.json": VOCABULARY, "tokenizer_config.json": {"added_tokens_decoder": [1]}},
        "broken tokenizer files",
    ),
    "not UTF-8": (
        {"vocab.json": VOCABULARY, "special_tokens_map.json": b"\xff"},
        "special_tokens_map.json: expected a JSON file",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    files, message = BROKEN[name]
    _write(tmp_path, files)
    with pytest.raises(CheckpointError, match=message) as caught:
        TextDecoder.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        TextDecoder.from_folder(tmp_path / "absent")


def test_imports_no_transformers(byte_level: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from trocr_fast.text import TextDecoder\n"
        f"TextDecoder.from_folder(Path({str(byte_level)!r})).decode([30])\n"
        "print([name for name in ('transformers', 'sentencepiece') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
