"""lm_head against its reference, through Triton's interpreter (or on a GPU where there is one)."""

import pytest
import torch

from tests.kernels.compare import DEVICE, assert_close, assert_refused, over, poisoned
from trocr_fast.kernels.lm_head import cases, inputs, lm_head, reference
from trocr_fast.ops import greedy_token

# Awkward sizes, among them one token and one row more than a tile, and the real widths with few tokens.
SHAPES = [
    (1, 1, 1),
    (3, 2, 7),
    (2, 65, 129),
    (17, 127, 33),
    (5, 700, 64),
    (65, 129, 65),
    (130, 257, 16),
    (64, 202, 192),
    *sorted({(rows, 300, width) for rows, _, width in cases() if rows <= 8}),
    (33, 300, 256),
]


@over(SHAPES, cases())
def test_equals_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    arguments = inputs(shape, dtype, DEVICE, seed=sum(shape))
    if DEVICE == "cpu":
        assert_close(run(*arguments), reference, arguments)
        return
    tokens, log_probs = run(*arguments)
    expected, truth = reference(*(tensor.double() for tensor in arguments))
    assert torch.equal(tokens, expected)
    # matrix units cut off their sums where fp32 would round: a unit in the last place at every 16th addition
    torch.testing.assert_close(log_probs.double(), truth, rtol=0, atol=(16 + shape[2] / 16) * 2**-20)


def run(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, log_probs = poisoned(
        torch.empty(len(x), dtype=torch.int64, device=DEVICE), torch.empty(len(x), device=DEVICE)
    )
    return lm_head(x, weight, tokens, log_probs)


def row_of(logits: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments that give these logits in the second of three rows, and zeros in the others."""
    x = torch.zeros(3, 16, device=DEVICE)
    x[1, 0] = 1.0
    weight = torch.zeros(len(logits), 16, device=DEVICE)
    weight[:, 0] = torch.tensor(logits, device=DEVICE)
    return x, weight


@pytest.mark.parametrize("places", [(5, 6), (0, 199), (70, 130, 131), (63, 64), (198, 199)], ids=str)
def test_first_of_equal_maxima(places: tuple[int, ...]) -> None:
    logits = [-1.0] * 200
    for place in places:
        logits[place] = 2.0
    arguments = row_of(logits)
    tokens, log_probs = run(*arguments)
    assert tokens.tolist() == [0, places[0], 0]
    assert_close((tokens, log_probs), reference, arguments)
    assert torch.equal(tokens, greedy_token(*arguments)[0])


@pytest.mark.parametrize("place", [0, 63, 64, 150, 199])
def test_nan_makes_the_log_probability_not_finite(place: int) -> None:
    x, weight = row_of([0.5] * 200)
    x[1] = 1.0
    weight[place, 3] = torch.inf  # inf * 1 in the second row, inf * 0 in the others
    weight[place, 4] = -torch.inf
    tokens, log_probs = run(x, weight)
    assert not log_probs.isfinite().any() and tokens.tolist() == [place] * 3


def test_nan_stays_in_its_row() -> None:
    x, weight = inputs((20, 150, 24), torch.float32, DEVICE)
    x[3, 5] = torch.nan
    tokens, log_probs = run(x, weight)
    others = [row for row in range(20) if row != 3]
    assert log_probs[3].isnan() and 0 <= tokens[3] < 150
    assert_close((tokens[others], log_probs[others]), reference, (x[others], weight))


def test_log_probability_of_huge_logits() -> None:
    arguments = row_of([3e4, 3e4, -3e4, 2.9e4] + [-3e38] * 150)
    assert_close(run(*arguments), reference, arguments)


def test_empty_batch_launches_nothing() -> None:
    tokens, log_probs = lm_head(*inputs((0, 9, 8), torch.float32, DEVICE))
    assert tokens.shape == log_probs.shape == (0,)
    assert tokens.dtype == torch.int64 and log_probs.dtype == torch.float32


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (0, lambda x: x.T.contiguous().T, "x"),
        (0, lambda x: x.double(), "x"),
        (0, lambda x: x[0], "x"),
        (1, lambda x: x[:, :-1].contiguous(), "weight"),
        (1, lambda x: x.half(), "weight"),
        (1, lambda x: x[:0], "weight"),
        (2, lambda x: torch.empty(4, dtype=torch.int32, device=DEVICE), "tokens"),
        (2, lambda x: torch.empty(3, dtype=torch.int64, device=DEVICE), "tokens"),
        (3, lambda x: torch.empty(4, dtype=torch.float16, device=DEVICE), "log_probs"),
    ],
)
def test_wrong_arguments_are_named(index: int, change, name: str) -> None:
    arguments = [*inputs((4, 9, 8), torch.float32, DEVICE), None, None]
    assert_refused(lm_head, arguments, index, change, name)
