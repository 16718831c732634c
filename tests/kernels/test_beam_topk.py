"""beam_topk against its reference, through Triton's interpreter (or on a GPU where there is one)."""

import pytest
import torch
from torch import Tensor

from tests.kernels.compare import DEVICE, as_tuple, assert_refused, double, over, poisoned
from trocr_fast.kernels.beam_topk import beam_topk, cases, inputs, reference

Case = tuple[int, int, int, int]
# Awkward sizes, among them vocabularies smaller than the count and one more than a tile; the real vocabularies.
SHAPES: list[Case] = [
    (1, 1, 1, 1),
    (2, 3, 6, 2),
    (3, 1, 5, 31),
    (2, 5, 10, 257),
    (1, 7, 64, 2049),
    (2, 2, 3, 4096),
    (1, 20, 40, 129),
    (3, 4, 8, 202),
    (1, 2, 40, 202),
    (1, 2, 4, 50265),
    (1, 1, 20, 64044),
]


@over(SHAPES, cases())
def test_equals_reference(shape: Case, dtype: torch.dtype) -> None:
    check(inputs(shape, dtype, DEVICE, seed=sum(shape)))


def check(arguments: tuple) -> tuple[Tensor, Tensor]:
    """Values near the truth; indices that have these values, each once; and the order that the module promises."""
    logits, scores, beams, count = arguments
    vocab = logits.shape[1]
    lines = len(logits) // beams
    values, indices = beam_topk(
        *arguments,
        *poisoned(
            torch.empty(lines, count, device=DEVICE), torch.empty(lines, count, dtype=torch.int64, device=DEVICE)
        ),
    )
    expected, same = (as_tuple(reference(*map(change, arguments)))[0] for change in (double, lambda x: x))
    assert not values.isnan().any()
    finite = expected.isfinite()
    assert torch.equal(values[~finite].double(), expected[~finite])
    errors = (values.double() - expected)[finite].abs()
    spread = expected[finite].abs().max().item() if finite.any() else 0.0
    allowed = 2 * (same.double() - expected)[finite].abs().max().item() + 1e-6 * max(spread, 1.0) if finite.any() else 0
    assert (errors <= allowed).all(), f"largest error {errors.max():.3g}, allowed {allowed:.3g}"

    assert ((indices >= 0) & (indices < beams * vocab)).all()
    assert all(len(set(line)) == count for line in indices.tolist())
    beam, token = indices // vocab, indices % vocab
    row = beam + torch.arange(lines, device=DEVICE).unsqueeze(1) * beams
    totals = scores.double().unsqueeze(1) + logits.double().log_softmax(-1)
    own = totals[row, token]
    assert torch.equal(own[~finite], expected[~finite])
    assert ((own - values.double())[finite].abs() <= allowed).all()

    assert (values[:, :-1] >= values[:, 1:]).all()
    equal = values[:, :-1] == values[:, 1:]
    assert (beam[:, :-1] <= beam[:, 1:])[equal].all()
    within = equal & (beam[:, :-1] == beam[:, 1:])
    logit = logits[row, token]
    assert (logit[:, :-1] >= logit[:, 1:])[within].all()
    within &= logit[:, :-1] == logit[:, 1:]
    assert (token[:, :-1] < token[:, 1:])[within].all()
    return values, indices


@pytest.mark.parametrize("vocab", [70, 2500])
def test_equal_logits_go_to_the_smaller_flat_index(vocab: int) -> None:
    logits = torch.zeros(6, vocab, device=DEVICE)
    logits[0, 1] = -0.0  # equal to zero
    _, indices = check((logits, torch.full((6,), -2.0, device=DEVICE), 3, 64))
    assert torch.equal(indices, torch.arange(64, device=DEVICE).expand(2, 64))


@pytest.mark.parametrize("vocab", [15, 16, 17, 2047, 2049])
def test_the_last_of_all_logits(vocab: int) -> None:
    logits = torch.zeros(3, vocab, device=DEVICE)
    logits[:, -1] = 1.0
    _, indices = check((logits, torch.zeros(3, device=DEVICE), 1, 2))
    assert indices.tolist() == [[vocab - 1, 0]] * 3


@pytest.mark.parametrize("apart", [1, 63, 64, 65])
def test_best_tokens_near_each_other_and_far_apart(apart: int) -> None:
    # all in two of the groups that the row's merge reads again, or each in its own
    logits = torch.zeros(2, 2500, device=DEVICE)
    best = torch.arange(20, device=DEVICE) * apart + 50
    logits[:, best] = torch.arange(20.0, device=DEVICE) + 1
    _, indices = check((logits, torch.zeros(2, device=DEVICE), 1, 20))
    assert torch.equal(indices, best.flip(0).expand(2, 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_order_is_that_of_the_reference(dtype: torch.dtype) -> None:
    # values that fp32 holds exactly: logits of one row in quarters, all rows of the same log-sum-exp
    generator = torch.Generator().manual_seed(5)
    row = torch.arange(300) // 8 / 4
    logits = torch.stack([row[torch.randperm(300, generator=generator)] for _ in range(8)]).to(DEVICE, dtype)
    arguments = (logits, torch.zeros(8, device=DEVICE), 4, 40)
    _, indices = check(arguments)
    assert torch.equal(indices, reference(*arguments)[1])


def test_dead_beams_come_last_and_offer_their_best() -> None:
    logits, scores, beams, _ = inputs((2, 4, 8, 5), torch.float32, DEVICE)
    scores[[0, 2, 3, 4, 5, 7]] = -1e9
    arguments = (logits, scores, beams, 8)
    values, indices = check(arguments)
    assert torch.equal(indices, reference(*arguments)[1])
    assert torch.equal(indices[0, :5] // 5, torch.full((5,), 1, device=DEVICE)) and (values[:, 5:] < -9e8).all()
    assert torch.equal(indices[0, 5:], logits[0].argsort(descending=True)[:3])


def test_suppressed_tokens_are_minus_infinity() -> None:
    logits, scores, beams, _ = inputs((1, 2, 6, 2100), torch.float32, DEVICE)
    logits[:, 3:] = -torch.inf  # the second tile holds nothing else
    arguments = (logits, scores, beams, 10)
    values, indices = check(arguments)
    assert values.isfinite().sum() == 6
    assert indices[0, 6:].tolist() == [3, 4, 5, 6]


def test_huge_logits() -> None:
    logits, scores, beams, count = inputs((2, 3, 6, 100), torch.float32, DEVICE)
    check((logits * 1e4, scores, beams, count))


@pytest.mark.parametrize("place", [0, 63, 2047, 2048, 2099])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_stays_in_its_line(place: int, sign: float) -> None:
    arguments = inputs((2, 2, 4, 2100), torch.float32, DEVICE)
    whole, _ = beam_topk(*arguments)
    arguments[0][2, place] = torch.copysign(torch.tensor(torch.nan), torch.tensor(sign))
    values, indices = beam_topk(*arguments)
    assert torch.equal(values[0], whole[0])
    assert values[1].isnan().all() and indices[1, 0] == place
    assert ((indices >= 0) & (indices < 4200)).all()


def test_empty_batch_launches_nothing() -> None:
    values, indices = beam_topk(*inputs((0, 4, 8, 50), torch.float32, DEVICE))
    assert values.shape == indices.shape == (0, 8)
    assert values.dtype == torch.float32 and indices.dtype == torch.int64


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (0, lambda x: x.T.contiguous().T, "logits"),
        (0, lambda x: x.double(), "logits"),
        (0, lambda x: x[0], "logits"),
        (1, lambda x: x[:-1], "scores"),
        (1, lambda x: x.half(), "scores"),
        (2, lambda x: 3, "beams"),
        (2, lambda x: 0, "beams"),
        (3, lambda x: 0, "count"),
        (3, lambda x: 19, "count"),
        (4, lambda x: torch.empty(2, 3, device=DEVICE), "values"),
        (5, lambda x: torch.empty(2, 4, dtype=torch.int32, device=DEVICE), "indices"),
    ],
)
def test_wrong_arguments_are_named(index: int, change, name: str) -> None:
    arguments = [*inputs((2, 2, 4, 9), torch.float32, DEVICE), None, None]
    assert_refused(beam_topk, arguments, index, change, name)


def test_count_has_a_limit() -> None:
    with pytest.raises(ValueError, match=r"^count: expected 1 to 64, got 65"):
        beam_topk(*inputs((1, 2, 65, 100), torch.float32, DEVICE))
