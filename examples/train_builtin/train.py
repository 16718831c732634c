"""Trains the small built-in model on rendered lines; stop it at any time and run the same command to go on.

    python examples/train_builtin/train.py --work .train/run --budget-minutes 100

The encoder first learns to read by itself, with a CTC head on its column tokens that is thrown away at
export; the decoder joins when that works. Lines start short and grow. The learning rate follows the minutes
trained, not the steps, so that it ends with the budget however busy the machine is.
"""

import argparse
import json
import math
import random
import signal
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import jiwer
import model as shape
import numpy as np
import render
import torch
import torch.nn.functional as F
from PIL import ImageFont
from pool import Pool
from text import MAX_LENGTH

DEV_LINES = 256
FIRST_LENGTH = 8  # characters; an untrained model aligns on short lines first


@dataclass
class Progress:
    """What a run has done so far; saved with the weights."""

    step: int = 0
    lines: int = 0
    seconds: float = 0.0
    ctc_loss: float = 9.0  # running mean, nats a character
    guide_loss: float = 9.0  # running mean, nats a column; stays as it is once it is low enough
    max_length: int = FIRST_LENGTH
    joint: bool = False  # whether the decoder is trained too


def learning_rate(progress: Progress, peak: float, budget: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then a cosine over the budget's seconds to 1 % of the peak."""
    share = min(1.0, progress.seconds / budget)
    return peak * min(1.0, (progress.step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in -1 to 1, as the image processor does."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_tokens(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Character ids [B, longest] padded with PAD, and lengths [B]."""
    ids = [torch.tensor(shape.encode(text)) for text in texts]
    lengths = torch.tensor([len(row) for row in ids])
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=shape.PAD), lengths


def letters_over(texts: list[str], columns: int) -> torch.Tensor:
    """Token ids of the characters that stand over each column in a usual typeface: int64 [B, columns]."""
    font = _usual_typeface()
    rows = []
    for text in texts:
        edges = torch.tensor([font.getlength(character) for character in text]).cumsum(0)
        centres = (torch.arange(columns) + 0.5) * edges[-1] / columns
        rows.append(torch.tensor(shape.encode(text))[torch.searchsorted(edges, centres)])
    return torch.stack(rows)


@cache
def _usual_typeface() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=100)


class Trainer:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.progress = args, Progress()
        self.rng = random.Random(args.seed)
        torch.manual_seed(args.seed)
        self.model = shape.build(
            args.width, args.encoder_layers, args.decoder_layers, args.heads, tuple(args.image_size)
        )
        self.model.set_attn_implementation("eager")  # on a CPU in bf16, several times the speed of sdpa's backward
        self.ctc_head = torch.nn.Linear(args.width, len(shape.VOCABULARY))
        self.parameters = [*self.model.parameters(), *self.ctc_head.parameters()]
        matrices = [p for p in self.parameters if p.ndim == 2]
        others = [p for p in self.parameters if p.ndim != 2]
        groups = [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)
        self.checkpoint = args.work / "checkpoint.pt"
        if self.checkpoint.exists():
            self.load()
        elif args.start_from:
            self.start_from(args.start_from)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, 3, H, W] to states [B, 1 + columns, width], CTC log-probabilities [B, columns, vocabulary]."""
        with torch.autocast("cpu", torch.bfloat16):
            states = self.model.encoder(pixel_values=pixels).last_hidden_state
            logits = self.ctc_head(states[:, 1:])
        return states, logits.float().log_softmax(-1)

    def losses(self, images: np.ndarray, texts: list[str]) -> dict[str, torch.Tensor]:
        """CTC loss in nats a character; the guide's in nats a column and the decoder's in nats a token, while used."""
        tokens, lengths = to_tokens(texts)
        states, log_probs = self.encode(to_pixels(images))
        columns = log_probs.shape[1]
        losses = {}
        losses["ctc"] = (
            F.ctc_loss(
                log_probs.transpose(0, 1),
                tokens,
                torch.full_like(lengths, columns),
                lengths,
                blank=shape.PAD,
                reduction="sum",
                zero_infinity=True,
            )
            / lengths.sum()
        )
        if self.progress.guide_loss > self.args.guide_above:
            losses["guide"] = F.nll_loss(log_probs.flatten(0, 1), letters_over(texts, columns).flatten())
        if not self.progress.joint:
            return losses
        edge = torch.full((len(texts), 1), shape.EOS)
        inputs = torch.cat([edge, tokens], dim=1)  # [B, 1 + longest]: the start token is EOS, as in TrOCR
        targets = torch.cat([tokens, torch.full_like(edge, shape.PAD)], dim=1)
        targets[torch.arange(len(texts)), lengths] = shape.EOS
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model.decoder(input_ids=inputs, encoder_hidden_states=states, use_cache=False).logits
        losses["ce"] = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets.flatten(),
            ignore_index=shape.PAD,
            label_smoothing=self.args.label_smoothing,
        )
        return losses

    def step(self, pool: Pool) -> dict[str, float]:
        progress, args = self.progress, self.args
        rate = learning_rate(progress, args.learning_rate, args.budget_minutes * 60, args.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self.losses(*pool.batch(args.batch, progress.max_length, self.rng))
        weights = {"ctc": args.ctc_weight if progress.joint else 1.0}
        if "guide" in losses:  # alone: CTC begins with predicting nothing anywhere, and holds on to it for long
            weights["ctc"] = 0.0
            progress.guide_loss += 0.02 * (losses["guide"].item() - progress.guide_loss)
        torch.stack([weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        progress.lines += args.batch
        progress.ctc_loss += 0.02 * (losses["ctc"].item() - progress.ctc_loss)
        if progress.ctc_loss < args.grow_below and progress.step % 20 == 0:
            progress.max_length = min(args.max_length, progress.max_length + 1)
        if progress.ctc_loss < args.joint_below or progress.seconds > 0.25 * args.budget_minutes * 60:
            progress.joint = True
        return {name: loss.item() for name, loss in losses.items()} | {"norm": norm.item(), "lr": rate}

    @torch.no_grad()
    def evaluate(self, images: np.ndarray, texts: list[str]) -> dict[str, float]:
        """CER of the CTC head's best path, and (first 128 lines) of the decoder's greedy text."""
        self.model.eval()
        best_path, generated = [], []
        for start in range(0, len(texts), 64):
            pixels = to_pixels(images[start : start + 64])
            for row in self.encode(pixels)[1].argmax(-1).tolist():
                best_path.append([a for a, b in zip(row, [shape.PAD, *row], strict=False) if a != b])
            if self.progress.joint and start < 128:
                generated += self.model.generate(pixels, do_sample=False).tolist()
        self.model.train()
        result = {"cer_ctc": jiwer.cer(texts, [shape.decode(row) for row in best_path])}
        if generated:
            result["cer"] = jiwer.cer(texts[: len(generated)], [shape.decode(row) for row in generated])
        return result

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "ctc_head": self.ctc_head.state_dict(),
            "config": {key: str(value) for key, value in vars(self.args).items()},
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "random": self.rng.getstate(),
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.rename(self.checkpoint)

    def load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ctc_head.load_state_dict(state["ctc_head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        version, internal, gauss = state["random"]
        self.rng.setstate((version, tuple(internal), gauss))

    def start_from(self, checkpoint: Path) -> None:
        """Begin with the weights of another run, made for shorter lines; its optimiser and its clock stay behind."""
        state = torch.load(checkpoint, weights_only=True)
        shape.start_from(self.model, state["model"])
        self.ctc_head.load_state_dict(state["ctc_head"])
        done = state["progress"]
        self.progress = Progress(**{name: done[name] for name in ("ctc_loss", "guide_loss", "max_length", "joint")})

    def run(self) -> None:
        args, progress = self.args, self.progress
        image_size = tuple(args.image_size)
        development = development_lines(args.degrade, image_size, args.max_length)
        pool = Pool(args.work / "shards", image_size, args.seed, args.reuse, args.degrade, args.max_length)
        window: list[dict[str, float]] = []
        stop: list[int] = []  # the signal that asked to stop; the step under way is finished first
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _: stop.append(received))
        last = time.monotonic()
        while progress.seconds < args.budget_minutes * 60 and not stop:
            window.append(self.step(pool))
            now = time.monotonic()
            progress.seconds, last = progress.seconds + now - last, now
            if progress.step % args.log_every == 0:
                row = asdict(progress) | {k: float(np.mean([w[k] for w in window if k in w])) for k in window[-1]}
                window.clear()
                if progress.step % args.evaluate_every == 0:
                    row |= self.evaluate(*development)
                    self.save()
                log(args.work / "log.jsonl", row)
        if not stop:
            log(args.work / "log.jsonl", asdict(progress) | self.evaluate(*development))
        self.save()


def development_lines(degrade: float, image_size: tuple[int, int], max_length: int) -> tuple[np.ndarray, list[str]]:
    """Lines in held-out fonts to follow the training by: uint8 [DEV_LINES, H, W, 3] and texts."""
    lines = render.Lines("held-out", seed=1, degrade=degrade, max_length=max_length)
    pictures, texts = zip(*(lines.draw() for _ in range(DEV_LINES)), strict=True)
    return np.stack([render.squash(picture, *image_size) for picture in pictures]), list(texts)


def log(path: Path, row: dict) -> None:
    """One JSON line to the file and to the terminal."""
    line = json.dumps({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()})
    with path.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint, the log and the shards")
    parser.add_argument(
        "--budget-minutes", type=float, required=True, help="training time in all, resumed runs included"
    )
    parser.add_argument("--start-from", type=Path, help="checkpoint.pt of a run on shorter lines to begin with")
    parser.add_argument("--image-size", type=int, nargs=2, default=shape.IMAGE_SIZE, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH, help="characters of a line")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--encoder-layers", type=int, default=5)
    parser.add_argument("--decoder-layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--warmup", type=int, default=300, help="steps")
    parser.add_argument("--ctc-weight", type=float, default=0.5)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--guide-above", type=float, default=2.6, help="loss of columns above which CTC waits")
    parser.add_argument("--grow-below", type=float, default=1.5, help="CTC loss under which lines grow longer")
    parser.add_argument("--joint-below", type=float, default=1.2, help="CTC loss under which the decoder joins")
    parser.add_argument("--reuse", type=float, default=2.0, help="how often a rendered line is seen")
    parser.add_argument("--degrade", type=float, default=0.7, help="share of spoiled lines; 0 is clean print, 1 rough")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--evaluate-every", type=int, default=1000)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    Trainer(arguments).run()
