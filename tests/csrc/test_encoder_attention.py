"""The encoder's attention in C++, against softmax(Q K^T / sqrt(head_dim)) V in fp64."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from trocr_fast import _csrc

LANES = [lanes for lanes in (4, 8, 16) if lanes <= _csrc.LANES]
# pictures, tokens, heads, head_dim: around the panels and groups of each width, and the real heads
SIZES = [
    (1, 1, 1, 1),
    (2, 7, 3, 5),
    (1, 8, 2, 3),
    (1, 9, 1, 17),
    (1, 12, 2, 16),
    (3, 13, 1, 33),
    (2, 16, 2, 4),
    (2, 17, 2, 24),
    (2, 32, 2, 8),
    (1, 49, 1, 9),
    (1, 65, 2, 64),
    (2, 97, 3, 40),
    (1, 577, 2, 64),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attend(qkv: Tensor, num_heads: int, num_threads: int = 2, lanes: int = _csrc.LANES) -> Tensor:
    out = torch.full((*qkv.shape[:2], qkv.shape[2] // 3), torch.nan)
    _csrc.encoder_attention(qkv, num_heads, out, num_threads, lanes)
    return out


def expected(qkv: Tensor, num_heads: int) -> Tensor:
    pictures, tokens, _ = qkv.shape
    q, k, v = qkv.double().view(pictures, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    probabilities = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(-1)
    return (probabilities @ v).transpose(1, 2).reshape(pictures, tokens, -1)


@pytest.mark.parametrize("scale", [1.0, 12.0])  # 12: scores in the hundreds, which no exp can hold
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_equals_attention_in_fp64(size: tuple[int, ...], lanes: int, scale: float) -> None:
    pictures, tokens, heads, head_dim = size
    qkv = random(pictures, tokens, 3, heads * head_dim)
    qkv[:, :, :2] *= scale
    qkv = qkv.flatten(2)
    found = attend(qkv, heads, lanes=lanes)
    torch.testing.assert_close(found.double(), expected(qkv, heads), rtol=1e-5, atol=1e-5 * scale**2)


@pytest.mark.parametrize("lanes", LANES)
def test_exp_is_exact_to_some_units_in_the_last_place(lanes: int) -> None:
    """Over two keys with scores 0 and -x, values 0 and 1, attention is e^-x / (1 + e^-x)."""
    x = torch.cat([torch.linspace(0, 87, 30_001), torch.tensor([1e-30, 88.0, 1e4, 3e38])])
    qkv = torch.zeros(len(x), 2, 3)
    qkv[:, :, 0] = 1
    qkv[:, 1, 1], qkv[:, 1, 2] = -x, 1
    found = attend(qkv, 1, lanes=lanes)[:, 0, 0].double()
    wanted = torch.exp(-x.double()) / (1 + torch.exp(-x.double()))
    small = x <= 87
    assert ((found - wanted).abs() / wanted)[small].max() < 3e-7
    assert (found[~small] < 2e-38).all()


@pytest.mark.parametrize("lanes", LANES)
def test_a_picture_is_the_same_in_any_batch_and_with_any_number_of_threads(lanes: int) -> None:
    qkv = random(5, 50, 3 * 24)
    together = attend(qkv, 3, lanes=lanes)
    for num_threads in (1, 2, 7):
        assert torch.equal(attend(qkv, 3, num_threads, lanes), together)
    for picture in range(5):
        assert torch.equal(attend(qkv[picture : picture + 1], 3, lanes=lanes), together[picture : picture + 1])


@pytest.mark.parametrize("lanes", LANES)
def test_what_is_no_number_stays_in_its_picture_and_head(lanes: int) -> None:
    qkv = random(3, 20, 3 * 16)
    clean = attend(qkv, 2, lanes=lanes)
    qkv[1, 4, 16 + 8] = torch.nan  # a key of the second head
    found = attend(qkv, 2, lanes=lanes)
    assert found[1, :, 8:].isnan().all()
    found[1, :, 8:] = clean[1, :, 8:]
    assert torch.equal(found, clean)


def test_calls_from_several_threads_at_once_do_not_meet() -> None:
    given = [random(2, 60, 3 * 32, seed=seed) for seed in range(8)]
    alone = [attend(qkv, 2) for qkv in given]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            for found, wanted in zip(threads.map(lambda qkv: attend(qkv, 2), given), alone, strict=True):
                assert torch.equal(found, wanted)


def test_no_pictures_and_no_tokens() -> None:
    assert attend(torch.zeros(0, 5, 6), 1).shape == (0, 5, 2)
    assert attend(torch.zeros(2, 0, 6), 1).shape == (2, 0, 2)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qkv", lambda x: x[0], r"qkv: expected shape \[any, any, any\], got \[5, 12\]"),
        ("qkv", lambda x: x.double(), "qkv: expected dtype float32, got float64"),
        ("qkv", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "qkv: expected contiguous memory"),
        ("qkv", lambda x: x[:, :, :11].contiguous(), "num_heads: expected a divisor of a third of 11, got 2"),
        ("qkv", lambda x: [1.0], "qkv: expected a tensor, got list"),
        ("num_heads", lambda _: 0, "num_heads: expected a divisor of a third of 12, got 0"),
        ("num_heads", lambda _: (2**64 - 1) // 3, "num_heads: expected a divisor of a third of 12, got 61"),
        ("num_heads", lambda _: 3, "num_heads: expected a divisor of a third of 12, got 3"),
        ("out", lambda x: x[:1], r"out: expected shape \[2, 5, 4\], got \[1, 5, 4\]"),
        ("out", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "out: expected contiguous memory"),
        ("out", lambda x: x.half(), "out: expected dtype float32, got float16"),
        ("num_threads", lambda _: 0, "num_threads: expected 1 or more, got 0"),
        ("lanes", lambda _: 5, "lanes: expected 4, 8 or 16, and no more than this CPU's .*, got 5"),
        ("lanes", lambda _: 32, "lanes: .* got 32"),
    ],
)
def test_a_refused_call_says_why_and_writes_nothing(name: str, change: Callable[[Any], Any], message: str) -> None:
    out = torch.zeros(2, 5, 4)
    given: dict[str, Any] = {"qkv": random(2, 5, 12), "num_heads": 2, "out": out, "num_threads": 1, "lanes": 4}
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=message):
        _csrc.encoder_attention(**given)
    assert not out.any()
