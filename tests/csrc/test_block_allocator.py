"""The block allocator alone."""

import random

import pytest

from trocr_fast._csrc import BlockAllocator, OutOfBlocks


def state(allocator: BlockAllocator) -> tuple:
    references = [allocator.references(block) for block in range(allocator.num_blocks)]
    return references, allocator.num_blocks, allocator.num_free, allocator.num_used


def test_hands_out_low_blocks_first_and_what_was_freed_last_before_them() -> None:
    allocator = BlockAllocator(4)
    assert [allocator.allocate() for _ in range(3)] == [0, 1, 2]
    allocator.release(0)
    allocator.release(2)
    assert [allocator.allocate() for _ in range(3)] == [2, 0, 3]


def test_a_block_is_free_when_its_last_reference_goes() -> None:
    allocator = BlockAllocator(2)
    block = allocator.allocate()
    allocator.retain(block)
    assert (allocator.references(block), allocator.num_free, allocator.num_used) == (2, 1, 1)
    allocator.release(block)
    assert (allocator.references(block), allocator.num_free, allocator.num_used) == (1, 1, 1)
    allocator.release(block)
    assert (allocator.references(block), allocator.num_free, allocator.num_used) == (0, 2, 0)
    allocator.check_integrity()


def test_out_of_blocks() -> None:
    allocator = BlockAllocator(3)
    for _ in range(3):
        allocator.allocate()
    before = state(allocator)
    with pytest.raises(OutOfBlocks, match="expected a free block, 0 of 3 are free"):
        allocator.allocate()
    assert state(allocator) == before
    assert issubclass(OutOfBlocks, RuntimeError)


@pytest.mark.parametrize("call", ["retain", "release", "references"])
@pytest.mark.parametrize("block", [-(2**31), -1, 3, 2**31 - 1])
def test_refuses_what_is_no_block(call: str, block: int) -> None:
    allocator = BlockAllocator(3)
    before = state(allocator)
    with pytest.raises(ValueError, match=f"block: expected 0 to 2, got {block}$"):
        getattr(allocator, call)(block)
    assert state(allocator) == before


@pytest.mark.parametrize("call", ["retain", "release"])
def test_refuses_a_free_block(call: str) -> None:
    allocator = BlockAllocator(3)
    allocator.release(allocator.allocate())
    before = state(allocator)
    with pytest.raises(ValueError, match="block 0: expected a block in use, it is free"):
        getattr(allocator, call)(0)
    assert state(allocator) == before


@pytest.mark.parametrize("num_blocks", [0, -1, -(2**63)])
def test_refuses_no_blocks(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks: expected at least 1, got {num_blocks}$"):
        BlockAllocator(num_blocks)


@pytest.mark.parametrize("num_blocks", [2**31, 2**32 + 1, 2**63 - 1])
def test_refuses_more_blocks_than_have_a_number(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks: expected 0 to 2147483647, got {num_blocks}$"):
        BlockAllocator(num_blocks)
    allocator = BlockAllocator(3)
    with pytest.raises(ValueError, match=f"num_blocks: expected 3 to 2147483647, got {num_blocks}$"):
        allocator.grow(num_blocks)
    assert state(allocator) == ([0, 0, 0], 3, 3, 0)


@pytest.mark.parametrize("num_blocks", [2**63, -(2**63) - 1, 1.5, "3", None])
def test_refuses_what_is_no_number(num_blocks: object) -> None:
    with pytest.raises(TypeError):
        BlockAllocator(num_blocks)


def test_grows_under_what_is_free() -> None:
    allocator = BlockAllocator(2)
    held = allocator.allocate()
    allocator.grow(5)
    assert (allocator.num_blocks, allocator.num_free, allocator.references(held)) == (5, 4, 1)
    allocator.check_integrity()
    assert [allocator.allocate() for _ in range(4)] == [1, 2, 3, 4]
    allocator.grow(5)  # nothing more
    with pytest.raises(ValueError, match="num_blocks: expected 5 to 2147483647, got 4"):
        allocator.grow(4)
    with pytest.raises(OutOfBlocks, match="0 of 5 are free"):
        allocator.allocate()


def test_random_calls_equal_a_dictionary() -> None:
    draw = random.Random(7)
    allocator, references = BlockAllocator(9), dict[int, int]()
    for _ in range(3000):
        if not references or (len(references) < 9 and draw.random() < 0.4):
            block = allocator.allocate()
            assert block not in references
            references[block] = 1
        elif draw.random() < 0.4:
            block = draw.choice(list(references))
            allocator.retain(block)
            references[block] += 1
        else:
            block = draw.choice(list(references))
            allocator.release(block)
            references[block] -= 1
            if not references[block]:
                del references[block]
        allocator.check_integrity()
        assert state(allocator) == ([references.get(b, 0) for b in range(9)], 9, 9 - len(references), len(references))
