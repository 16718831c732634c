"""PATH arguments -> picture paths: order, wildcards, lists, strange names and no loops."""

import glob
import io
import itertools
import os
import threading

import pytest
from PIL import Image

from trocr_fast import sources
from trocr_fast.errors import PictureError, UsageError
from trocr_fast.image_config import ImageConfig
from trocr_fast.images import DEFAULT_FORMATS, ImageProcessor
from trocr_fast.sources import find_pictures

TREE = [
    "a/1.png",
    "a/10.png",
    "a/2.JPG",
    "a/2.gt.txt",
    "a/b.png/x.tif",  # a folder whose name looks like a picture's
    "a/b/c/deep.png",
    "a/b/note.md",
    "a/b/z.webp",
    "a.png",
    "empty/readme.txt",
    "list.txt",
    "z/.hidden.png",
    "z/.cache/thumb.png",
    "z/[1].png",
    "z/last.jpeg",
]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """The files above, empty; the test runs in their folder."""
    for name in TREE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


IN_A = ["a/1.png", "a/10.png", "a/2.JPG", "a/b/c/deep.png", "a/b/z.webp", "a/b.png/x.tif"]


def test_a_folder_is_walked_in_sorted_order(tree):
    assert list(find_pictures(["a"])) == IN_A
    assert list(find_pictures(["a/"])) == IN_A
    assert list(find_pictures([str(tree / "a")])) == [str(tree / path) for path in IN_A]
    assert list(find_pictures(["."])) == [f"./{path}" for path in [*IN_A, "a.png", "z/[1].png", "z/last.jpeg"]]


def test_paths_come_in_the_order_of_the_arguments(tree):
    found = find_pictures(["z", "nowhere.png", "a.png", "a/b", "a.png"])
    expected = ["z/[1].png", "z/last.jpeg", "nowhere.png", "a.png", "a/b/c/deep.png", "a/b/z.webp", "a.png"]
    assert list(found) == expected


def test_a_folder_is_a_stream(tree, monkeypatch):
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    found = find_pictures(["."])
    assert [next(found) for _ in range(3)] == ["./a/1.png", "./a/10.png", "./a/2.JPG"]
    assert listed == [".", "./a"], "folders further on are not looked at yet"


PATTERNS = [
    "*.png",
    "a/*",
    "*/*.png",
    "a/?.*",
    "a/[12].png",
    "**",
    "**/*.png",
    "a/**/*.webp",
    "**/b/**",
    "a*",
]
PATTERNS += [
    "**/**/**/*.png",
    "*/b/*/*",
    "z/*",
    "z/.*",
    "z/.cache/*",
    "z/.c*/*",
    "**/.hidden.png",
    "./**/c/*.png",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wildcards_match_what_the_standard_library_matches(tree, pattern):
    def is_picture(path):
        return os.path.splitext(path)[1].lower() in sources.PICTURE_SUFFIXES and os.path.isfile(path)

    expected = set()
    for match in glob.glob(pattern, recursive=True):
        inside = glob.glob(glob.escape(match) + "/**", recursive=True) if os.path.isdir(match) else [match]
        expected.update(os.path.normpath(path) for path in inside if is_picture(path))
    found = list(find_pictures([pattern]))
    assert {os.path.normpath(path) for path in found} == expected
    assert len(found) == len(expected), "no path twice"
    assert found == sorted(found, key=lambda path: path.split("/"))


def test_folders_that_cannot_match_are_not_listed(tree, monkeypatch):
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    assert list(find_pictures(["a/[b1]*.png"])) == ["a/1.png", "a/10.png", "a/b.png/x.tif"]
    assert listed == ["a", "a/b.png"]


def test_an_absolute_glob(tree):
    assert list(find_pictures([f"{tree}/*/b/*.webp"])) == [f"{tree}/a/b/z.webp"]


def test_a_name_with_brackets_is_no_glob(tree):
    assert list(find_pictures(["z/[1].png"])) == ["z/[1].png"]
    (tree / "[x]").mkdir()
    (tree / "[x]" / "1.png").touch()
    assert list(find_pictures(["[x]"])) == ["[x]/1.png"]


def test_a_list(tree):
    (tree / "list.txt").write_bytes(b"\xef\xbb\xbfa/1.png\r\n\n  \nnowhere.png\na/b\n spaced .png\n\xff.png")
    expected = ["a/1.png", "nowhere.png", "a/b", " spaced .png", os.fsdecode(b"\xff.png")]
    assert list(find_pictures(["list.txt"])) == expected
    os.rename("list.txt", "a/LIST.TXT")
    assert list(find_pictures(["a/LIST.TXT"])) == expected, "relative to the current folder, not to the list's"


def test_standard_input(tree):
    lines = b"a/1.png\n\n\xff.png\r\nlast.png"
    found = list(find_pictures(["a.png", "-"], stdin=io.BytesIO(lines)))
    assert found == ["a.png", "a/1.png", os.fsdecode(b"\xff.png"), "last.png"]
    assert list(find_pictures(["-"], stdin=io.BytesIO(b""))) == []


def test_standard_input_is_a_stream():
    class Endless(io.RawIOBase):
        def readline(self, size=-1):
            return b"again.png\n"

    assert list(itertools.islice(find_pictures(["-"], stdin=Endless()), 1000)) == ["again.png"] * 1000


def test_standard_input_is_the_default(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a.png\n")))
    assert list(find_pictures(["-"])) == ["a.png"]


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        ([], "at least one PATH"),
        (["a.png", "empty"], "'empty': expected a folder with pictures"),
        (["a.png", "a/*.gif"], r"'a/\*.gif': expected a glob that matches"),
        (["nowhere/*.png"], "expected a glob that matches"),
        (["a.png/*.png"], "expected a glob that matches"),
        (["list.txt"], "'list.txt': expected a list of paths"),
        (["nowhere.txt"], "'nowhere.txt': expected a list that can be read"),
        (["a/2.gt.txt"], "text"),
        (["a.png", "nowhere"], "'nowhere': expected a picture, a folder, a glob or a list, found nothing of that name"),
        (["nowhere/"], "found nothing of that name"),
    ],
)
def test_wrong_usage_is_found_before_the_first_path(tree, paths, reason):
    with pytest.raises(UsageError, match=reason):
        find_pictures(paths)


def test_a_line_that_is_no_path(tree):
    (tree / "list.txt").write_bytes(b"a.png\n" + b"x" * 200_000)
    with open(tree / "list.txt", "ab") as file:
        file.write(b"\nb.png\n")
    first, long, after = find_pictures(["list.txt"])  # it becomes an error row, and the list goes on
    assert (first, after) == ("a.png", "b.png")
    assert 2**16 - 1 <= len(long) <= 2**16 and set(long) == {"x"}


def test_links(tree):
    os.symlink("..", "a/b/up")
    os.symlink(tree, "a/b/top")
    os.symlink("self.png", "a/b/self.png")
    os.symlink("nowhere", "a/b/dangling.png")
    os.symlink(tree / "a.png", "a/b/good.png")
    os.symlink(tree / "z", "a/b/folder.png")
    os.symlink(tree / "z", "link")
    found = []
    thread = threading.Thread(target=lambda: found.extend(find_pictures(["a/b", "a/**/g*"])), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "a loop of links"
    assert found == [f"a/b/{name}" for name in ("c/deep.png", "dangling.png", "good.png", "self.png", "z.webp")] + [
        "a/b/good.png"
    ]
    assert list(find_pictures(["link"])) == ["link/[1].png", "link/last.jpeg"], "a link named by the user is followed"


def test_strange_names(tmp_path):
    names = [b"two\nlines.png", b"\xc3\xa4\xe2\x82\xac.png", b"\xff\xfe.png", b" .png", b"-.png", b"*.png"]
    for name in names:
        open(os.path.join(os.fsencode(tmp_path), name), "wb").close()
    expected = sorted(os.path.join(tmp_path, os.fsdecode(name)) for name in names)
    assert list(find_pictures([str(tmp_path)])) == expected
    assert list(find_pictures([f"{tmp_path}/*.png"])) == [f"{tmp_path}/*.png"], "it exists, so it is no glob"
    assert list(find_pictures([f"{tmp_path}/?*.png"])) == expected
    assert list(find_pictures(expected)) == expected


def test_a_subfolder_that_cannot_be_listed_becomes_an_error_row(tree, monkeypatch):
    scandir = os.scandir

    def guarded(path):
        if path == "a/b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    found = list(find_pictures(["a"]))
    assert found == ["a/1.png", "a/10.png", "a/2.JPG", "a/b", "a/b.png/x.tif"]
    with pytest.raises(PictureError, match="folder"):
        ImageProcessor(ImageConfig()).load("a/b")
    with pytest.raises(UsageError, match="Permission denied"):
        find_pictures(["a/b"])


def test_a_folder_that_goes_away_during_the_walk(tree):
    found = find_pictures(["a"])
    first = next(found)
    os.unlink("a/b/c/deep.png")
    os.rmdir("a/b/c")
    assert [first, *found] == ["a/1.png", "a/10.png", "a/2.JPG", "a/b/z.webp", "a/b.png/x.tif"]


def test_a_deep_tree_needs_no_recursion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    depth = 1300  # beyond Python's recursion limit, within the system's path length
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    open("1.png", "wb").close()
    os.chdir(tmp_path)
    try:
        assert list(find_pictures(["."])) == ["./" + "d/" * depth + "1.png"]
    finally:
        os.unlink("d/" * depth + "1.png")  # pytest's own cleaning recurses
        os.removedirs("d/" * depth)
        os.makedirs(tmp_path, exist_ok=True)


def test_the_suffixes_are_those_of_the_formats_that_are_read():
    Image.init()
    known = Image.registered_extensions().items()
    assert {suffix for suffix, format in known if format in DEFAULT_FORMATS} == sources.PICTURE_SUFFIXES
