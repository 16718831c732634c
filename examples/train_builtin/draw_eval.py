"""Draws N evaluation lines: held-out fonts, held-out texts, a seed. A folder of pictures with NAME.gt.txt.

python examples/train_builtin/draw_eval.py OUT [--count 1000] [--seed 7] [--max-length 80] [--degrade 0.5]
"""

import argparse
from pathlib import Path

import render
from text import MAX_LENGTH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH, help="characters")
    parser.add_argument("--degrade", type=float, default=0.5, help="0 is clean print, 1 is rough")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = render.Lines("held-out", args.seed, args.degrade, args.max_length)
    for number in range(args.count):
        picture, text = lines.draw()
        path = args.out / f"line_{number:05d}.png"
        picture.save(path)
        path.with_suffix(".gt.txt").write_text(text + "\n", encoding="utf-8")
    print(f"{args.count} lines in {args.out}")


if __name__ == "__main__":
    main()
