"""Lines a second of the engine and of transformers: `python -m bench.throughput [--config base] [--batch 8] ...`.

Three workloads: a real configuration with random weights and so many new tokens a line (`--new-tokens`), the same with
lengths as on IAM (`--lengths iam`), and the built-in model on the sample pictures with the lengths that it finds
(`--config builtin`), from uint8 pictures in host memory and once more from files. All take turns in one process, and
every row says which share of its lines has the tokens that transformers gives as shipped in fp32.

transformers with a cache gets its lines sorted by length, also where it could not know the lengths beforehand, and is
judged at the best of the batches tried. Results are added to bench/results/throughput_cpu.json (or _gpu.json); a
configuration measured again replaces its older entry. The plot beside it is made from all entries.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench import report
from bench.generation import (
    CACHED,
    DTYPES,
    FOLDERS,
    IAM_LENGTHS,
    NO_GRAPHS,
    OURS,
    SHIPPED,
    WHOLE_BATCHES,
    Contestant,
    Maker,
    Ours,
    Rows,
    Subject,
    TimedEngine,
    Workload,
    builtin_workload,
    choose_device,
    choose_dtype,
    contestants,
    example_paths,
    load_subject,
    random_workload,
    reference_rows,
    wait_for,
    what_went_wrong,
)
from trocr_fast.trocr import TrOCR

REPEATS = 3
SLOW_S = 20.0  # a rival that takes longer is run twice only
SLOW_REPEATS = 2
COMPARED_ON_A_GPU = 64  # lines: the reference in fp32 takes longer there than all that is timed
FROM_FILES = "from files"
REPEATS_SAID = (
    "medians of `seconds`; after a warm-up (a GPU: two batches, a CPU: one line) all take turns; a rival that takes "
    f"longer than {SLOW_S:g} s has {SLOW_REPEATS} of them at most"
)
NO_TIME = "no time left"


class Entrant:
    """A contestant in its turns, at one batch size."""

    def __init__(self, maker: Maker, batch: int) -> None:
        self.name, self.batch, self._maker = maker.name, batch, maker
        self.contestant: Contestant | None = None
        self.seconds: list[float] = []
        self.rows: Rows = []
        self.failure: str | None = None
        self.inside: dict[str, Any] = {}  # of our engine: where the time goes

    def try_to(self, work: Callable[[], Any], deadline: float) -> None:
        """A turn, if it has not failed and there is time."""
        if self.failure is not None:
            return
        if time.perf_counter() > deadline:
            self.failure = None if self.seconds else NO_TIME
            return
        try:
            work()
        except Exception as error:  # a rival that does not work here is a row that says so
            self.failure = what_went_wrong(error)
            self.contestant = None  # and its memory is free again

    def warm_up(self, workload: Workload) -> None:
        self.contestant = self._maker()
        # A GPU: all shapes that come up, twice a batch so that lines join and leave.
        self.contestant(workload.first(2 * self.batch) if self._on_gpu else workload.first(1, 2))

    def take_turn(self, workload: Workload) -> None:
        seconds = self._timed(workload)
        self.seconds.append(seconds)
        if not self._on_gpu:
            self._look_inside(seconds)

    def find_inside(self, workload: Workload) -> None:
        """On a GPU, how long encoding and decoding take is known only to who waits for each: a run of its own."""
        engine = self._engine
        if engine is not None and self._on_gpu:
            engine.waits = True
            self._look_inside(self._timed(workload))
            engine.waits = False

    @property
    def _engine(self) -> TimedEngine | None:
        return self.contestant.engine if isinstance(self.contestant, Ours) else None

    @property
    def _on_gpu(self) -> bool:
        assert self.contestant is not None
        return self.contestant.subject.network.device.type == "cuda"

    def _timed(self, workload: Workload) -> float:
        assert self.contestant is not None
        if self._engine is not None:
            self._engine.start_counting()
        device = self.contestant.subject.network.device
        wait_for(device)
        start = time.perf_counter()
        self.rows = self.contestant(workload)
        wait_for(device)
        return time.perf_counter() - start

    def _look_inside(self, seconds: float) -> None:
        engine = self._engine
        if engine is not None:
            self.inside = {
                "share_of_time": {part: round(spent / seconds, 3) for part, spent in engine.seconds.items()},
                "decode_steps": engine.num_steps,
                "lines_a_step": round(engine.num_lines_fed / max(1, engine.num_steps), 2),
            }

    def is_due(self, turn: int) -> bool:
        is_rival = self.name not in (OURS, WHOLE_BATCHES, NO_GRAPHS)
        return not (is_rival and turn >= SLOW_REPEATS and max(self.seconds, default=0.0) > SLOW_S)

    def result(self, expected: Rows) -> dict[str, Any]:
        """A row of the JSON."""
        row: dict[str, Any] = {"contestant": self.name, "batch": self.batch}
        if not self.seconds:
            return row | {"failed": self.failure or NO_TIME}
        median = statistics.median(self.seconds)
        num_tokens = sum(len(tokens) - 1 for tokens in self.rows)
        equal = sum(found == wanted for found, wanted in zip(self.rows, expected, strict=False)) / len(expected)
        row |= {
            "lines_s": significant(len(self.rows) / median),
            "tokens_s": significant(num_tokens / median),
            "seconds": [significant(seconds) for seconds in self.seconds],
            "equal_share": round(equal, 4),
        }
        row |= self.inside
        if self.failure is not None:
            row["stopped_by"] = self.failure
        return row


def measure(
    subject: Subject,
    workload: Workload,
    batches: Iterable[int],
    repeats: int = REPEATS,
    deadline: float = float("inf"),
    skip: Iterable[str] = (),
    more: Callable[[int], list[Maker]] = lambda batch: [],
) -> dict[str, Any]:
    """All contestants on one workload.

    Args:
        repeats: turns of each.
        deadline: of `time.perf_counter`; what has not begun by then is left out, and says so.
        skip: names of contestants to leave out.
        more: further contestants at a batch size.

    Returns:
        What the JSON holds of it, but what the workload is.
    """
    batches = list(batches)
    on_gpu = subject.network.device.type == "cuda"
    num_compared = min(len(workload.pictures), COMPARED_ON_A_GPU if on_gpu else len(workload.pictures))
    expected: Rows = []
    if workload.new_tokens is None:  # lengths have to be known for sorting
        expected = reference_rows(subject, workload, max(batches), len(workload.pictures))
    lengths = workload.new_tokens or [len(tokens) for tokens in expected]

    entrants = [
        Entrant(maker, batch)
        for batch in batches
        for maker in [*contestants(subject, workload, batch, lengths), *more(batch)]
        if maker.name not in skip
    ]
    for entrant in entrants:
        entrant.try_to(lambda entrant=entrant: entrant.warm_up(workload), deadline)  # type: ignore[misc]
    for turn in range(repeats):
        for entrant in entrants:
            if entrant.is_due(turn):
                entrant.try_to(lambda entrant=entrant: entrant.take_turn(workload), deadline)  # type: ignore[misc]
    for entrant in entrants:
        if on_gpu:
            entrant.try_to(lambda entrant=entrant: entrant.find_inside(workload), deadline)  # type: ignore[misc]

    if not expected:
        # In fp32 the run as shipped is the reference; it takes too long on a CPU to be done once more.
        same = [one.rows for one in entrants if one.name == SHIPPED and subject.model is subject.reference and one.rows]
        expected = same[-1] if same else reference_rows(subject, workload, max(batches), num_compared)
    num_new = workload.new_tokens or [len(tokens) - 1 for tokens in expected]
    return {
        "num_lines": len(workload.pictures),
        "mean_new_tokens": round(statistics.mean(num_new), 2),
        "max_new_tokens": max(num_new),
        "compared_lines": len(expected),
        "distinct_lines": len({tuple(tokens) for tokens in expected}),
        "cross_memory": subject.network.cross_memory,
        "threads": torch.get_num_threads(),
        "repeats": REPEATS_SAID,
        "rows": [entrant.result(expected) for entrant in entrants],
    }


def file_readers(ocr: TrOCR, subject: Subject, paths: list[Path]) -> Callable[[int], list[Maker]]:
    """From files to text: `TrOCR.read`, and transformers' processor with Pillow, generate and tokenizer.

    Their share of equal lines is less than one: of the sample pictures, three have alpha or 16 bits, which are lost on
    the stock way (`trocr_fast.image_modes`).
    """

    class OurReader(Contestant):
        def __call__(self, workload: Workload) -> Rows:
            part = paths[: len(workload.pictures)]
            longest = workload.max_new_tokens
            return [line.token_ids or [] for line in ocr.read(part, batch_size=self.batch, max_new_tokens=longest)]

    @cache
    def theirs_of_the_folder() -> tuple[Any, Any]:
        from transformers import AutoTokenizer
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        return ViTImageProcessorPil.from_pretrained(ocr.folder), AutoTokenizer.from_pretrained(ocr.folder)

    class TheirReader(Contestant):
        def __call__(self, workload: Workload) -> Rows:
            processor, tokenizer = theirs_of_the_folder()
            model, rows = subject.model, []
            part = paths[: len(workload.pictures)]
            for start in range(0, len(part), self.batch):
                pictures = [Image.open(path).convert("RGB") for path in part[start : start + self.batch]]
                pixels = processor(pictures, return_tensors="pt").pixel_values.to(model.device, model.dtype)
                found = model.generate(pixels, use_cache=True, max_new_tokens=workload.max_new_tokens)
                tokenizer.batch_decode(found, skip_special_tokens=True)
                rows += found.tolist()
            return [workload.cut(line, tokens, subject.end_tokens) for line, tokens in enumerate(rows)]

    def makers(batch: int) -> list[Maker]:
        ours, theirs = f"{OURS}, {FROM_FILES}", f"{CACHED}, {FROM_FILES}"
        return [
            Maker(ours, lambda: OurReader(ours, subject, batch)),
            Maker(theirs, lambda: TheirReader(theirs, subject, batch)),
        ]

    return makers


def significant(value: float) -> float:
    """Four digits are more than such times are worth."""
    return float(f"{value:.4g}")


KEY = ("configuration", "workload", "dtype", "num_beams", "batches", "num_lines")


def merged(old: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries with a new one in the place of what was measured before on the same workload."""
    kept = [entry for entry in old if any(entry[name] != new[name] for name in KEY)]
    return [*kept, new]


def write(name: str, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Add an entry to bench/results/NAME.json; gives all of them."""
    path = report.RESULTS / f"{name}.json"
    old = json.loads(path.read_text())["measurements"] if path.exists() else []
    # Each entry says its own circumstances: the file is put together from several runs.
    entries = merged(old, entry | {"circumstances": report.circumstances()})
    report.write(name, entries)
    return entries


def best(rows: Iterable[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The fastest row of a contestant."""
    return max(
        (r for r in rows if r["contestant"] == name and "lines_s" in r), key=lambda r: r["lines_s"], default=None
    )


def title(entry: dict[str, Any]) -> str:
    beams = "greedy" if entry["num_beams"] == 1 else f"beam {entry['num_beams']}"
    words = (entry["configuration"], entry["dtype"], entry["workload"], beams, f"{entry['num_lines']} lines")
    return ", ".join(words)


def table(entry: dict[str, Any]) -> str:
    """One entry: every contestant, how many times as fast ours is at the same batch, and a summary."""
    rows = entry["rows"]
    ours = {row["batch"]: row["lines_s"] for row in rows if row["contestant"] == OURS and "lines_s" in row}
    width = max(len(row["contestant"]) for row in rows)
    lines = [title(entry)]
    lines.append(f"  {'':<{width}}{'batch':>7}{'lines/s':>10}{'tokens/s':>10}{'ours is':>9}{'equal':>8}   of the time")
    for row in rows:
        start = f"  {row['contestant']:<{width}}{row['batch']:>7}"
        if "failed" in row:
            lines.append(f"{start}   {row['failed']}")
            continue
        ratio = f"{ours[row['batch']] / row['lines_s']:.2f}x" if row["batch"] in ours else "-"
        inside = ", ".join(f"{part} {share:.0%}" for part, share in row.get("share_of_time", {}).items())
        if inside:
            inside += f" ({row['decode_steps']} steps of {row['lines_a_step']:.1f} lines)"
        numbers = f"{row['lines_s']:>10.4g}{row['tokens_s']:>10.4g}{ratio:>9}{row['equal_share']:>8.1%}"
        lines.append(f"{start}{numbers}   {inside}".rstrip())
    found = best(rows, OURS)
    if found is not None:
        says = [f"  ours at its best, batch {found['batch']}: {found['lines_s']:.4g} lines/s"]
        for name in (CACHED, SHIPPED, WHOLE_BATCHES):
            rival = best(rows, name)
            if rival is not None:
                says.append(f"{found['lines_s'] / rival['lines_s']:.2f}x {name} (batch {rival['batch']})")
        lines.append(", ".join(says))
    return "\n".join(lines)


def plot(entries: list[dict[str, Any]], path: Path, heading: str) -> None:
    """Lines a second of all contestants, a panel an entry.

    Raises:
        ImportError: there is no matplotlib (the extra [bench]).
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sizes = [sum("lines_s" in row for row in entry["rows"]) for entry in entries]
    shown = [(entry, size) for entry, size in zip(entries, sizes, strict=True) if size]
    if not shown:
        return
    figure, panels = plt.subplots(
        len(shown),
        1,
        figsize=(10, 0.6 + sum(0.7 + 0.24 * size for _, size in shown)),
        height_ratios=[size + 1 for _, size in shown],
        squeeze=False,
        layout="constrained",
    )
    for axes, (entry, size) in zip(panels[:, 0], shown, strict=True):
        rows = [row for row in entry["rows"] if "lines_s" in row]
        colours = ["tab:gray" if row["contestant"].startswith("transformers") else "tab:blue" for row in rows]
        bars = axes.barh(range(size), [row["lines_s"] for row in rows], 0.75, color=colours)
        axes.bar_label(bars, [f"{row['lines_s']:.4g}" for row in rows], padding=3, fontsize=7)
        axes.set_yticks(range(size), [f"{row['contestant']}, batch {row['batch']}" for row in rows], fontsize=7)
        axes.set_ylim(size - 0.4, -0.6)  # the first on top
        axes.margins(x=0.1)
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(title(entry), fontsize=8, loc="left")
    panels[-1, 0].set_xlabel("lines/s", fontsize=8)
    figure.suptitle(heading, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default CUDA where there is one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="by default float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--config", nargs="+", choices=tuple(FOLDERS), default=["builtin"])
    parser.add_argument("--batch", nargs="+", type=int, help="lanes and batch sizes; by default 8, on a GPU 64")
    parser.add_argument("--beams", nargs="+", type=int, default=[1])
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--new-tokens", type=int, default=20, help="of each line, by default 20; not for builtin")
    how_long.add_argument("--lengths", choices=("iam",), help="prescribed lengths as on IAM; not for builtin")
    parser.add_argument(
        "--lines", type=int, help="by default one batch, of the largest; four with --lengths iam or a GPU"
    )
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME", help=f'contestants, such as "{SHIPPED}"')
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="begin nothing after so long")
    chosen = parser.parse_args(arguments)
    device = choose_device(chosen.device)
    dtype = choose_dtype(chosen.dtype, device)
    on_gpu = device.type == "cuda"
    batches = chosen.batch or [64 if on_gpu else 8]
    for name, values in (("--batch", batches), ("--beams", chosen.beams), ("--repeats", [chosen.repeats])):
        if min(values) < 1:
            parser.error(f"{name}: expected at least 1, got {min(values)}")
    deadline = time.perf_counter() + chosen.budget_seconds

    name = "throughput_gpu" if on_gpu else "throughput_cpu"
    entries: list[dict[str, Any]] = []
    for configuration in chosen.config:
        subject = load_subject(configuration, device, dtype)
        for num_beams in chosen.beams:
            num_lines = chosen.lines or max(batches) * (4 if chosen.lengths or on_gpu else 1)
            lengths, more = None, {}
            if configuration == "builtin":
                ocr = TrOCR.from_pretrained(device=device, dtype=dtype)
                paths = example_paths(chosen.lines or (4 * max(batches) if on_gpu else None))
                workload = builtin_workload(ocr, len(paths), num_beams)
                what = "the sample pictures"
                if num_beams == 1:  # `read` is greedy
                    more = {"more": file_readers(ocr, subject, paths)}
            elif chosen.lengths:
                workload = random_workload(subject, num_lines, None, num_beams)
                what, lengths = "lengths as on IAM", IAM_LENGTHS
            else:
                workload = random_workload(subject, num_lines, chosen.new_tokens, num_beams)
                what = f"{chosen.new_tokens} new tokens"
            entry = {
                "configuration": configuration,
                "workload": what,
                "dtype": str(dtype).removeprefix("torch."),
                "num_beams": num_beams,
                "batches": batches,
                "num_lines": len(workload.pictures),
                "lengths": lengths,
                "as_shipped": {"use_cache": subject.as_shipped},
            }
            entry |= measure(subject, workload, batches, chosen.repeats, deadline, chosen.skip, **more)
            entries = write(name, entry)
            print(table(entries[-1]), flush=True)
    print(f"added to {report.RESULTS / name}.json")
    where = entries[-1]["circumstances"]
    try:
        plot(entries, report.RESULTS / f"{name}.png", f"{where['gpu'] or where['processor']}, {where['cores']} cores")
    except ImportError as error:
        print(f"no plot: {error}")


if __name__ == "__main__":
    main()
