"""Attention over the encoder states in C++, against softmax(q E^T) E in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trocr_fast import _csrc

LANES = [lanes for lanes in (4, 8, 16) if lanes <= _csrc.LANES]
# rows, heads, lines, keys, width: around the groups, blocks, depths and parts, and beams
SIZES = [
    (1, 1, 1, 1, 1),
    (3, 16, 3, 95, 24),
    (2, 15, 2, 97, 33),
    (6, 17, 2, 130, 8),
    (8, 3, 4, 200, 200),
    (20, 16, 2, 65, 48),
    (1, 12, 1, 577, 400),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attend(q: Tensor, states: Tensor, num_threads: int = 2, lanes: int = _csrc.LANES) -> Tensor:
    out = torch.full(q.shape, torch.nan)
    _csrc.latent_cross_attention(q, states, out, num_threads, lanes)
    return out


def expected(q: Tensor, states: Tensor) -> Tensor:
    grouped = q.double().reshape(states.shape[0], -1, states.shape[2])  # [lines, rows of a line * heads, width]
    return ((grouped @ states.double().transpose(1, 2)).softmax(-1) @ states.double()).view(q.shape)


@pytest.mark.parametrize("scale", [0.1, 10.0])  # 10: scores in the hundreds, which no exp can hold
@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_equals_attention_in_fp64(size: tuple[int, ...], lanes: int, num_threads: int, scale: float) -> None:
    rows, heads, lines, keys, width = size
    q, states = scale * random(rows, heads, width), random(lines, keys, width, seed=1)
    found = attend(q, states, num_threads, lanes)
    torch.testing.assert_close(found.double(), expected(q, states), rtol=1e-5, atol=1e-5 * max(1, scale**2))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("largest", [0, 300, 576])
def test_a_score_far_above_the_others_is_all_there_is_wherever_it_stands(largest: int, lanes: int) -> None:
    states = random(1, 577, 64)
    q = 1e3 * states[:, largest : largest + 1]
    torch.testing.assert_close(attend(q, states, lanes=lanes), states[:, largest : largest + 1], rtol=1e-6, atol=1e-6)


def test_a_score_of_minus_infinity_is_no_key() -> None:
    states = random(1, 200, 8)
    states[0, :, 0] = 0
    states[0, :100, 0] = torch.finfo(torch.float32).max
    q = torch.zeros(1, 1, 8)
    q[0, 0, 0] = -10
    torch.testing.assert_close(attend(q, states), states[:, 100:].mean(1, keepdim=True))


def test_rows_and_heads_may_lie_in_any_order() -> None:
    q, states = random(4, 6, 2, 40), random(2, 150, 40, seed=1)
    heads_first = q[:, :, 1].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(attend(heads_first, states), attend(q[:, :, 1].contiguous(), states))
    assert torch.equal(attend(q[:, :, 1], states), attend(q[:, :, 1].contiguous(), states))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_line_is_the_same_in_any_batch(num_threads: int, lanes: int) -> None:
    q, states = random(10, 4, 48), random(5, 200, 48, seed=1)
    together = attend(q, states, num_threads, lanes)
    for line in range(5):
        rows = slice(2 * line, 2 * line + 2)
        assert torch.equal(attend(q[rows], states[line : line + 1], num_threads, lanes), together[rows])


@pytest.mark.parametrize("lanes", LANES)
def test_what_is_no_number_stays_in_its_line(lanes: int) -> None:
    q, states = random(4, 4, 48), random(2, 200, 48, seed=1)
    clean = attend(q, states, lanes=lanes)
    states[1, 150] = torch.nan
    found = attend(q, states, lanes=lanes)
    assert found[2:].isnan().all() and torch.equal(found[:2], clean[:2])


def test_no_lines() -> None:
    assert attend(torch.zeros(0, 3, 8), torch.zeros(0, 5, 8)).shape == (0, 3, 8)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[0], r"q: expected shape \[any, any, any\], got \[3, 8\]"),
        ("q", lambda x: x.bfloat16(), "q: expected dtype float32, got bfloat16"),
        (
            "q",
            lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
            "q: expected contiguous memory from",
        ),
        ("states", lambda x: x.repeat(2, 1, 1)[:3], "states: .* lines that they divide 4 rows, got 5 keys of 3 lines"),
        ("states", lambda x: x[..., :7], r"states: expected shape \[any, any, 8\], got \[2, 5, 7\]"),
        ("states", lambda x: x.double(), "states: expected dtype float32, got float64"),
        ("states", lambda x: x[:, ::2], "states: expected contiguous memory"),
        ("states", lambda x: x[:, :0], r"states: expected one or more keys .* got 0 keys of 2 lines"),
        ("states", lambda x: x[:0], r"states: expected .* got 5 keys of 0 lines"),
        ("out", lambda x: x[:2], r"out: expected shape \[4, 3, 8\], got \[2, 3, 8\]"),
        ("out", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "out: expected contiguous memory"),
        ("num_threads", lambda _: -1, "num_threads: expected 1 or more, got -1"),
        ("lanes", lambda _: 0, "lanes: expected 4, 8 or 16, and no more than this CPU's .*, got 0"),
    ],
)
def test_a_refused_call_says_why_and_writes_nothing(name: str, change: Callable[[Any], Any], message: str) -> None:
    out = torch.zeros(4, 3, 8)
    given: dict[str, Any] = {
        "q": random(4, 3, 8),
        "states": random(2, 5, 8, seed=1),
        "out": out,
        "num_threads": 1,
        "lanes": 4,
    }
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=message):
        _csrc.latent_cross_attention(**given)
    assert not out.any()
