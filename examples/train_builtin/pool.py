"""Rendering ahead: a child process fills shards on disk, and batches are drawn from them at random.

A shard is a pair of files, `NNNNNN.images.npy` uint8 [SHARD, H, W, 3] and `NNNNNN.texts.json` (the texts).
The newest `KEEP` shards stay; a line is seen about `reuse` times before it is replaced.
"""

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np

SHARD = 1024
KEEP = 40  # of 113 MB each, so that all of them stay in memory


class Pool:
    """Draws batches from the shards in `folder` while a child process renders new ones."""

    def __init__(
        self, folder: Path, image_size: tuple[int, int], seed: int, reuse: float, degrade: float, max_length: int
    ) -> None:
        self.folder, self.reuse = folder, reuse
        folder.mkdir(parents=True, exist_ok=True)
        self.shards: dict[int, tuple[np.ndarray, list[str]]] = {}
        self.lengths = np.zeros(0, np.int64)  # [lines]; one entry for each line of each open shard
        self.places = np.zeros((0, 2), np.int64)  # [lines, (shard, row)]
        self.seen = 0
        context = multiprocessing.get_context("spawn")
        self.wanted = context.Value("q", 8)  # shards to have rendered in this run
        arguments = (folder, image_size, seed, degrade, max_length, self.wanted)
        context.Process(target=_render_forever, args=arguments, daemon=True).start()

    def batch(self, count: int, max_length: int, rng: random.Random) -> tuple[np.ndarray, list[str]]:
        """`count` random lines of at most `max_length` characters: uint8 [count, H, W, 3] and their texts.

        They are of similar length, one of four parts of what was drawn, so that the decoder pads little.
        """
        if self.seen % (64 * count) == 0:
            self._refresh()
        self.seen += count
        self.wanted.value = 8 + int(self.seen / self.reuse) // SHARD
        fitting = np.flatnonzero(self.lengths <= max_length)
        drawn = fitting[[rng.randrange(len(fitting)) for _ in range(4 * count)]]
        part = rng.randrange(4)
        drawn = drawn[np.argsort(self.lengths[drawn], kind="stable")][part * count : (part + 1) * count]
        chosen = self.places[drawn]
        images = np.stack([self.shards[shard][0][row] for shard, row in chosen])
        return images, [self.shards[shard][1][row] for shard, row in chosen]

    def _refresh(self) -> None:
        """Open new shards and forget those the renderer has removed; wait for the first ones."""
        while len(numbers := _numbers(self.folder)) < 4:
            time.sleep(0.5)
        for number in set(self.shards) - set(numbers):
            del self.shards[number]
        for number in numbers:
            if number not in self.shards:
                images, texts = _paths(self.folder, number)
                self.shards[number] = (np.load(images, mmap_mode="r"), json.loads(texts.read_text()))
        self.lengths = np.array([len(t) for n in sorted(self.shards) for t in self.shards[n][1]], np.int64)
        self.places = np.array([(n, row) for n in sorted(self.shards) for row in range(SHARD)], np.int64)


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:06d}.images.npy", folder / f"{number:06d}.texts.json"


def _numbers(folder: Path) -> list[int]:
    """Complete shards: the texts are written last and removed first."""
    return sorted(int(path.name[:6]) for path in folder.glob("*.texts.json"))


def _render_forever(
    folder: Path, image_size: tuple[int, int], seed: int, degrade: float, max_length: int, wanted
) -> None:
    """The child: one shard after another, numbered on from those on disk, never more than `wanted` ahead."""
    import render

    os.nice(5)
    parent = os.getppid()
    number = max(_numbers(folder), default=-1) + 1
    lines = render.Lines("train", seed=1000 * seed + number, degrade=degrade, max_length=max_length)
    done = 0
    while os.getppid() == parent:
        if done >= wanted.value:
            time.sleep(0.2)
            continue
        images = np.empty((SHARD, *image_size, 3), np.uint8)
        texts = []
        for row in range(SHARD):
            picture, text = lines.draw()
            images[row] = render.squash(picture, *image_size)
            texts.append(text)
        images_path, texts_path = _paths(folder, number)
        np.save(images_path, images)
        temporary = texts_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(texts, ensure_ascii=False))
        temporary.rename(texts_path)
        for old in _numbers(folder)[:-KEEP]:
            for path in reversed(_paths(folder, old)):
                path.unlink()
        number, done = number + 1, done + 1
