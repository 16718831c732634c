"""The training curve of a run as a table for the model card.

python examples/train_builtin/curve.py .train/run/log.jsonl [--rows 8]
"""

import argparse
import json
from pathlib import Path


def evaluated(log: Path, rows: int) -> list[dict]:
    """About `rows` of the log's rows that were evaluated, evenly spread over the minutes; the last one always."""
    found = [row for row in map(json.loads, log.read_text().splitlines()) if "cer_ctc" in row]
    times = [(number + 1) * found[-1]["seconds"] / rows for number in range(rows)]
    nearest = [min(range(len(found)), key=lambda i: abs(found[i]["seconds"] - time)) for time in times]
    return [found[i] for i in sorted(set(nearest))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    args = parser.parse_args()
    print("| step | lines | minutes | characters up to | decoder loss, nats a token | CER, CTC head | CER, decoder |")
    print("|---" * 7 + "|")
    for row in evaluated(args.log, args.rows):
        loss = f"{row['ce']:.2g}" if "ce" in row else ""
        rates = " | ".join(f"{100 * row[key]:.3g} %" if key in row else "" for key in ("cer_ctc", "cer"))
        minutes = round(row["seconds"] / 60)
        print(f"| {row['step']:,} | {row['lines']:,} | {minutes} | {row['max_length']} | {loss} | {rates} |")


if __name__ == "__main__":
    main()
