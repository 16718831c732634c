"""The command `trocr-fast`.

Data goes to stdout (or the file of `-o`), everything else to stderr. Exit status: 0 all done, 1 some pictures failed or
some rows differ, 2 wrong usage, 3 a dependency is missing, 5 the output can't be written, 130 interrupted.

Only typer is imported here; each command imports what it needs when it runs, so that `--help` is quick.
"""

import gc
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from trocr_fast.errors import TrocrFastError, UsageError

if TYPE_CHECKING:
    from trocr_fast.line import Line
    from trocr_fast.trocr import TrOCR

FAILED, USAGE, MISSING, UNWRITABLE, INTERRUPTED = 1, 2, 3, 5, 130

app = typer.Typer(
    name="trocr-fast",
    help="Read pictures of text lines with TrOCR, in the tokens of transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


Format = Literal["text", "jsonl", "csv", "tsv"]
Device = Literal["auto", "cuda", "cpu"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CrossMemory = Literal["auto", "kv", "latent"]
Pixels = Literal["sane", "stock"]
OnError = Literal["skip", "abort"]
Existing = Literal["abort", "overwrite"]

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH...",
        help="Pictures, folders (searched whole), globs, .txt lists of paths, or - for a list on stdin.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="DIR_OR_ID", help="Checkpoint folder or hub id; by default the built-in model."),
]
RevisionOption = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a hub id.")]
DeviceOption = Annotated[Device, typer.Option(help="auto takes CUDA where there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="auto is bfloat16 on CUDA, float32 on a CPU.")]
CrossMemoryOption = Annotated[
    CrossMemory, typer.Option(help="What is kept of a picture: projected keys and values, or the encoder's output.")
]
PixelsOption = Annotated[
    Pixels, typer.Option(help="stock: literally what the checkpoint's processor does, refusals included.")
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Pictures decoded together.")]
TokensOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Cut lines after N tokens; by default at the checkpoint's limit.")
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Threads that load pictures; by default one a core.")
]
MpixelsOption = Annotated[
    float | None, typer.Option(metavar="X", help="Refuse larger pictures (million pixels; by default 50).")
]
BytesOption = Annotated[int | None, typer.Option(min=1, metavar="N", help="Refuse larger files (by default 64 MiB).")]
FormatsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--picture-format", metavar="NAME", help="Read this format alone (again for more), such as PNG or JPEG."
    ),
]


def _show_version(asked: bool) -> None:
    if asked:
        from trocr_fast import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def read(
    paths: Paths,
    model: ModelOption = None,
    revision: RevisionOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write rows here instead of stdout.")
    ] = None,
    format: Annotated[Format | None, typer.Option(help="By default by the ending of FILE, else text.")] = None,
    existing: Annotated[Existing, typer.Option(help="What to do when FILE exists.")] = "abort",
    on_error: Annotated[OnError, typer.Option(help="What to do at a bad picture.")] = "skip",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    cross_memory: CrossMemoryOption = "auto",
    batch_size: BatchOption = 16,
    workers: WorkersOption = None,
    max_new_tokens: TokensOption = None,
    pixels: PixelsOption = "sane",
    max_image_mpixels: MpixelsOption = None,
    max_file_bytes: BytesOption = None,
    picture_format: FormatsOption = None,
    num_beams: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Search with so many beams; by default greedily.")
    ] = None,
    token_log_probs: Annotated[
        bool, typer.Option("--token-log-probs", help="Write the log-probability of each token, too (jsonl).")
    ] = False,
) -> None:
    """Read pictures of text lines: one row a picture, in the order of the paths."""
    from trocr_fast.sources import find_pictures
    from trocr_fast.writers import open_writer

    row_format = format or _format_of(output)
    if token_log_probs and row_format != "jsonl":
        raise UsageError(f"--token-log-probs: expected --format jsonl beside it, got {row_format}")
    pictures = find_pictures(paths)  # a wrong path is told before the model is loaded
    limits = _limits(max_image_mpixels, max_file_bytes, picture_format)
    ocr = _load(model, revision, device, dtype, cross_memory, pixels, limits)
    lines = ocr.read(
        pictures,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        num_workers=workers,
        token_log_probs=token_log_probs,
        **({} if num_beams is None else {"num_beams": num_beams}),
    )
    with _output(output, existing) as stream:
        num_failed = 0
        writer = open_writer(row_format, stream)
        try:
            for line in _progress(lines):
                writer.write(line)
                num_failed += line.error is not None
                if line.error is not None and on_error == "abort":
                    _note("stopped at the first bad picture")
                    break
        finally:
            writer.close()
    if num_failed:
        raise typer.Exit(FAILED)


@app.command()
def verify(
    paths: Paths,
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Of this engine; the reference runs in float32.")] = "float32",
    cross_memory: CrossMemoryOption = "auto",
    batch_size: BatchOption = 8,
    max_new_tokens: TokensOption = None,
    pixels: PixelsOption = "sane",
    max_image_mpixels: MpixelsOption = None,
    max_file_bytes: BytesOption = None,
    picture_format: FormatsOption = None,
    allow_ties: Annotated[
        bool, typer.Option("--allow-ties", help="Let rows pass where the reference itself does not decide.")
    ] = False,
) -> None:
    """Compare tokens with transformers, row by row; exit status 0 only if all agree."""
    from trocr_fast.sources import find_pictures
    from trocr_fast.verify import Reference, verify
    from trocr_fast.writers import escape

    pictures = list(find_pictures(paths))
    limits = _limits(max_image_mpixels, max_file_bytes, picture_format)
    ocr = _load(model, revision, device, dtype, cross_memory, pixels, limits)
    reference = Reference(ocr.folder, ocr.model.device, ocr.model.config.generation.other)
    counts = {"equal": 0, "tie": 0, "different": 0, "unreadable": 0}
    for check in _progress(verify(ocr, reference, pictures, batch_size, max_new_tokens), len(pictures)):
        if check.equal:
            counts["equal"] += 1
            continue
        if check.error is not None:
            counts["unreadable"] += 1
            verdict = f"unreadable: {check.error}"
        elif check.difference is None:
            counts["different"] += 1
            verdict = "equal tokens, different text"
        else:
            kind = "tie" if check.difference.is_tie else "different"
            counts[kind] += 1
            verdict = f"{kind} {_describe(check.difference)}"
        typer.echo(f"{escape(check.path or '')}\t{verdict}")
    compared = len(pictures) - counts["unreadable"]
    typer.echo(
        f"{counts['equal']} of {compared} rows equal to transformers, {counts['tie']} ties, "
        f"{counts['different']} different, {counts['unreadable']} unreadable "
        f"({ocr.model.cross_memory}, {str(ocr.model.dtype).removeprefix('torch.')}, {ocr.model.device})"
    )
    passed = counts["equal"] + (counts["tie"] if allow_ties else 0)
    if passed < len(pictures) or compared == 0:
        raise typer.Exit(FAILED)


@app.command()
def evaluate(
    paths: Paths,
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    cross_memory: CrossMemoryOption = "auto",
    batch_size: BatchOption = 16,
    workers: WorkersOption = None,
    max_new_tokens: TokensOption = None,
    pixels: PixelsOption = "sane",
    max_image_mpixels: MpixelsOption = None,
    max_file_bytes: BytesOption = None,
    picture_format: FormatsOption = None,
    worst: Annotated[int, typer.Option(min=0, metavar="N", help="Name the N worst lines on stderr.")] = 5,
    show_lines: Annotated[bool, typer.Option("--lines", help="Print what was read, too, as `read` does.")] = False,
) -> None:
    """Character and word error rate against NAME.gt.txt beside each picture, or a labels.csv, .tsv or .jsonl."""
    from trocr_fast.metrics import LABEL_SUFFIXES, find_truths, require_jiwer
    from trocr_fast.metrics import evaluate as compare
    from trocr_fast.sources import find_pictures
    from trocr_fast.writers import open_writer

    require_jiwer()  # before anything is read
    found: list[str] = []
    for path in paths:  # a labels file names its pictures itself
        found.extend([path] if path.lower().endswith(LABEL_SUFFIXES) else find_pictures([path]))
    truths = find_truths(map(Path, found))
    limits = _limits(max_image_mpixels, max_file_bytes, picture_format)
    ocr = _load(model, revision, device, dtype, cross_memory, pixels, limits)
    pictures = [str(truth.path) for truth in truths]
    lines = ocr.read(pictures, batch_size=batch_size, max_new_tokens=max_new_tokens, num_workers=workers)
    read_lines: list[Line] = []
    writer = open_writer("text", sys.stdout)
    for line in _progress(lines, len(pictures)):
        read_lines.append(line)
        if show_lines:
            writer.write(line)
    writer.close()
    report = compare([truth.text for truth in truths], read_lines, worst)
    for wrong in report.worst:
        found_text = f"unreadable: {wrong.error}" if wrong.text is None else repr(wrong.text)
        _note(f"{wrong.path}: {wrong.num_edits} wrong: expected {wrong.truth!r}, read {found_text}")
    score = report.score
    typer.echo(
        f"CER {score.cer:.2%}  WER {score.wer:.2%}  equal {score.num_equal} of {score.num_lines} lines  "
        f"unreadable {score.num_errors}  characters {score.num_characters}"
    )
    if score.num_errors:
        raise typer.Exit(FAILED)


@app.command()
def bench(
    paths: Paths,
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    cross_memory: CrossMemoryOption = "auto",
    batch_size: BatchOption = 16,
    max_new_tokens: TokensOption = None,
    pixels: PixelsOption = "sane",
    max_image_mpixels: MpixelsOption = None,
    max_file_bytes: BytesOption = None,
    picture_format: FormatsOption = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Turns of each; the median counts.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Lines a second of this engine and of transformers, and how many lines have equal tokens."""
    from trocr_fast.benchmark import measure, table
    from trocr_fast.errors import PictureError
    from trocr_fast.sources import find_pictures
    from trocr_fast.verify import Reference
    from trocr_fast.writers import escape

    pictures = list(find_pictures(paths))
    limits = _limits(max_image_mpixels, max_file_bytes, picture_format)
    ocr = _load(model, revision, device, dtype, cross_memory, pixels, limits)
    loaded, num_unreadable = [], 0
    for path, picture in ocr.load_pictures(pictures):
        if isinstance(picture, PictureError):
            num_unreadable += 1
            _note(f"{escape(path or '')}: left out: {picture}")
        else:
            loaded.append(picture)
    if not loaded:
        raise UsageError(f"expected at least one picture that can be read, got {num_unreadable} that can't")
    reference = Reference(ocr.folder, ocr.model.device, ocr.model.config.generation.other)
    report = measure(ocr, reference, loaded, batch_size, repeats, max_new_tokens, _note)
    if as_json:
        typer.echo(json.dumps(report | {"num_unreadable": num_unreadable}))
    else:
        for line in table(report):
            typer.echo(line)
    if num_unreadable:
        raise typer.Exit(FAILED)


@app.command()
def info(
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    cross_memory: CrossMemoryOption = "auto",
) -> None:
    """Versions and devices; family, sizes and memory of a checkpoint, and what will run where."""
    from trocr_fast.info import describe

    for name, value in describe(_load(model, revision, device, dtype, cross_memory, "sane", {})):
        typer.echo(f"{name:<24}{value}")


def _limits(max_image_mpixels: float | None, max_file_bytes: int | None, formats: list[str] | None) -> dict[str, Any]:
    """Those that were given, by their names in `TrOCR.from_pretrained`."""
    given = {
        "max_image_mpixels": max_image_mpixels,
        "max_file_bytes": max_file_bytes,
        "formats": [name.upper() for name in formats] if formats else None,  # Pillow's names are in capitals
    }
    return {name: value for name, value in given.items() if value is not None}


def _load(
    model: str | None,
    revision: str | None,
    device: Device,
    dtype: Dtype,
    cross_memory: CrossMemory,
    pixels: Pixels,
    limits: dict[str, Any],
) -> "TrOCR":
    # What torch makes when it is imported stays; to look through it for garbage time and again is a tenth of the start.
    gc.disable()
    try:
        from trocr_fast.trocr import TrOCR

        return TrOCR.from_pretrained(
            model, revision=revision, device=device, dtype=dtype, cross_memory=cross_memory, pixels=pixels, **limits
        )
    finally:
        gc.enable()


def _progress(rows: Iterable[Any], total: int | None = None) -> Iterator[Any]:
    """The rows, and on a terminal a bar that makes room for what is printed about each."""
    if not sys.stderr.isatty():
        yield from rows
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="line", file=sys.stderr) as bar:
        for row in rows:
            bar.clear()
            yield row
            bar.update()


def _format_of(output: Path | None) -> str:
    ending = "" if output is None else output.suffix.removeprefix(".").lower()
    return ending if ending in ("jsonl", "csv", "tsv") else "text"


@contextmanager
def _output(path: Path | None, existing: Existing) -> Iterator[Any]:
    """The stream that rows go to. An OSError inside is the output's own, since pictures that can't be read are rows."""
    mode = "w" if existing == "overwrite" else "x"
    try:
        if path is None:
            yield sys.stdout
        else:
            with open(path, mode, encoding="utf-8", newline="") as stream:
                yield stream
    except FileExistsError:
        _stop(UNWRITABLE, f"{path} exists; pass --existing overwrite to replace it")
    except OSError as error:
        if path is None:  # or Python would fail again when it flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # who read our output has gone, and knows
            _note(f"{path or 'the output'} can't be written: {error.strerror or error}")
        raise typer.Exit(UNWRITABLE) from None


def _describe(difference: Any) -> str:
    ours, theirs = difference.our_token, difference.reference_token
    return (
        f"at position {difference.position}: ours {ours}, transformers {theirs}, "
        f"margin {difference.margin:.3g}, noise {difference.noise:.3g}"
    )


def _note(message: str) -> None:
    typer.echo(f"trocr-fast: {message}", err=True)


def _stop(status: int, message: str) -> NoReturn:
    _note(message)
    raise typer.Exit(status)


def main() -> None:
    """Entry point: runs a command and turns what the user can mend into one line and an exit status."""
    warnings.showwarning = lambda message, *rest, **more: _note(f"warning: {message}")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        # Whatever the locale says: texts are in any script.
        getattr(sys, name).reconfigure(encoding="utf-8", errors="backslashreplace", newline="")
    try:
        app()
    except TrocrFastError as error:
        _note(str(error))
        sys.exit(MISSING if isinstance(error, ImportError) else USAGE)
