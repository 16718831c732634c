"""What README and docs name exists: files, make targets, commands and their options, modules."""

import importlib.util
import re
from pathlib import Path

import pytest
import typer

from trocr_fast.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "kernels").glob("*.md")),
]
CODE = re.compile(r"```.*?\n(.*?)```|`([^`\n]+)`", re.DOTALL)
SUFFIXES = (".py", ".md", ".toml", ".txt", ".json", ".png", "/")


def snippets(page: Path) -> str:
    return "\n".join(block or inline for block, inline in CODE.findall(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_exists(page: Path) -> None:
    text = snippets(page)
    wrong = []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong += [f"make {target}" for target in re.findall(r"\bmake ([a-z-]+)", text) if target not in targets]

    group = typer.main.get_command(app)
    for name, rest in re.findall(r"trocr-fast ([a-z]+)([^\n|]*)", text):
        command = group.commands.get(name)
        if command is None:
            wrong.append(f"trocr-fast {name}")
            continue
        options = {option for parameter in command.params for option in parameter.opts}
        wrong += [f"trocr-fast {name} {x}" for x in re.findall(r"(?<!\S)(--?[a-z-]+)", rest) if x not in options]

    for module in re.findall(r"python -m ([\w.]+)", text):
        if importlib.util.find_spec(module) is None:
            wrong.append(f"python -m {module}")

    folders = (ROOT, ROOT / "trocr_fast", page.parent, ROOT / "examples" / "train_builtin")
    for word in re.findall(r"(?<![\w./-])[\w./-]*[\w/]", text):
        is_path = "/" in word and word.endswith(SUFFIXES) and not word.startswith((".train", "/", "lines/", "more/"))
        if is_path and not any((folder / word).exists() for folder in folders):
            wrong.append(word)
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        if not (page.parent / link).exists():
            wrong.append(link)
    assert not wrong, f"{page.name} names what is not there: {wrong}"


def test_the_pages_are_found() -> None:
    assert len(PAGES) >= 6 and all(page.exists() for page in PAGES)
