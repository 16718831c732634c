"""How well the built-in model reads, and what its confidence is worth.

    python -m bench.builtin_model --inside rendered=.train/eval --outside greek=.train/outside/greek

PATH is a folder of pictures or a .txt list of them, NAME.gt.txt beside each picture. What is "inside" the model can
read; for it the confidence is held against what was read right. Of what is "outside" it should be low. Writes
bench/results/builtin_model.json, unless --model names another model.
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np
import torch

from bench import report
from trocr_fast import TrOCR
from trocr_fast.metrics import Score, evaluate, find_truths, require_jiwer
from trocr_fast.sources import find_pictures

BINS = {
    "confidence": (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0),
    "line_chance": (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0),
}
THRESHOLDS = {
    "confidence": (0.5, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99),
    "line_chance": (0.01, 0.05, 0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9),
}
REVIEWED = 0.1  # share of lines that somebody looks at, the least confident first
BATCH = 16


@dataclass(frozen=True)
class Reading:
    """What was read of one set of pictures.

    `sure` holds by name what the model says of each line: its confidence, which is a mean over the tokens, and the
    chance that the whole line is right, which is the product. `right` are the lines without one wrong character.
    """

    score: Score
    texts: list[tuple[str, str]]  # what is on the picture, what was read
    sure: dict[str, np.ndarray]  # [lines] each
    right: np.ndarray  # [lines]
    truncated: np.ndarray  # [lines]
    seconds: float


def read(ocr: TrOCR, path: str) -> Reading:
    """Read a set and compare it with its truth; the first batch is read twice, the first time to warm up."""
    truths = find_truths(find_pictures([path]))
    pictures = [truth.path for truth in truths]
    list(ocr.read(pictures[:BATCH], batch_size=BATCH))
    start = time.perf_counter()
    lines = list(ocr.read(pictures, batch_size=BATCH))
    seconds = time.perf_counter() - start
    for line in lines:
        if line.error is not None:
            raise ValueError(f"{line.path}: {line.error}")
    found = evaluate([truth.text for truth in truths], lines, num_worst=len(lines))
    wrong = {row.path for row in found.worst}
    confidence = np.array([line.confidence for line in lines])
    tokens = np.array([len(line.token_ids) - 1 for line in lines])  # the end token included
    return Reading(
        score=found.score,
        texts=[(truth.text, line.text or "") for truth, line in zip(truths, lines, strict=True)],
        sure={"confidence": confidence, "line_chance": confidence**tokens},
        right=np.array([line.path not in wrong for line in lines]),
        truncated=np.array([line.truncated for line in lines]),
        seconds=seconds,
    )


def summary(reading: Reading) -> dict[str, Any]:
    """CER, speed, and how sure the model was."""
    score = reading.score
    found: dict[str, Any] = {
        "lines": score.num_lines,
        "characters": score.num_characters,
        "cer": _round(score.cer) if score.num_characters else None,
        "wer": _round(score.wer) if score.num_characters else None,
        "exact": _round(reading.right.mean()),
        "truncated": _round(reading.truncated.mean()),
        "lines_per_s": round(score.num_lines / reading.seconds, 1),
    }
    for name, values in reading.sure.items():
        p5, median, p95 = (_round(value) for value in np.quantile(values, (0.05, 0.5, 0.95)))
        below = {str(threshold): _round((values < threshold).mean()) for threshold in THRESHOLDS[name]}
        found[name] = {"p5": p5, "median": median, "p95": p95, "below": below}
    return found


def calibration(predicted: np.ndarray, right: np.ndarray, edges: Sequence[float]) -> dict[str, Any]:
    """Predictions [lines] against what was right [lines]: bins, and the expected calibration error over them.

    A bin holds its lower edge, the last one its upper edge, too.
    """
    place = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, len(edges) - 2)
    bins = []
    for number, (low, high) in enumerate(pairwise(edges)):
        inside = place == number
        if inside.any():
            bins.append(
                {
                    "from": low,
                    "to": high,
                    "lines": int(inside.sum()),
                    "mean": _round(predicted[inside].mean()),
                    "exact": _round(right[inside].mean()),
                }
            )
    error = sum(row["lines"] * abs(row["mean"] - row["exact"]) for row in bins) / len(predicted)
    return {"ece": _round(error), "bins": bins}


def ranking(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """How well the order of the confidences [lines] finds the wrong lines; None where all are alike.

    `auroc` is the chance that a right line has a higher confidence than a wrong one.
    """
    good, bad = confidence[right], confidence[~right]
    if not len(good) or not len(bad):
        return {"auroc": None, "wrong_found_in_least_confident_tenth": None}
    higher = (good[:, None] > bad).mean() + 0.5 * (good[:, None] == bad).mean()
    looked_at = np.argsort(confidence, kind="stable")[: round(REVIEWED * len(confidence))]
    return {
        "auroc": _round(higher),
        "wrong_found_in_least_confident_tenth": _round((~right[looked_at]).sum() / len(bad)),
    }


def review(confidence: np.ndarray, right: np.ndarray, thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """What one gets by looking at every line below a threshold."""
    rows = []
    for threshold in thresholds:
        below = confidence < threshold
        rows.append(
            {
                "threshold": threshold,
                "below": _round(below.mean()),
                "wrong_found": _round((below & ~right).sum() / (~right).sum()) if (~right).any() else None,
                "exact_of_the_rest": _round(right[~below].mean()) if (~below).any() else None,
            }
        )
    return rows


def confusions(texts: list[tuple[str, str]], count: int = 12) -> dict[str, int]:
    """The commonest mistakes and how often: a character on the picture, and what was read for it; '' if nothing."""
    found: Counter[tuple[str, str]] = Counter()
    wrong = [pair for pair in texts if pair[0] and pair[0] != pair[1]]
    if not wrong:
        return {}
    alignments = require_jiwer().process_characters(*map(list, zip(*wrong, strict=True))).alignments
    for (truth, text), alignment in zip(wrong, alignments, strict=True):
        for chunk in alignment:
            if chunk.type != "equal":
                was = truth[chunk.ref_start_idx : chunk.ref_end_idx]
                became = text[chunk.hyp_start_idx : chunk.hyp_end_idx]
                found.update(zip_longest(was, became, fillvalue=""))
    return {f"{was!r} as {became!r}": number for (was, became), number in found.most_common(count)}


def judged(reading: Reading) -> dict[str, Any]:
    """The summary of a set that the model is made for, and how well it knows its mistakes."""
    found = summary(reading)
    for name, values in reading.sure.items():
        found[name] |= {
            "calibration": calibration(values, reading.right, BINS[name]),
            "ranking": ranking(values, reading.right),
            "review": review(values, reading.right, THRESHOLDS[name]),
        }
    return found | {"confusions": confusions(reading.texts)}


def show(name: str, found: dict[str, Any]) -> None:
    """The tables of one set."""
    rates = "" if found["cer"] is None else f"CER {found['cer']:.2%}  WER {found['wer']:.2%}  "
    print(
        f"\n{name}: {found['lines']} lines  {rates}exact {found['exact']:.1%}  truncated {found['truncated']:.1%}  "
        f"{found['lines_per_s']} lines/s"
    )
    for kind in BINS:
        part = found[kind]
        print(f"  {kind}: 5 % below {part['p5']:.3f}, median {part['median']:.3f}, 5 % above {part['p95']:.3f}")
        if "review" not in part:
            print("    below  " + "  ".join(f"{threshold}: {share:.0%}" for threshold, share in part["below"].items()))
            continue
        print(f"    ECE {part['calibration']['ece']:.3f}, {', '.join(f'{k} {v}' for k, v in part['ranking'].items())}")
        for row in part["calibration"]["bins"]:
            print(
                f"    {row['from']:.3f} to {row['to']:.3f}: {row['lines']:>5} lines, mean {row['mean']:.3f}, "
                f"exact {row['exact']:.1%}"
            )
        print("    threshold   lines below   wrong lines found   exact of the rest")
        for row in part["review"]:
            shares = (row["below"], row["wrong_found"], row["exact_of_the_rest"])
            print(f"    {row['threshold']:>9}" + "".join(f"{'' if x is None else f'{x:.1%}':>16}" for x in shares))
    if "confusions" in found:
        print("  mistakes: " + ", ".join(f"{pair} {n}" for pair, n in found["confusions"].items()))


def _round(value: float) -> float:
    return round(float(value), 5)


def _set(argument: str) -> tuple[str, str]:
    name, equals, path = argument.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {argument!r}")
    return name, path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inside", nargs="+", type=_set, required=True, metavar="NAME=PATH")
    parser.add_argument("--outside", nargs="+", type=_set, default=[], metavar="NAME=PATH")
    parser.add_argument("--model", help="a checkpoint to try in place of the built-in model; nothing is written")
    arguments = parser.parse_args()
    ocr = TrOCR.from_pretrained(arguments.model, device="cpu")
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "inside": {}, "outside": {}}
    for side, judge in (("inside", judged), ("outside", summary)):
        for name, path in getattr(arguments, side):
            found[side][name] = judge(read(ocr, path))
            show(name, found[side][name])
    if arguments.model is None:
        print(f"\nwritten to {report.write('builtin_model', found).relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
