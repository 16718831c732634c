"""Token ids → text: what `processor.batch_decode(ids, skip_special_tokens=True)` of transformers 5.17 gives.

transformers is never imported here (it costs seconds): the same `tokenizers` objects are built from the same
files, by the rules of the class that tokenizer_config.json names:

    tokenizer.json            any `tokenizers` file, taken as it is; wins over the two below
    vocab.json                byte-level BPE, as RobertaTokenizer builds it (TrOCR base and large); merges.txt
                              cuts text into tokens, which reading never does, so it is not read
    sentencepiece.bpe.model   Unigram with the fairseq offset, as XLMRobertaTokenizer builds it (TrOCR small)

Added and special tokens come from tokenizer_config.json, special_tokens_map.json and added_tokens.json, with
transformers' precedence. An id that names no token is dropped, as there: the decoder of TrOCR small scores
64,044 ids, its tokenizer knows 64,002.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE, Unigram

from trocr_fast.errors import CheckpointError
from trocr_fast.json_fields import read_json

_T = TypeVar("_T")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What RobertaTokenizer and XLMRobertaTokenizer call their special tokens when no file says otherwise.
_ROBERTA_TOKENS = dict(
    zip(_NAMED, ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>"), strict=True),
)
_FAIRSEQ = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")  # ids 0 to 3, and the last
# tokenizer_class (without "Fast") → the vocabulary file it reads where there is no tokenizer.json.
_VOCABULARY_OF = {
    "RobertaTokenizer": "vocab.json",
    "BartTokenizer": "vocab.json",  # an alias of RobertaTokenizer in transformers 5
    "XLMRobertaTokenizer": "sentencepiece.bpe.model",
}
# Classes that name no format of their own: the file that is there decides.
_ANY_CLASS = (None, "PreTrainedTokenizer", "TokenizersBackend")
_FILES = ("tokenizer.json", "vocab.json", "sentencepiece.bpe.model")
_EXPECTED = (
    "tokenizer.json, or vocab.json and merges.txt (RobertaTokenizer), or sentencepiece.bpe.model (XLMRobertaTokenizer)"
)
_CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class _Array(Protocol):
    """A tensor or array of ids."""

    def tolist(self) -> Any: ...


class TextDecoder:
    """Turns rows of token ids into text; special tokens and ids beyond the vocabulary leave nothing behind.

    `num_tokens` is `len(tokenizer)`; `special_ids` are the ids that decoding skips.
    """

    def __init__(self, tokenizer: Tokenizer, clean_up: bool = False) -> None:
        self._tokenizer = tokenizer
        self._clean_up = clean_up
        self.num_tokens: int = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def from_folder(cls, folder: Path) -> TextDecoder:
        """Reads the tokenizer files of a checkpoint folder, or of its `processor/` where the folder has none.

        Raises CheckpointError for a missing or broken file and for a kind of tokenizer that is not supported.
        """
        folder = Path(folder)
        for place in (folder, folder / "processor"):
            if any((place / name).is_file() for name in _FILES):
                return _load(place)
        kind, found = _kind(_read_config(folder)), _found(folder)
        if kind is None and "vocab.txt" in found:
            kind = "BertTokenizer"
        if kind not in _VOCABULARY_OF and kind not in _ANY_CLASS:
            raise _unsupported(folder, kind, found)
        raise CheckpointError(f"{folder}: no tokenizer files: expected {_EXPECTED}, found {found}")

    def decode(self, ids: Sequence[int] | _Array) -> str:
        """The text of one row. Raises ValueError for an id that is negative or does not fit 32 bits."""
        return self.batch_decode([ids])[0]

    def batch_decode(self, rows: Sequence[Sequence[int] | _Array] | _Array) -> list[str]:
        """The texts of many rows (lists, or a 2-D array or tensor), in one call of the library.

        Raises ValueError for an id that is negative or does not fit 32 bits.
        """
        lists = [_to_list(row) for row in _to_list(rows)]
        try:
            texts: list[str] = self._tokenizer.decode_batch(lists, skip_special_tokens=True)
        except OverflowError:
            low, high = min(min(row) for row in lists if row), max(max(row) for row in lists if row)
            raise ValueError(f"Invalid token ids: expected 0 to {2**32 - 1}, got {low} to {high}") from None
        return [_clean(text) for text in texts] if self._clean_up else texts


def _to_list(items: Any) -> list[Any]:
    if isinstance(items, list):
        return items
    return items.tolist() if hasattr(items, "tolist") else list(items)


def _clean(text: str) -> str:
    for old, new in _CLEAN_UP:  # in transformers' order
        text = text.replace(old, new)
    return text


# ---- files ----


def _load(folder: Path) -> TextDecoder:
    config = _read_config(folder)
    kind = _kind(config)
    if (folder / "tokenizer.json").is_file():
        # As transformers does for a vision-encoder-decoder, whatever tokenizer class is named.
        path = folder / "tokenizer.json"
        saved = read_json(path).get("added_tokens") or []
        settings = _build(folder, lambda: _Settings(folder, config, saved_tokens=saved))
        tokenizer = _build(path, lambda: Tokenizer.from_file(str(path)))
        if tokenizer.padding is not None:
            settings.values.setdefault("pad_token", tokenizer.padding["pad_token"])
    else:
        if kind in _ANY_CLASS:
            path = next(folder / name for name in _FILES if (folder / name).is_file())
        elif kind is not None and kind in _VOCABULARY_OF:
            path = folder / _VOCABULARY_OF[kind]
            if not path.is_file():
                raise CheckpointError(
                    f"{folder}: tokenizer_class {kind}: expected {path.name} or tokenizer.json, found {_found(folder)}"
                )
        else:
            raise _unsupported(folder, kind, _found(folder))
        settings = _build(folder, lambda: _Settings(folder, config, saved_tokens=[]))
        make = _byte_level if path.name == "vocab.json" else _sentencepiece
        tokenizer = _build(path, lambda: make(path, settings))
        for name, token in _ROBERTA_TOKENS.items():
            settings.values.setdefault(name, token)
    _build(folder, lambda: settings.add_to(tokenizer))
    clean_up = bool(config.get("clean_up_tokenization_spaces", False))
    # transformers ignores the setting for BPE, where it would eat real spaces, unless told twice.
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return TextDecoder(tokenizer, clean_up and (bool(forced) or not isinstance(tokenizer.model, BPE)))


def _kind(config: dict[str, Any]) -> str | None:
    kind = config.get("tokenizer_class")
    return kind.removesuffix("Fast") if isinstance(kind, str) and kind else None


def _byte_level(path: Path, settings: _Settings) -> Tokenizer:
    tokenizer = Tokenizer(BPE(vocab=read_json(path), merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(path: Path, settings: _Settings) -> Tokenizer:
    import sentencepiece  # late: only this kind of checkpoint needs it

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = list(range(model.get_piece_size()))
    pieces = list(zip(model.id_to_piece(ids), model.get_score(ids), strict=True))
    # fairseq's order: <s> <pad> </s> <unk>, then the pieces after the model's own first three, then <mask>.
    first = [str(settings.values.get(name, _ROBERTA_TOKENS[name])) for name in _FAIRSEQ]
    vocabulary = [*((token, 0.0) for token in first[:4]), *pieces[3:], (first[4], 0.0)]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=3, byte_fallback=False))
    prefix = "always" if settings.values.get("add_prefix_space", True) else "never"
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=prefix)
    # The model's control pieces are special; tokens named in tokenizer_config.json replace them.
    control = [AddedToken(pieces[i][0], normalized=False, special=True) for i in ids if model.is_control(i)]
    settings.values["additional_special_tokens"] = control
    return tokenizer


class _Settings:
    """The added and special tokens of a folder, gathered in transformers' order of precedence."""

    def __init__(self, folder: Path, config: dict[str, Any], saved_tokens: list[dict[str, Any]]) -> None:
        values = dict(config)
        if "additional_special_tokens" in values:
            values.setdefault("extra_special_tokens", values.pop("additional_special_tokens"))
        added: dict[int, AddedToken] = {}
        if "added_tokens_decoder" in values:
            for index, fields in values["added_tokens_decoder"].items():
                added[int(index)] = _token(fields)
        else:  # checkpoints saved before 2023
            for name, value in _read_optional(folder / "special_tokens_map.json").items():
                special = isinstance(value, dict) and not name.endswith("_tokens")
                if name == "extra_special_tokens" and isinstance(value, list):
                    value = [*(values.get(name) or []), *value]
                values[name] = _token({**value, "special": True}) if special else value
            marked = {_content(values[name]) for name in _NAMED if values.get(name)}
            marked |= {_content(token) for token in values.get("extra_special_tokens") or []}
            for text, index in _read_optional(folder / "added_tokens.json").items():
                special = text in marked
                added[int(index)] = AddedToken(text, normalized=not special, special=special)
            for fields in saved_tokens:
                added[fields["id"]] = _token({name: fields[name] for name in fields if name != "id"})
        self.values = {name: _tokens(value) for name, value in values.items()}
        self.added = added

    def add_to(self, tokenizer: Tokenizer) -> None:
        """Adds the tokens that `tokenizer` lacks; as in transformers each gets the next free id."""
        values = self.values
        extra = values.get("extra_special_tokens", values.get("additional_special_tokens"))
        named = {name: values.get(name) for name in _NAMED}
        named |= {
            name: value
            for name, value in values.items()
            if name.endswith("_token") and isinstance(value, str | AddedToken)
        }
        if isinstance(extra, dict):  # tokens with names of their own, such as image_token
            named |= extra
            extra = values.get("additional_special_tokens")
        named |= values.get("model_specific_special_tokens") or {}

        # Tokens that the tokenizer has already are given again: a named one becomes special by it.
        given = [token for _, token in sorted(self.added.items())]
        seen = {token.content for token in [*tokenizer.get_added_tokens_decoder().values(), *given]}
        wanted: list[str | AddedToken] = [*given]
        for token in [*named.values(), *(extra or [])]:
            if token is not None and _content(token) not in seen:
                seen.add(_content(token))
                wanted.append(token)
        names = {_content(token) for token in named.values() if token}
        tokens = [AddedToken(t, special=True) if isinstance(t, str) else t for t in wanted]
        for token in tokens:
            token.special = token.special or token.content in names
        tokenizer.add_tokens(tokens)


def _token(fields: dict[str, Any]) -> AddedToken:
    return AddedToken(**{name: value for name, value in fields.items() if name != "__type"})


def _tokens(value: Any) -> Any:
    """JSON's form of added tokens, at any depth of lists, as AddedToken."""
    if isinstance(value, dict) and (value.get("__type") == "AddedToken" or "content" in value):
        return _token(value)
    if isinstance(value, list):
        return [_tokens(item) for item in value]
    return value


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _read_config(folder: Path) -> dict[str, Any]:
    return _read_optional(folder / "tokenizer_config.json")


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _build(path: Path, make: Callable[[], _T]) -> _T:
    """`make()`, with whatever the tokenizer libraries throw (bare Exception included) as CheckpointError."""
    try:
        return make()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: broken tokenizer files: {type(error).__name__}: {error}") from error


def _found(folder: Path) -> str:
    """The tokenizer-like files of a folder, for messages."""
    if not folder.is_dir():
        return "no such folder"
    kinds = (".json", ".txt", ".model")
    names = sorted(p.name for p in folder.iterdir() if p.suffix in kinds)
    return ", ".join(names) or "none"


def _unsupported(folder: Path, name: str | None, found: str) -> CheckpointError:
    return CheckpointError(f"{folder}: tokenizer_class {name} is not supported: expected {_EXPECTED}, found {found}")
