"""The rows of a decode batch: lanes that join, move, leave, come back and change their parents, held against lists."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from trocr_fast.checkpoint import BUILTIN
from trocr_fast.config import CheckpointConfig, DecoderConfig
from trocr_fast.lanes import FIRST_TOKENS, Lanes
from trocr_fast.paged_cache import OutOfBlocks, PagedStep

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONFIG: DecoderConfig = CheckpointConfig.from_folder(BUILTIN).decoder


def feed(step: PagedStep, values: Tensor) -> None:
    """Store [rows, heads, head_dim] in every layer, as keys, and negated as values."""
    for layer in range(CONFIG.num_layers):
        step.cache.write(layer, values + layer, -values - layer, step.slot_mapping)
    step.num_counted.add_(1)


def held(step: PagedStep) -> list[Tensor]:
    """What each row holds in its last layer: keys [heads, tokens, head_dim], checked against the values."""
    rows, layer = len(step.context_lens), CONFIG.num_layers - 1
    keys = torch.empty((rows, CONFIG.num_heads, step.longest, CONFIG.head_dim), device=step.context_lens.device)
    values = torch.empty_like(keys)
    step.cache.gather(layer, step.block_tables, step.context_lens, keys, values)
    assert torch.equal(keys, -values)
    return [keys[row, :, :length] - layer for row, length in enumerate(step.context_lens.tolist())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_every_row_holds_its_own_tokens_whatever_happens(device: str, num_beams: int) -> None:
    draw = random.Random(num_beams)
    lanes = Lanes(CONFIG, 6, num_beams, torch.float32, torch.device(device))
    model: list[list[list[Tensor]]] = []  # by lane and beam: the tokens
    away: list[tuple[object, list[list[Tensor]]]] = []
    happened = dict.fromkeys(("admit", "leave", "swap_out", "swap_in", "reorder"), 0)
    for number in range(4 * FIRST_TOKENS):
        what = draw.choice([*happened, "admit", "reorder"])
        if what == "admit" and len(model) < 6:
            lanes.admit(len(model))
            model.append([[] for _ in range(num_beams)])
        elif what in ("leave", "swap_out") and len(model) > 1:
            lane = draw.randrange(len(model))
            if what == "leave":
                lanes.release(lane)
            else:
                away.append((lanes.swap_out(lane), model[lane]))
            if lane < len(model) - 1:
                lanes.move(len(model) - 1, lane)
                model[lane] = model[-1]
            model.pop()
        elif what == "swap_in" and away and len(model) < 6:
            swapped, tokens = away.pop(0)
            assert swapped.num_blocks <= sum(map(len, tokens))
            lanes.swap_in(len(model), swapped)
            model.append(tokens)
        elif what == "reorder" and model:
            parents = np.array([[draw.randrange(num_beams) for _ in range(num_beams)] for _ in model])
            lanes.reorder(parents)
            model = [[list(line[parent]) for parent in row] for line, row in zip(model, parents, strict=True)]
        else:
            continue
        happened[what] += 1
        lanes.check_integrity()
        if not model:
            continue
        step = lanes.begin_step(len(model))
        values = 100.0 * number + torch.arange(len(model) * num_beams, device=device).view(-1, 1, 1)
        values = values.expand(-1, CONFIG.num_heads, CONFIG.head_dim).contiguous()
        feed(step, values)
        for row, beam in enumerate(beam for line in model for beam in line):
            beam.append(values[row, 0, 0])
        assert step.longest == max(len(beam) for line in model for beam in line)
        assert lanes.lengths[: len(model)].tolist() == [len(line[0]) for line in model]
        for found, beam in zip(held(step), (beam for line in model for beam in line), strict=True):
            assert torch.equal(found, torch.stack(beam).view(1, -1, 1).expand_as(found))
        assert step.num_counted.tolist() == [len(beam) for line in model for beam in line]
    assert min(happened.values()) >= 5, happened


def test_a_row_may_outgrow_what_was_there_at_first() -> None:
    lanes = Lanes(CONFIG, 1, 1, torch.float32, torch.device("cpu"))
    lanes.admit(0)
    for _ in range(3 * FIRST_TOKENS):
        step = lanes.begin_step(1)
        feed(step, torch.ones(1, CONFIG.num_heads, CONFIG.head_dim))
    assert held(step)[0].shape[1] == 3 * FIRST_TOKENS
    assert lanes.blocks_of(0) == 3 * FIRST_TOKENS


def test_a_limit_on_blocks_is_kept() -> None:
    lanes = Lanes(CONFIG, 2, 2, torch.float32, torch.device("cpu"), num_blocks=5)
    lanes.admit(0)
    assert lanes.find_blocks(0) == 5
    lanes.begin_step(1)
    lanes.begin_step(1)
    assert lanes.find_blocks(0) == 1 and lanes.blocks_of(0) == 4
    with pytest.raises(OutOfBlocks):
        lanes.begin_step(1)
    assert lanes.lengths[0] == 2 and lanes.find_blocks(0) == 1
