"""PATH arguments -> a stream of picture paths, in a fixed order and bounded memory.

| PATH | gives |
|---|---|
| `-` | the lines of standard input, each the path of a picture |
| a folder | its pictures (by suffix), subfolders included, in sorted order |
| a glob (`*`, `?`, `[...]`, `**`) | pictures that match, and all those in folders that match, sorted so too |
| a file ending in `.txt` | the lines of the list, each the path of a picture from the current folder |
| anything else that exists, or ends as a picture | itself: reading it then gives a picture or an error row |

A path that exists is never taken for a glob. The names of a folder are sorted, files and subfolders together,
and only those of the folders on the way down are held in memory. Names that begin with a dot are skipped
unless the glob spells the dot. Links to files are followed; links to folders only where they are a PATH
themselves, so there are no loops. A subfolder that can't be listed is given itself, to become an error row.
Names that are no UTF-8 pass as Python's surrogate escapes; a name that holds a line feed passes in every way
but a list.

An empty folder, a glob without a match, an empty list and a name that neither exists nor ends as a picture are wrong
usage: most likely a mistyped PATH.
Standard input may be empty, as the end of a pipe that found nothing.
"""

import fnmatch
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import IO

from trocr_fast.errors import UsageError

PICTURE_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("png", "apng", "jpg", "jpeg", "jpe", "jfif", "tif", "tiff", "webp", "bmp", "gif"),
        *("jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "ppm", "pgm", "pbm", "pnm", "pfm"),
    )
)

# No file system allows longer paths; a longer line is not a list's.
MAX_PATH_BYTES = 2**16

_MAGIC = re.compile(r"[*?\[]")


def find_pictures(paths: Sequence[str], stdin: IO[bytes] | None = None) -> Iterator[str]:
    """The paths of all pictures that `paths` name, PATH by PATH, as a stream.

    Args:
        paths: PATH arguments, as in the table above.
        stdin: read for the PATH `-`; by default standard input.

    Raises:
        UsageError: no PATH; an empty folder, glob or list; a name that is nothing; a list that can't be read; a
            transcription (NAME.gt.txt) given as a list. All at once, before the first path. A line longer than any
            path can be is cut, and becomes an error row.
    """
    if not paths:
        raise UsageError("expected at least one PATH, got none")
    return chain.from_iterable([_expand(path, stdin) for path in paths])


def _expand(path: str, stdin: IO[bytes] | None) -> Iterable[str]:
    if path == "-":
        return _lines(sys.stdin.buffer if stdin is None else stdin, "standard input")
    if os.path.isdir(path):
        return _not_empty(_walk(path, []), f"{path!r}: expected a folder with pictures in it, found none")
    if path.lower().endswith(".gt.txt"):
        raise UsageError(f"{path!r}: expected pictures or a list of paths, found a picture's text (.gt.txt)")
    if path.lower().endswith(".txt") and not _is_glob(path):
        return _not_empty(_read_list(path), f"{path!r}: expected a list of paths, one a line, found none")
    if _is_glob(path):
        base, parts = _split_glob(path)
        return _not_empty(_walk(base, parts), f"{path!r}: expected a glob that matches pictures, found none")
    if not os.path.lexists(path) and not _is_picture(path):
        raise UsageError(f"{path!r}: expected a picture, a folder, a glob or a list, found nothing of that name")
    return [path]


def _not_empty(paths: Iterator[str], message: str) -> Iterator[str]:
    try:
        first = next(paths)
    except StopIteration:
        raise UsageError(message) from None
    except OSError as error:
        raise UsageError(f"{message} ({error.strerror})") from None
    return chain([first], paths)


def _read_list(path: str) -> Iterator[str]:
    try:
        with open(path, "rb") as file:
            yield from _lines(file, repr(path))
    except OSError as error:
        raise UsageError(f"{path!r}: expected a list that can be read, found {error.strerror}") from None


def _lines(file: IO[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(MAX_PATH_BYTES), b""), start=1):
        if len(line) == MAX_PATH_BYTES:  # no path, but an error row is better than an end of the whole list
            while not line.endswith(b"\n") and (rest := file.readline(MAX_PATH_BYTES)):
                line = line[:MAX_PATH_BYTES] + rest[-1:]
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # some editors mark UTF-8 files so
        line = line.rstrip(b"\r\n")
        if line.strip():
            yield os.fsdecode(line)


def _is_glob(path: str) -> bool:
    return _MAGIC.search(path) is not None and not os.path.lexists(path)


def _split_glob(path: str) -> tuple[str, list[str]]:
    """The folder before the first part with a wildcard, and the parts from there on."""
    parts = path.split(os.sep)
    first = next(index for index, part in enumerate(parts) if _MAGIC.search(part))
    base = os.sep.join(parts[:first])
    if first and not base:
        base = os.sep  # "/*.png"
    return base, [part for part in parts[first:] if part]


def _walk(base: str, parts: list[str]) -> Iterator[str]:
    """Pictures under `base` whose path matches `parts`, and those of any folder that does. [] is all of them.

    A folder that matches stands for everything in it, as if the parts `**` and `*` followed. All places in
    the pattern that the path so far can have reached are tracked at once: so no path is met twice, whatever
    the number of `**`, and folders that can't lead to a match are not entered.
    """
    whole = len(parts)
    pattern = [part if part == "**" else re.compile(fnmatch.translate(part)) for part in (*parts, "**", "*")]
    dotted = [part.startswith(".") for part in parts] + [False, False]

    def passing(places: set[int]) -> set[int]:
        """`**` also stands for no folder at all."""
        for place in sorted(places):
            while place < len(pattern) and pattern[place] == "**":
                place += 1
                places.add(place)
        return places

    def after(places: set[int], name: str) -> set[int]:
        reached = set()
        for place in places:
            if place < len(pattern) and (not name.startswith(".") or dotted[place]):
                part = pattern[place]
                if isinstance(part, str):
                    reached.add(place)
                elif part.match(name):
                    reached.add(place + 1)
        return passing(reached)

    stack = [(base, iter(_list(base)), passing({0}))]
    while stack:
        folder, entries, places = stack[-1]
        name, is_folder = next(entries, ("", False))
        if not name:
            stack.pop()
            continue
        reached, path = after(places, name), os.path.join(folder, name)
        if is_folder and reached:
            try:
                stack.append((path, iter(_list(path)), reached))
            except OSError:
                yield path
        elif not is_folder and reached & {whole, len(pattern)}:
            yield path


def _list(folder: str) -> list[tuple[str, bool]]:
    """Sorted (name, is a folder) of the subfolders and pictures of a folder, without links to folders."""
    with os.scandir(folder or os.curdir) as entries:
        return sorted(
            (entry.name, entry.is_dir(follow_symlinks=False))
            for entry in entries
            if entry.is_dir(follow_symlinks=False) or (_is_picture(entry.name) and not _is_folder(entry))
        )


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; reading it will say so
        return False
