"""JSON files of a checkpoint, read with care: every error names file, field, expected and found."""

import json
from pathlib import Path
from typing import Any

from trocr_fast.errors import CheckpointError

# Any real size is far below this; a larger one is a damaged or hostile file.
MAX_DIMENSION = 2**31 - 1


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: no such file, not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: expected a file {path.name}, found none") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad UTF-8 and bad JSON
        raise CheckpointError(f"{path}: expected a JSON file, found something else ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


class Fields:
    """Typed access to one JSON object; null means the default, as in transformers.

    Args:
        values: the object.
        where: what errors call it, its file as a rule.
        prefix: of the object inside its file, with a dot at its end.
    """

    def __init__(self, values: dict[str, Any], where: str, prefix: str = "") -> None:
        self.values = values
        self.where = where
        self.prefix = prefix

    def error(self, name: str, expected: str, found: object) -> CheckpointError:
        """An error to raise about one field."""
        return CheckpointError(f"{self.where}: field '{self.prefix}{name}': expected {expected}, found {found!r}")

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it is."""
        value = self.values.get(name)
        return default if value is None else value

    def section(self, name: str) -> "Fields":
        """The object inside this one."""
        values = self.values.get(name)
        if not isinstance(values, dict):
            raise self.error(name, "an object", values)
        return Fields(values, self.where, f"{self.prefix}{name}.")

    def choice(self, name: str, supported: tuple[str, ...]) -> str:
        """One of a few words, with no default."""
        value = self.values.get(name)
        if not isinstance(value, str) or value not in supported:
            raise self.error(name, " or ".join(map(repr, supported)) + " (nothing else is supported)", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false", value)
        return value

    def dimension(self, name: str, default: int | None, maximum: int = MAX_DIMENSION) -> int:
        """A whole number from 1 to `maximum`."""
        return self._dimension(name, self.get(name, default), maximum)

    def height_width(self, name: str, default: int) -> tuple[int, int]:
        """(height, width) from N or [H, W]."""
        value = self.get(name, default)
        if not isinstance(value, list):
            value = [value, value]
        if len(value) != 2:
            raise self.error(name, "a whole number or [height, width]", value)
        return self._dimension(name, value[0]), self._dimension(name, value[1])

    def token(self, name: str, value: Any, vocab_size: int) -> int:
        """`value`, found in field `name`, if it is a token of the vocabulary."""
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise self.error(name, f"a token from 0 to vocab_size - 1 = {vocab_size - 1}", value)
        return value

    def _dimension(self, name: str, value: Any, maximum: int = MAX_DIMENSION) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= maximum:
            raise self.error(name, f"a whole number from 1 to {maximum}", value)
        return value
