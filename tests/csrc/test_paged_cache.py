"""The paged cache: random calls against a model, and single properties."""

import os
import re
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis.stateful import run_state_machine_as_test

from tests.csrc.cache_driver import CacheDriver, happened
from tests.csrc.cache_machine import REFUSED, CacheMachine, machine_settings
from trocr_fast._csrc import OutOfBlocks, PagedCache

RULES = ["add", "fork", "reserve one", "reserve many", "fork and write both", "permute", "reserve then permute"]
RULES += ["release", "detach", "attach", "grow", "fill", "detach, fill, attach"]
CASES = ["copied on write", "kept as the last of a shared block", "permuted shared blocks", "permuted other lengths"]
CASES += ["permuted late", "freed by permute", "detached shared blocks", "detached blocks that others hold"]
CASES += ["out of blocks in reserve", "out of blocks in attach", "out of blocks for a copy"]


def test_random_calls_equal_the_model() -> None:
    """The same calls each time; TROCR_FAST_RANDOM_RUNS=20 draws new ones, twenty times as many."""
    times = int(os.environ.get("TROCR_FAST_RANDOM_RUNS", "0"))
    happened.clear()
    run_state_machine_as_test(
        CacheMachine, settings=machine_settings(300 * max(times, 1), steps=60, derandomize=not times)
    )
    sizes = [f"block size {size}" for size in (1, 2, 4, 16)]
    refused = [f"refused: {kind}" for kind in REFUSED]
    missing = [what for what in RULES + CASES + sizes + refused if not happened[what]]
    assert not missing, f"never happened: {missing}"
    assert happened["step"] >= 10_000


def test_threads_with_a_cache_each() -> None:
    """KVMemory lets other threads run while it moves bytes."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            draw = torch.Generator().manual_seed(seed)
            driver = CacheDriver(num_blocks=48, block_size=4, max_blocks=12)
            driver.add()
            for _ in range(60):
                driver.reserve(driver.live, [1] * len(driver.live))
                driver.check()
                if len(driver.live) < 4:
                    driver.fork(driver.live[0])
                parents = torch.randint(len(driver.live), (len(driver.live),), generator=draw).tolist()
                driver.permute(driver.live, parents)
                driver.check()
                if driver.cache.length(driver.live[0]) > 40:
                    driver.release(driver.live)
                    driver.add()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


# Single properties. A driver compares all that can be seen after each call.


def test_copy_on_write_copies_for_all_writers_but_the_last() -> None:
    driver = CacheDriver(num_blocks=8, block_size=4, max_blocks=4)
    first = driver.add()
    driver.reserve([first], [6])
    others = [driver.fork(first), driver.fork(first)]
    driver.check()
    _, copies = driver.cache.reserve([others[1], first, others[0]], 1)
    assert copies.tolist() == [[1, 2], [1, 3]]
    assert [driver.cache.table(s).tolist() for s in (others[1], first, others[0])] == [[0, 2], [0, 3], [0, 1]]


def test_a_full_block_is_shared_and_never_copied() -> None:
    driver = CacheDriver(num_blocks=8, block_size=4, max_blocks=4)
    first = driver.add()
    driver.reserve([first], [8])
    second = driver.fork(first)
    _, copies = driver.cache.reserve([first, second], [1, 1])
    assert copies.shape == (0, 2)
    assert [driver.cache.table(s).tolist() for s in (first, second)] == [[0, 1, 2], [0, 1, 3]]


def test_slots_and_tables_follow_the_order_of_the_tokens() -> None:
    cache = PagedCache(num_blocks=6, block_size=2, max_blocks=3)
    a, b = cache.add(), cache.add()
    slots, _ = cache.reserve([a], 1)
    assert slots.tolist() == [0]
    slots, _ = cache.reserve([b, a], [3, 2])
    assert slots.tolist() == [2, 3, 4, 1, 6]  # blocks 1, 2 for b; the rest of block 0 and block 3 for a
    assert (cache.table(a).tolist(), cache.table(b).tolist()) == ([0, 3], [1, 2])
    assert slots.dtype == np.int64
    assert cache.table(a).dtype == np.int32


def test_blocks_are_handed_out_last_freed_first() -> None:
    cache = PagedCache(num_blocks=6, block_size=2, max_blocks=3)
    a, b = cache.add(), cache.add()
    cache.reserve([a, b], [4, 2])
    cache.release([a])  # blocks 0, then 1
    cache.reserve([b], 4)
    assert cache.table(b).tolist() == [2, 1, 0]


def test_ids_are_never_given_again() -> None:
    driver = CacheDriver(num_blocks=2, block_size=1, max_blocks=2)
    for _ in range(50):  # the driver refuses an id that it has seen
        driver.release([driver.add(), driver.add()])
    for stale in driver.released:
        with pytest.raises(ValueError, match=f"sequence {stale}: expected one of the 0 live sequences"):
            driver.cache.length(stale)


def test_utilisation() -> None:
    cache = PagedCache(num_blocks=8, block_size=4, max_blocks=4)
    assert cache.utilisation() == 1
    a, b = cache.add(), cache.add()
    assert cache.utilisation() == 1
    cache.reserve([a, b], [1, 4])
    assert cache.utilisation() == 5 / 8
    cache.fork(a)  # what is shared counts once
    assert cache.utilisation() == 5 / 8
    cache.release([b])
    assert cache.utilisation() == 1 / 4


def test_properties() -> None:
    cache = PagedCache(num_blocks=8, block_size=4, max_blocks=3)
    assert (cache.num_blocks, cache.block_size, cache.max_blocks) == (8, 4, 3)
    sequence = cache.add()
    cache.reserve([sequence], 5)
    assert (cache.num_sequences, cache.num_free, cache.num_used, cache.length(sequence)) == (1, 6, 2, 5)
    with pytest.raises(AttributeError):
        cache.num_free = 3


def test_nothing_to_do() -> None:
    driver = CacheDriver(num_blocks=2, block_size=4, max_blocks=2)
    driver.check()
    a = driver.add()
    driver.reserve([a], [3])
    b = driver.fork(a)
    driver.reserve([a, b], [0, 0])  # no token, no copy
    driver.reserve([], [])
    driver.permute([], [])
    driver.release([])
    driver.detach([])
    driver.attach(0)
    driver.grow(2)
    driver.check()
    driver.cache.permute([], [], tail=2**63 - 1)
    slots, copies = driver.cache.reserve([], 1)
    assert (slots.shape, copies.shape) == ((0,), (0, 2))
    driver.check()


def test_reserve_takes_one_number_for_all() -> None:
    cache = PagedCache(num_blocks=8, block_size=4, max_blocks=2)
    a, b = cache.add(), cache.add()
    slots, _ = cache.reserve(np.array([a, b]), 3)
    assert slots.tolist() == [0, 1, 2, 4, 5, 6]
    assert cache.reserve(torch.tensor([a]))[0].tolist() == [3]


def test_fill_tables_leaves_the_rest_as_it_is() -> None:
    cache = PagedCache(num_blocks=8, block_size=1, max_blocks=4)
    a, b = cache.add(), cache.add()
    cache.reserve([a, b], [1, 3])
    tables, lengths = np.full((4, 5), -9, dtype=np.int32), np.full(4, -9, dtype=np.int32)
    cache.fill_tables([b, a, b], tables, lengths)
    assert tables.tolist() == [[1, 2, 3, -9, -9], [0, -9, -9, -9, -9], [1, 2, 3, -9, -9], [-9] * 5]
    assert lengths.tolist() == [3, 1, 3, -9]


def test_a_line_with_a_tail_of_its_own_in_blocks_of_one_token() -> None:
    driver = CacheDriver(num_blocks=8, block_size=1, max_blocks=4)
    a = driver.add()
    driver.reserve([a], [2])
    b = driver.fork(a)
    driver.reserve([a, b], [1, 1])
    driver.reserve([a, b], [1, 1])
    before = driver.cache.table(b).tolist()
    driver.permute([a, b], [1, 1], tail=1)
    driver.check()
    assert driver.cache.table(a).tolist() == [0, 1, 3, 4]
    assert driver.cache.table(b).tolist() == before == [0, 1, 3, 5]
    assert driver.cache.num_free == 3  # block 2 belonged to the beam that died


# Errors. In each of these caches are the sequences a (3 tokens) and b (6 tokens), of 4 blocks of 4, 1 of which is free.


@pytest.fixture
def driver() -> CacheDriver:
    driver = CacheDriver(num_blocks=4, block_size=4, max_blocks=3)
    driver.reserve([driver.add(), driver.add()], [3, 6])
    return driver


UNKNOWN = "expected one of the 2 live sequences, this one is unknown or was released"
# What the call is, and what its message says; the ids are 0 and 1.
MESSAGES: list[tuple[Callable[[PagedCache], object], str]] = [
    (lambda c: c.fork(7), f"sequence 7: {UNKNOWN}"),
    (lambda c: c.fork(-1), f"sequence -1: {UNKNOWN}"),
    (lambda c: c.table(2**32), f"sequence 4294967296: {UNKNOWN}"),
    (lambda c: c.length(2**63 - 1), f"sequence 9223372036854775807: {UNKNOWN}"),
    (lambda c: c.reserve([0, 9], 1), f"sequence 9: {UNKNOWN}"),
    (lambda c: c.permute([0, 9], [0, 0]), f"sequence 9: {UNKNOWN}"),
    (lambda c: c.release([0, 9]), f"sequence 9: {UNKNOWN}"),
    (lambda c: c.detach([0, 9]), f"sequence 9: {UNKNOWN}"),
    (
        lambda c: c.fill_tables([0, 9], np.zeros((2, 3), np.int32), np.zeros(2, np.int32)),
        f"sequence 9: {UNKNOWN}",
    ),
    (lambda c: c.reserve([1, 0, 1], 0), "sequence 1: expected once in a call, got twice"),
    (lambda c: c.permute([1, 0, 1], [0, 0, 0]), "sequence 1: expected once in a call, got twice"),
    (lambda c: c.release([1, 0, 1]), "sequence 1: expected once in a call, got twice"),
    (lambda c: c.detach([1, 0, 1]), "sequence 1: expected once in a call, got twice"),
    (lambda c: c.reserve([0, 1], [1]), "num_tokens: expected 2 entries, got 1"),
    (lambda c: c.reserve([0, 1], [1, 7]), r"expected 0 to 6 for sequence 1 of 6 tokens \(3 blocks of 4\), got 7"),
    (lambda c: c.reserve([0, 1], [0, -1]), "num_tokens: expected 0 to 6 for sequence 1 .* got -1"),
    (lambda c: c.reserve([0, 1], 2**63 - 1), "num_tokens: expected 0 to 9 for sequence 0 .* got 9223372036854775807"),
    (lambda c: c.reserve([0], -(2**63)), "num_tokens: expected 0 to 9 for sequence 0 .* got -9223372036854775808"),
    (lambda c: c.permute([0, 1], [0]), "parents: expected 2 entries, got 1"),
    (lambda c: c.permute([0, 1], [0, 2]), "parents: expected 0 to 1, got 2"),
    (lambda c: c.permute([0, 1], [-1, 0]), "parents: expected 0 to 1, got -1"),
    (lambda c: c.permute([0, 1], [0, 0], -1), "tail: expected 0, or so many of the 3 tokens of sequence 0 .* got -1"),
    (lambda c: c.permute([1, 0], [0, 0], 6), "tail: .* of the 3 tokens of sequence 0 .* got 6"),
    (lambda c: c.permute([1], [0], 3), "6 tokens of sequence 1 that a multiple of 4 is left before them, got 3"),
    (lambda c: c.grow(3), "num_blocks: expected 4 to 2147483647, got 3"),
    (lambda c: c.references(4), "block: expected 0 to 3, got 4"),
    (
        lambda c: c.fill_tables([0, 1], np.zeros((2, 1), np.int32), np.zeros(2, np.int32)),
        "tables: expected rows of at least 2 entries for sequence 1, got 1",
    ),
    (
        lambda c: c.fill_tables([0, 1], np.zeros((1, 3), np.int32), np.zeros(2, np.int32)),
        r"tables: expected contiguous int32 \[at least 2, max_blocks\], got \(1, 3\)",
    ),
    (
        lambda c: c.fill_tables([0, 1], np.zeros((2, 6), np.int32)[:, ::2], np.zeros(2, np.int32)),
        r"tables: expected contiguous int32 .* got \(2, 3\), strides \(24, 8\)",
    ),
    (
        lambda c: c.fill_tables([0, 1], np.zeros((2, 3), np.int32), np.zeros((2, 1), np.int32)),
        r"lengths: expected contiguous int32 \[at least 2\], got \(2, 1\)",
    ),
    (lambda c: c.reserve([0.0]), "sequences: expected integers, got float64"),
    (lambda c: c.reserve([True]), "sequences: expected integers, got bool"),
    (lambda c: c.reserve(["0"]), "sequences: expected integers, got <U1"),
    (lambda c: c.reserve([[0, 1], [0, 1]]), "sequences: expected one dimension, got 2"),
    (lambda c: c.reserve([[0], [0, 1]]), "sequences: expected integers, got list"),
    (lambda c: c.reserve([0], [1.5]), "num_tokens: expected integers, got float64"),
    (lambda c: c.reserve([2**64]), "sequences: expected integers, got object"),
    (lambda c: c.permute([0], [0.5]), "parents: expected integers, got float64"),
]


@pytest.mark.parametrize(("call", "message"), MESSAGES, ids=[message[:40] for _, message in MESSAGES])
def test_a_refused_call_says_why_and_changes_nothing(
    driver: CacheDriver, call: Callable[[PagedCache], object], message: str
) -> None:
    assert driver.live == [0, 1]
    got = driver.fails(ValueError, lambda: call(driver.cache))
    assert re.search(message, got), got
    driver.check()


def test_refuses_a_table_of_another_type(driver: CacheDriver) -> None:
    for tables, lengths in [(np.int64, np.int32), (np.int32, np.int64), (np.float32, np.int32)]:
        with pytest.raises(TypeError):
            driver.cache.fill_tables([0], np.zeros((1, 3), tables), np.zeros(1, lengths))


def test_out_of_blocks_says_how_many(driver: CacheDriver) -> None:
    message = driver.fails(OutOfBlocks, lambda: driver.cache.reserve([0, 1], [2, 3]))
    assert message == "2 sequences need 2 blocks, 1 of 4 are free"
    driver.fork(1)
    driver.reserve([0], [2])
    message = driver.fails(OutOfBlocks, lambda: driver.cache.reserve([1], 1))  # for a copy
    assert message == "1 sequences need 1 blocks, 0 of 4 are free"


def test_out_of_blocks_in_attach_says_how_many() -> None:
    driver = CacheDriver(num_blocks=3, block_size=4, max_blocks=3)
    a = driver.add()
    driver.reserve([a], [7])
    driver.detach([a])
    driver.reserve([driver.add()], [8])
    message = driver.fails(OutOfBlocks, lambda: driver.cache.attach(driver.detached[0][0]))
    assert message == "1 detached sequences need 2 blocks, 1 of 3 are free"
    driver.check()


def test_attach_refuses_another_cache_that_cannot_hold_it() -> None:
    driver = CacheDriver(num_blocks=4, block_size=4, max_blocks=4)
    a = driver.add()
    driver.reserve([a], [9])
    detached, _ = driver.cache.detach([a])
    for cache, message in [
        (PagedCache(4, 2, 8), "detached: expected sequences in blocks of 2, got blocks of 4"),
        (PagedCache(4, 4, 2), "detached: expected tables of at most 2 blocks, got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache.attach(detached)
        assert (cache.num_free, cache.num_sequences) == (4, 0)
    other = PagedCache(8, 4, 3)
    sequences, blocks = other.attach(detached)
    assert (other.length(sequences[0]), other.table(sequences[0]).tolist()) == (9, blocks.tolist())
    other.check_integrity()


def test_permute_refuses_a_shared_tail() -> None:
    driver = CacheDriver(num_blocks=4, block_size=4, max_blocks=4)
    a = driver.add()
    driver.reserve([a], [5])
    b = driver.fork(a)
    message = driver.fails(ValueError, lambda: driver.cache.permute([a, b], [1, 0], tail=1))
    assert message == f"tail: expected blocks that no other sequence holds, block 1 of sequence {a} is shared"


def test_asking_for_more_than_any_memory_is_out_of_blocks() -> None:
    cache = PagedCache(num_blocks=4, block_size=1, max_blocks=2**31 - 1)
    sequences = [cache.add() for _ in range(50)]
    with pytest.raises(OutOfBlocks, match=f"50 sequences need {50 * (2**31 - 1)} blocks, 4 of 4 are free"):
        cache.reserve(sequences, 2**31 - 1)
    cache.reserve(sequences[:4], 1)


@pytest.mark.parametrize("block_size", [-1, 0, 3, 6, 63, 128, 2**40])
def test_refuses_a_block_size(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size: expected a power of two from 1 to 64, got {block_size}$"):
        PagedCache(4, block_size, 4)


@pytest.mark.parametrize("max_blocks", [-1, 0, 2**31 // 16, 2**31, 2**63 - 1])
def test_refuses_max_blocks(max_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"max_blocks: expected 1 to 134217727, got {max_blocks}$"):
        PagedCache(4, 16, max_blocks)


@pytest.mark.parametrize("num_blocks", [-1, 0, 2**31])
def test_refuses_num_blocks(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks: expected .* got {num_blocks}$"):
        PagedCache(num_blocks, 1, 4)
