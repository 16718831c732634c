"""What `bench.kernels` measured: the rows of a CSV, a table and a plot of them."""

import csv
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from bench import report

OURS = "ours"
CEILING = "ceiling"  # the kernel of rows that hold what the chip reaches


@dataclass(frozen=True)
class Row:
    """One line of the CSV: a provider's time of a case. Numbers that are not there are NaN, and empty in the CSV."""

    kernel: str
    case: str
    dtype: str
    provider: str
    median_us: float = math.nan
    p20_us: float = math.nan
    p80_us: float = math.nan
    gb_s: float = math.nan
    tflop_s: float = math.nan
    floor_us: float = math.nan
    share_of_floor: float = math.nan
    bound: str = ""  # memory or arithmetic
    correct: str = ""  # yes, or no: then nothing was timed
    timing: str = ""  # graph, or events and why
    note: str = ""

    @property
    def timed(self) -> bool:
        return not math.isnan(self.median_us)


class CsvFile:
    """Rows as they come, each with the machine, the versions and the commit."""

    def __init__(self, path: Path) -> None:
        where = report.circumstances()
        self.more = {
            "gpu": where["gpu"],
            "torch": torch.__version__,
            "triton": triton.__version__,
            "commit": where["commit"] + (" and changes" if where["uncommitted_changes"] else ""),
            "date": where["date"],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", newline="")
        names = [*(field.name for field in fields(Row)), *self.more]
        self.writer = csv.DictWriter(self.file, names, lineterminator="\n")
        self.writer.writeheader()
        self.file.flush()

    def add(self, row: Row) -> None:
        there = {name: "" if value != value else value for name, value in asdict(row).items()}
        self.writer.writerow(there | self.more)
        self.file.flush()


class Result(NamedTuple):
    """A case in one line; None where nothing right was timed."""

    kernel: str
    case: str
    floor_us: float
    bound: str
    ours: Row | None
    rival: Row | None  # the fastest


def results(rows: Iterable[Row]) -> list[Result]:
    """By kernel; the cases of each in the order in which they were measured."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.kernel != CEILING:
            grouped.setdefault((row.kernel, row.case), []).append(row)
    found = []
    for (kernel, case), group in sorted(grouped.items(), key=lambda item: item[0][0]):
        timed = sorted((row for row in group if row.timed), key=lambda row: row.median_us)
        ours = next((row for row in timed if row.provider == OURS), None)
        rival = next((row for row in timed if row.provider != OURS), None)
        found.append(Result(kernel, case, group[0].floor_us, group[0].bound, ours, rival))
    return found


def table(rows: Iterable[Row]) -> str:
    """The best of PyTorch, ours, the floor and the ratios of each case."""
    lines = [("kernel", "case", "best of PyTorch", "us", "ours us", "floor us", "share", "faster", "bound")]
    for kernel, case, floor, bound, ours, rival in results(rows):
        theirs = (rival.provider, f"{rival.median_us:.4g}") if rival else ("-", "-")
        own = f"{ours.median_us:.4g}" if ours else "WRONG"
        share = f"{ours.share_of_floor:.0%}" if ours else "-"
        faster = f"{rival.median_us / ours.median_us:.2f}x" if ours and rival else "-"
        lines.append((kernel, case, *theirs, own, f"{floor:.4g}", share, faster, bound))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = {0, 1, 2, 8}  # columns that begin at the left
    return "\n".join(
        "  ".join(
            text.ljust(width) if place in words else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def plot(rows: Iterable[Row], path: Path, title: str) -> None:
    """Shares of the floor: ours beside the best of PyTorch.

    Raises:
        ImportError: there is no matplotlib (the extra [bench]).
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found = results(rows)
    figure, axes = plt.subplots(figsize=(11, 1.5 + 0.24 * len(found)), layout="constrained")
    for row_of, label, colour, offset in (
        (lambda result: result.ours, OURS, "tab:blue", -0.2),
        (lambda result: result.rival, "the best of PyTorch", "tab:gray", 0.2),
    ):
        shown = [(place + offset, row.share_of_floor) for place, row in enumerate(map(row_of, found)) if row]
        axes.barh([place for place, _ in shown], [share for _, share in shown], 0.38, label=label, color=colour)
    axes.set_yticks(range(len(found)), [f"{one.kernel}  {one.case}  ({one.bound})" for one in found], fontsize=7)
    axes.set_ylim(max(1, len(found)) - 0.5, -0.5)  # the first on top
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("floor / time")
    axes.set_title(title, fontsize=9)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
