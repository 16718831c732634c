"""latent_cross_attention against its reference, through Triton's interpreter (or on a GPU where there is one)."""

import pytest
import torch
from torch import Tensor

from tests.kernels.compare import DEVICE, assert_close, assert_refused, over, poisoned
from trocr_fast import ops
from trocr_fast.kernels.latent_cross_attention import (
    Case,
    cases,
    inputs,
    latent_cross_attention,
    launches,
    reference,
    tile_of,
)

# The real widths and awkward ones; vectors (beams * heads) about 16 and 32; keys about a piece. The interpreter takes
# a millisecond for each chunk of a piece, and in fp32 both are small.
SHAPES = [
    Case(1, 1, 1, 768, 1),
    Case(2, 3, 16, 768, 33),
    Case(1, 4, 16, 1024, 17),
    Case(1, 10, 8, 384, 35),
    Case(1, 1, 3, 257, 40),
    Case(2, 2, 3, 129, 35),
    Case(1, 17, 1, 7, 577),
    Case(3, 1, 16, 32, 70),
]
LONG = [Case(1, 1, 16, 768, 577), Case(1, 1, 16, 1024, 769), Case(1, 4, 8, 384, 578)]


@over(SHAPES, LONG + cases())
def test_equals_reference(shape: Case, dtype: torch.dtype) -> None:
    check(inputs(shape, dtype, DEVICE, seed=sum(shape)))


@pytest.mark.parametrize("shape", LONG, ids=str)
def test_equals_reference_at_full_length(shape: Case) -> None:
    check(inputs(shape, torch.float16, DEVICE, seed=sum(shape)))


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES[-4:], ids=str)
def test_any_number_of_splits(shape: Case, num_splits: int) -> None:
    check(inputs(shape, torch.float16, DEVICE, seed=sum(shape)), num_splits)


def check(arguments: tuple, num_splits: int | None = None) -> None:
    (out,) = poisoned(arguments[0].contiguous())
    slots = arguments[2] if len(arguments) > 2 else None
    ours = latent_cross_attention(*arguments[:2], slots, num_splits=num_splits, out=out)
    assert_close((ours,), reference, arguments)


def attend(q: Tensor, states: Tensor, k_weight: Tensor, v_weight: Tensor) -> Tensor:
    """As `ops.latent_cross_attention`, with the kernel between the library products."""
    latent_q = torch.matmul(q.transpose(0, 1), k_weight).transpose(0, 1)
    context = latent_cross_attention(latent_q, states)
    out = torch.matmul(context.transpose(0, 1), v_weight.transpose(1, 2))
    return out.transpose(0, 1).flatten(1)


def test_is_the_middle_of_the_operation() -> None:
    """And, with projected keys and values, of plain attention."""
    torch.manual_seed(0)
    q, states = torch.randn(3, 4, 16, device=DEVICE) / 4, torch.randn(3, 50, 96, device=DEVICE)
    k_weight, v_weight = torch.randn(2, 4, 16, 96, device=DEVICE) / 10
    ours = attend(q, states, k_weight, v_weight)
    torch.testing.assert_close(ours, ops.latent_cross_attention(q, states, k_weight, v_weight))
    keys, values = (torch.einsum("rkw,hdw->rhkd", states, weight) for weight in (k_weight, v_weight))
    torch.testing.assert_close(ours, ops.cross_attention(q, keys, values))


@pytest.mark.parametrize("beams", [1, 3])
def test_centred_states_give_the_same_with_the_mean_added(beams: int) -> None:
    latent_q, states = inputs(Case(2, beams, 8, 128, 40), torch.float32, DEVICE)
    states = states + 2 * torch.randn(2, 1, 128, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mean = states.mean(dim=1, keepdim=True)  # [lines, 1, width]
    plain = latent_cross_attention(latent_q, states)
    centred = latent_cross_attention(latent_q, states - mean) + mean.repeat_interleave(beams, dim=0)
    torch.testing.assert_close(centred, plain)


def test_centred_states_round_better_in_half_precision() -> None:
    latent_q, states = inputs(Case(1, 1, 8, 384, 100), torch.float32, DEVICE)
    states = states + 20
    mean = states.mean(dim=1, keepdim=True)
    truth = reference(latent_q.double(), states.double())
    plain = latent_cross_attention(latent_q.half(), states.half())
    centred = latent_cross_attention(latent_q.half(), (states - mean).half()).float() + mean
    assert (centred - truth).abs().max() < (plain - truth).abs().max() / 4


def test_strides_of_the_outer_dimensions_are_free() -> None:
    latent_q, states = inputs(Case(2, 3, 2, 40, 70), torch.float32, DEVICE)
    by_row = torch.full((6, 3, 2, 40), torch.nan, device=DEVICE)
    by_row[:, 1] = latent_q
    wide = torch.full((2, 2, 70, 40), torch.nan, device=DEVICE)
    wide[:, 0] = states
    check((by_row[:, 1], wide[:, 0]))


@pytest.mark.parametrize("num_splits", [1, 2])
def test_slots_choose_the_line(num_splits: int) -> None:
    _, states = inputs(Case(3, 1, 2, 40, 200), torch.float32, DEVICE)
    latent_q, _ = inputs(Case(4, 2, 2, 40, 1), torch.float32, DEVICE)
    states[1] = torch.nan  # a slot that holds no line
    check((latent_q, states, torch.tensor([2, 0, 2, 0], dtype=torch.int32, device=DEVICE)), num_splits)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_slot_outside_gives_zeros(num_splits: int) -> None:
    latent_q, states = inputs(Case(3, 2, 2, 40, 200), torch.float32, DEVICE)
    slots = torch.tensor([-1, 1, 3], dtype=torch.int32, device=DEVICE)
    check((latent_q, states, slots), num_splits)
    out = latent_cross_attention(latent_q, states, slots, num_splits=num_splits).view(3, -1)
    assert (out[0] == 0).all() and (out[2] == 0).all() and (out[1] != 0).any()


def test_fixed_number_of_splits_makes_a_line_independent_of_the_batch() -> None:
    latent_q, states = inputs(Case(3, 2, 2, 384, 70), torch.float16, DEVICE)
    together = latent_cross_attention(latent_q, states, num_splits=2)
    alone = [latent_cross_attention(latent_q[2 * i : 2 * i + 2], states[i : i + 1], num_splits=2) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_large_scores_do_not_overflow() -> None:
    latent_q, states = inputs(Case(1, 2, 2, 40, 200), torch.float16, DEVICE)
    check((latent_q * 500, states), num_splits=2)


def test_tiles_leave_no_chunk_of_a_real_width_part_filled() -> None:
    for width in (384, 768, 1024):
        for num_vectors in (8, 16, 17, 160):
            for item_size in (2, 4):
                tile = tile_of(width, num_vectors, item_size)
                assert width % tile.chunk == 0
                assert tile.vectors <= 32


def test_one_line_is_split() -> None:
    attention, _ = launches(*inputs(Case(1, 1, 16, 768, 577), torch.float16, "meta"))
    assert attention.grid[0] == 19  # pieces of 32 keys


def test_empty_batch_launches_nothing() -> None:
    assert latent_cross_attention(*inputs(Case(0, 1, 2, 32, 9), torch.float32, DEVICE)).shape == (0, 2, 32)


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (0, lambda q: q.double(), "latent_q"),
        (0, lambda q: q.flatten(1), "latent_q"),
        (0, lambda q: q[:-1], "latent_q"),
        (0, lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), "latent_q"),
        (1, lambda states: states.half(), "states"),
        (1, lambda states: states[:, :, :-1], "states"),
        (1, lambda states: states[:, :0], "states"),
        (1, lambda states: states.transpose(1, 2).contiguous().transpose(1, 2), "states"),
        (2, lambda slots: slots.long(), "slots"),
        (2, lambda slots: slots[None], "slots"),
        (4, lambda _: torch.empty(4, 16, device=DEVICE), "out"),
    ],
)
def test_wrong_arguments_are_named(index: int, change, name: str) -> None:
    slots = torch.arange(2, dtype=torch.int32, device=DEVICE)
    arguments = [*inputs(Case(2, 2, 2, 8, 9), torch.float32, DEVICE), slots, None, None]
    assert_refused(latent_cross_attention, arguments, index, change, name)
