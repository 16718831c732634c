"""cross_attention against its reference, through Triton's interpreter (or on a GPU where there is one)."""

import pytest
import torch

from tests.kernels.compare import DEVICE, assert_close, assert_refused, over, poisoned
from trocr_fast.kernels.cross_attention import Case, cases, cross_attention, inputs, launches, reference, split_keys

# Keys about a piece (64 of 64 elements, 128 of 32) and about a split; the interpreter takes a millisecond a piece.
SHAPES = [
    Case(1, 1, 1, 64, 1),
    Case(2, 3, 1, 64, 1),
    Case(2, 1, 2, 64, 577),
    Case(1, 4, 2, 64, 577),
    Case(1, 1, 2, 32, 578),
    Case(2, 10, 1, 32, 578),
    Case(1, 1, 1, 64, 769),
    Case(1, 2, 1, 64, 769),
    Case(1, 33, 1, 64, 65),
    Case(1, 17, 1, 128, 33),
    Case(3, 1, 1, 40, 129),
    Case(2, 2, 1, 7, 131),
]


# In fp32 a program holds one beam, in fp16 all of a line.
@over(SHAPES, cases())
def test_equals_reference(shape: Case, dtype: torch.dtype) -> None:
    check(inputs(shape, dtype, DEVICE, seed=sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_splits(shape: Case, num_splits: int, dtype: torch.dtype) -> None:
    check(inputs(shape, dtype, DEVICE, seed=sum(shape)), num_splits)


def check(arguments: tuple, num_splits: int | None = None) -> None:
    (out,) = poisoned(arguments[0].flatten(1).contiguous())
    slots = arguments[3] if len(arguments) > 3 else None
    ours = cross_attention(*arguments[:3], slots, num_splits=num_splits, out=out)
    assert_close((ours,), reference, arguments)


@pytest.mark.parametrize("beams", [1, 3])
def test_memory_of_one_layer_among_others(beams: int) -> None:
    """Keys and values side by side, after NaN: the outer strides are free; q is a part of a wider product."""
    q, k, v = inputs(Case(2, beams, 2, 64, 70), torch.float16, DEVICE)
    memory = torch.full((2, 2, 3, 70, 64), torch.nan, dtype=torch.float16, device=DEVICE)
    memory[:, :, 1], memory[:, :, 2] = k, v
    wide = torch.full((2 * beams, 2, 2, 64), torch.nan, dtype=torch.float16, device=DEVICE)
    wide[:, 1] = q
    check((wide[:, 1], memory[:, :, 1], memory[:, :, 2]))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_slots_choose_the_line(beams: int, num_splits: int) -> None:
    _, k, v = inputs(Case(3, 1, 2, 32, 200), torch.float16, DEVICE)
    q, _, _ = inputs(Case(4, beams, 2, 32, 1), torch.float16, DEVICE)
    k[1], v[1] = torch.nan, torch.nan  # a slot that holds no line
    check((q, k, v, torch.tensor([2, 0, 2, 0], dtype=torch.int32, device=DEVICE)), num_splits)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_slot_outside_gives_zeros(beams: int, num_splits: int) -> None:
    q, k, v = inputs(Case(3, beams, 2, 32, 200), torch.float16, DEVICE)
    slots = torch.tensor([-1, 1, 3], dtype=torch.int32, device=DEVICE)
    check((q, k, v, slots), num_splits)
    out = cross_attention(q, k, v, slots, num_splits=num_splits).view(3, -1)
    assert (out[0] == 0).all() and (out[2] == 0).all() and (out[1] != 0).any()


def test_beams_of_a_line_do_not_see_each_other() -> None:
    q, k, v = inputs(Case(2, 4, 1, 32, 130), torch.float16, DEVICE)
    before = cross_attention(q, k, v)
    q[5] = torch.nan
    after = cross_attention(q, k, v)
    others = [0, 1, 2, 3, 4, 6, 7]
    assert torch.equal(before[others], after[others])
    assert after[5].isnan().all()


@pytest.mark.parametrize("beams", [1, 3])
def test_fixed_number_of_splits_makes_a_line_independent_of_the_batch(beams: int) -> None:
    q, k, v = inputs(Case(3, beams, 1, 64, 577), torch.float16, DEVICE)
    together = cross_attention(q, k, v, num_splits=4)
    lines = zip(q.split(beams), k.split(1), v.split(1), strict=True)
    assert torch.equal(together, torch.cat([cross_attention(*line, num_splits=4) for line in lines]))


@pytest.mark.parametrize("beams", [1, 3])
def test_large_scores_do_not_overflow(beams: int) -> None:
    q, k, v = inputs(Case(1, beams, 1, 64, 200), torch.float16, DEVICE)
    check((q * 100, k, v), num_splits=2)


def test_no_split_is_empty() -> None:
    for num_keys in (1, 15, 64, 65, 577, 578, 769):
        for wanted in (None, *range(1, 20)):
            splits, keys = split_keys(num_keys, 64, 16, wanted)
            assert (splits - 1) * keys < num_keys <= splits * keys
            assert wanted is None or splits <= wanted


def test_one_line_is_split_and_a_batch_is_not() -> None:
    one, batch = (launches(*inputs(case, torch.float16, "meta")) for case in (Case(1, 1, 16, 64, 577), cases()[0]))
    assert (len(one), len(batch)) == (2, 1)
    assert one[0].grid[0] >= 132  # a program for every multiprocessor


def test_empty_batch_launches_nothing() -> None:
    assert cross_attention(*inputs(Case(0, 1, 2, 32, 9), torch.float32, DEVICE)).shape == (0, 64)


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (0, lambda q: q.double(), "q"),
        (0, lambda q: q.flatten(1), "q"),
        (0, lambda q: q[:-1], "q"),
        (0, lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), "q"),
        (1, lambda k: k.half(), "k"),
        (1, lambda k: k[:, :1], "k"),
        (1, lambda k: k[:, :, :0], "k"),
        (1, lambda k: k.transpose(2, 3).contiguous().transpose(2, 3), "k"),
        (2, lambda v: v[:, :, :-1], "v"),
        (2, lambda v: v[:1], "v"),
        (3, lambda slots: slots.long(), "slots"),
        (3, lambda slots: slots[None], "slots"),
        (5, lambda _: torch.empty(4, 2, 8, device=DEVICE), "out"),
    ],
)
def test_wrong_arguments_are_named(index: int, change, name: str) -> None:
    slots = torch.arange(2, dtype=torch.int32, device=DEVICE)
    arguments = [*inputs(Case(2, 2, 2, 8, 9), torch.float32, DEVICE), slots, None, None]
    assert_refused(cross_attention, arguments, index, change, name)
