"""paged_attention against its reference, through Triton's interpreter (or on a GPU where there is one)."""

import pytest
import torch
from torch import Tensor

from tests.kernels.compare import DEVICE, assert_close, assert_refused, over, poisoned
from trocr_fast import _csrc
from trocr_fast.kernels.paged_attention import Case, cases, inputs, paged_attention, reference

# Lengths about a piece of 32 keys and blocks about the end of a row; the interpreter takes milliseconds a program.
SHAPES = [
    Case(1, 1, 64, 1),
    Case(5, 2, 64, 11, layers=3),
    Case(5, 3, 32, 33, layers=2, block_size=2),
    Case(2, 1, 64, 34, block_size=16),
    Case(3, 2, 40, 65, block_size=64),
    Case(1, 1, 128, 129, block_size=4),
    Case(2, 1, 7, 17, block_size=8),
    Case(1, 1, 64, 513),
    Case(1, 16, 64, 11, layers=2),
    Case(1, 8, 32, 30),
]


@over(SHAPES, cases())
def test_equals_reference(shape: Case, dtype: torch.dtype) -> None:
    check(inputs(shape, dtype, DEVICE, seed=sum(shape)))


def check(arguments: tuple) -> None:
    """The result, and the bytes of the memory: those that csrc writes, and no others."""
    q, k, v, memory, layer, *_, slots = arguments
    expected = memory.cpu().clone()
    native = _csrc.KVMemory(expected)
    native.write(layer, k.cpu(), v.cpu(), slots.cpu())
    (out,) = poisoned(q.flatten(1))
    assert_close((paged_attention(*arguments, out=out),), reference, arguments)
    assert same_bytes(memory.cpu(), expected)


def same_bytes(ours: Tensor, theirs: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32}[ours.element_size()]
    return torch.equal(ours.view(integer), theirs.view(integer))


def test_slot_of_minus_one_writes_nothing() -> None:
    arguments = inputs(Case(3, 2, 32, 9, block_size=4), torch.float32, DEVICE)
    arguments[-1][1] = -1
    check(arguments)  # csrc writes nothing, either; the row attends to its new token all the same


def test_slot_outside_the_memory_writes_nothing() -> None:
    """On a CPU csrc raises there; on a GPU it writes nothing, as we do."""
    arguments = inputs(Case(2, 2, 32, 9, block_size=4), torch.float32, DEVICE)
    memory, slots = arguments[3], arguments[-1]
    around = torch.full((memory.shape[0] + 2, *memory.shape[1:]), 7.0, device=DEVICE)
    around[1:-1] = memory
    slots[0], slots[1] = memory.shape[0] * 4, -2
    before = around.cpu().clone()
    paged_attention(*arguments[:3], around[1:-1], *arguments[4:])
    assert same_bytes(around.cpu(), before)


def test_row_of_length_0_gives_zeros_and_reads_no_block() -> None:
    arguments = inputs(Case(3, 2, 32, 9), torch.float32, DEVICE)
    q, k, v, memory, _, _, lengths, slots = arguments
    lengths[1], slots[1] = 0, -1
    for tensor in (q, k, v):
        tensor[1] = torch.nan
    check(arguments)
    assert (paged_attention(*arguments)[1] == 0).all()
    assert memory.isnan().any()


def test_new_token_is_not_read_from_memory() -> None:
    """It may be written after it would be read: another program, another warp."""
    arguments = inputs(Case(4, 2, 32, 40), torch.float32, DEVICE)
    slots = arguments[-1]
    expected = paged_attention(*arguments)
    arguments[3].view(-1, 2, 2, 32)[slots] = torch.nan
    slots.fill_(-1)
    assert torch.equal(paged_attention(*arguments), expected)


def test_rows_share_blocks() -> None:
    """Beams: the first tokens of all rows lie in the first row's blocks."""
    arguments = inputs(Case(5, 2, 32, 12), torch.float32, DEVICE)
    arguments[5][:, :7] = arguments[5][:1, :7].clone()
    check(arguments)


def test_block_outside_the_memory_reads_as_zeros() -> None:
    """As csrc gathers it."""
    arguments = inputs(Case(2, 2, 32, 9, block_size=2), torch.float32, DEVICE)
    arguments[5][0, 1], arguments[5][1, 0] = -1, arguments[3].shape[0]
    check(arguments)


def test_token_past_the_table_reads_as_zeros() -> None:
    arguments = list(inputs(Case(2, 2, 32, 9, block_size=2), torch.float32, DEVICE))
    arguments[5] = arguments[5][:, :2].contiguous()
    check(tuple(arguments))


def test_other_layers_stay() -> None:
    """`check` compares the bytes of all layers; here the first and the last are written."""
    for layer in (0, 2):
        arguments = list(inputs(Case(2, 2, 32, 9, layers=3), torch.float16, DEVICE))
        arguments[4] = layer
        arguments[3].nan_to_num_(0.5)
        check(tuple(arguments))


def test_large_scores_do_not_overflow() -> None:
    arguments = inputs(Case(2, 1, 64, 70), torch.float32, DEVICE)
    arguments[0].mul_(100)
    check(arguments)


def test_empty_batch_launches_nothing() -> None:
    assert paged_attention(*inputs(Case(0, 2, 32, 9), torch.float32, DEVICE)).shape == (0, 64)


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (0, lambda q: q.double(), "q"),
        (0, lambda q: q.flatten(1), "q"),
        (0, lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), "q"),
        (1, lambda k: k[:, :, :-1], "k"),
        (1, lambda k: k.half(), "k"),
        (2, lambda v: v[:-1], "v"),
        (2, lambda v: v.flip(1).transpose(1, 2).contiguous().transpose(1, 2), "v"),
        (3, lambda memory: memory[:, :, :1], "memory"),
        (3, lambda memory: memory.half(), "memory"),
        (3, lambda memory: memory[:, :1], "memory"),
        (4, lambda layer: 2, "layer"),
        (4, lambda layer: -1, "layer"),
        (5, lambda tables: tables.long(), "block_tables"),
        (5, lambda tables: tables[:-1], "block_tables"),
        (5, lambda tables: tables[:, :-1], "block_tables"),
        (6, lambda lengths: lengths[:, None], "context_lens"),
        (6, lambda lengths: lengths.long(), "context_lens"),
        (7, lambda slots: slots.int(), "slot_mapping"),
        (7, lambda slots: slots[:-1], "slot_mapping"),
        (8, lambda _: torch.empty(4, 2, 8, device=DEVICE), "out"),
    ],
)
def test_wrong_arguments_are_named(index: int, change, name: str) -> None:
    arguments = [*inputs(Case(4, 2, 8, 9, layers=2), torch.float32, DEVICE), None]
    assert_refused(paged_attention, arguments, index, change, name)
