"""A paged cache, the memory behind it and a model of both, driven together and compared after every call.

With a trace, every call is written down as a line of text, for replay.cpp:

    NAME ARGUMENT... -> RESULT...

An argument or a result is a number or a list; a list is written as its length and then its numbers. The calls:

    cache     num_blocks block_size max_blocks -> ok       the first line
    add       -> sequence
    fork      parent -> sequence
    reserve   [sequences] [num_tokens] -> [slot_mapping] [copies: source, destination, source, ...]
    permute   [sequences] [parents] tail -> ok
    release   [sequences] -> ok
    detach    key [sequences] -> [blocks]                  the key is a number that the trace gives to what was detached
    attach    key -> [sequences] [blocks]
    grow      num_blocks -> ok
    length    sequence -> ok
    state     num_free [sequences] [their lengths] [their tables, one after another] -> ok     after each call

The result of a call that fails is `out-of-blocks` or `invalid`; such a call changes nothing.
"""

from collections import Counter
from collections.abc import Callable
from typing import TextIO

import numpy as np
import pytest
import torch

from trocr_fast import _csrc

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 2, 3

# What happened over all drivers of this process, so that a test can tell that it tested something.
happened: Counter[str] = Counter()


class Model:
    """What a cache should hold. A sequence is a list of blocks and a block the list of its tokens' values.

    Shared blocks are one list object, so that the number of distinct objects is the number of blocks in use.
    """

    def __init__(self, block_size: int, rows: dict[int, list[list[int]]]) -> None:
        self.block_size = block_size
        self.rows = rows

    def copy_of(self, sequences: list[int]) -> list[list[list[int]]]:
        copies: dict[int, list[int]] = {}
        return [[copies.setdefault(id(block), list(block)) for block in self.rows[s]] for s in sequences]

    def copy(self) -> "Model":
        return Model(self.block_size, dict(zip(self.rows, self.copy_of(list(self.rows)), strict=True)))

    def reserve(self, sequence: int, values: list[int]) -> int:
        """Appends values; returns the number of blocks copied on write."""
        row, copied = self.rows[sequence], 0
        for value in values:
            if not row or len(row[-1]) == self.block_size:
                row.append([])
            elif self.ends_shared(sequence):
                row[-1] = list(row[-1])
                copied += 1
            row[-1].append(value)
        return copied

    def permute(self, sequences: list[int], parents: list[int], tail: int) -> None:
        before = [self.rows[s] for s in sequences]
        for i, sequence in enumerate(sequences):
            prefix, own = before[parents[i]], before[i]
            kept = -(-tail // self.block_size)
            self.rows[sequence] = prefix[: len(prefix) - kept] + own[len(own) - kept :]

    def holders(self, block: list[int]) -> int:
        return sum(any(held is block for held in row) for row in self.rows.values())

    def ends_shared(self, sequence: int) -> bool:
        """Whether the next token belongs into a block that others hold too."""
        row = self.rows[sequence]
        return bool(row) and len(row[-1]) < self.block_size and self.holders(row[-1]) > 1

    def tokens(self, sequence: int) -> list[int]:
        return [value for block in self.rows[sequence] for value in block]

    def blocks(self) -> list[list[int]]:
        return list({id(block): block for row in self.rows.values() for block in row}.values())


def values_of(tokens: torch.Tensor, layer: int, side: int) -> torch.Tensor:
    """Keys (side 0) or values (side 1) [..., num_heads, head_dim] of tokens [...]: each number is unique."""
    parts = torch.arange(NUM_HEADS * HEAD_DIM).view(NUM_HEADS, HEAD_DIM)
    return (tokens[..., None, None] * 32 + layer * 16 + side * 8 + parts).float()


class CacheDriver:
    def __init__(self, num_blocks: int, block_size: int, max_blocks: int, trace: TextIO | None = None) -> None:
        self.cache = _csrc.PagedCache(num_blocks, block_size, max_blocks)
        self.model = Model(block_size, {})
        self.released = [-1, 2**40]  # never given or given back
        self.detached: dict[int, tuple[_csrc.Detached, torch.Tensor, list[list[list[int]]]]] = {}
        self.num_keys = 0  # of `detached`, given so far
        self.num_tokens = 0  # written so far: the next token's value
        self.trace = trace
        self.bind(torch.full((num_blocks, NUM_LAYERS, 2, block_size, NUM_HEADS, HEAD_DIM), torch.nan))
        self.record("cache", num_blocks, block_size, max_blocks, results=["ok"])

    def bind(self, memory: torch.Tensor) -> None:
        self.bytes = memory
        self.memory = _csrc.KVMemory(memory)

    @property
    def live(self) -> list[int]:
        return list(self.model.rows)

    def record(self, name: str, *arguments: int | list[int], results: list) -> None:
        if self.trace is None:
            return
        words = [name]
        for value in [*arguments, "->", *results]:
            listed = isinstance(value, list | np.ndarray)
            words += [str(len(value)), *(str(int(x)) for x in value)] if listed else [str(value)]
        self.trace.write(" ".join(words) + "\n")
        self.trace.flush()  # a crash must not lose the line before it

    # The calls. Each one is compared with the model at once; check() compares everything.

    def add(self) -> int:
        sequence = self.cache.add()
        self.record("add", results=[sequence])
        self.new(sequence, [])
        return sequence

    def fork(self, parent: int) -> int:
        child = self.cache.fork(parent)
        self.record("fork", parent, results=[child])
        self.new(child, list(self.model.rows[parent]))
        return child

    def new(self, sequence: int, row: list[list[int]]) -> None:
        assert sequence not in self.model.rows and sequence not in self.released, f"id {sequence} was given before"
        self.model.rows[sequence] = row

    def reserve(self, sequences: list[int], num_tokens: list[int]) -> bool:
        """Whether there was room, in which case the tokens were written."""
        wanted, tokens, copied = self.model.copy(), list[int](), 0
        writers = sum(count > 0 and self.model.ends_shared(s) for s, count in zip(sequences, num_tokens, strict=True))
        for sequence, count in zip(sequences, num_tokens, strict=True):
            added = list(range(self.num_tokens + len(tokens), self.num_tokens + len(tokens) + count))
            copied += wanted.reserve(sequence, added)
            tokens += added
        call = ("reserve", sequences, num_tokens)
        if len(wanted.blocks()) > self.cache.num_blocks:
            happened["out of blocks in reserve"] += 1
            happened["out of blocks for a copy"] += copied > 0
            self.fails(_csrc.OutOfBlocks, lambda: self.cache.reserve(sequences, num_tokens), *call)
            return False
        slots, copies = self.cache.reserve(sequences, num_tokens)
        self.record(*call, results=[slots, copies.reshape(-1)])
        assert len(copies) == copied, f"{len(copies)} blocks copied on write, expected {copied}"
        happened["copied on write"] += copied
        happened["kept as the last of a shared block"] += writers > copied
        self.num_tokens += len(tokens)
        self.model = wanted
        self.memory.copy_blocks(torch.from_numpy(copies))
        # Slot -1 in front of the others: what belongs to it is poison.
        slot_mapping = torch.cat([torch.tensor([-1]), torch.from_numpy(slots)])
        for layer in range(NUM_LAYERS):
            k, v = (values_of(torch.tensor([-1, *tokens]), layer, side) for side in (0, 1))
            k[0], v[0] = torch.nan, torch.nan
            self.memory.write(layer, k, v, slot_mapping)
        return True

    def permute(self, sequences: list[int], parents: list[int], tail: int = 0) -> None:
        rows = [self.model.rows[s] for s in sequences]
        self.cache.permute(sequences, parents, tail)
        self.record("permute", sequences, parents, tail, results=["ok"])
        moved = any(parent != i for i, parent in enumerate(parents))
        happened["permuted shared blocks"] += moved and any(self.model.holders(b) > 1 for row in rows for b in row)
        happened["permuted other lengths"] += len({sum(map(len, rows[parent])) for parent in parents}) > 1
        happened["permuted late"] += moved and tail > 0
        used = len(self.model.blocks())
        self.model.permute(sequences, parents, tail)
        happened["freed by permute"] += len(self.model.blocks()) < used

    def release(self, sequences: list[int]) -> None:
        self.cache.release(sequences)
        self.record("release", sequences, results=["ok"])
        self.forget(sequences)

    def detach(self, sequences: list[int]) -> None:
        detached, blocks = self.cache.detach(sequences)
        self.record("detach", self.num_keys, sequences, results=[blocks])
        rows = self.model.copy_of(sequences)
        distinct = {id(block) for row in rows for block in row}
        assert len(blocks) == detached.num_blocks == len(distinct) == len(set(blocks.tolist()))
        assert detached.lengths == [sum(map(len, row)) for row in rows]
        happened["detached shared blocks"] += len(distinct) < sum(map(len, rows))
        host = torch.full((len(blocks), *self.bytes.shape[1:]), torch.nan)
        self.memory.swap_out(blocks, host)
        self.detached[self.num_keys] = detached, host, rows
        self.num_keys += 1
        self.forget(sequences)
        happened["detached blocks that others hold"] += any(self.cache.references(int(block)) for block in blocks)

    def attach(self, key: int) -> bool:
        """Whether there was room."""
        detached, host, rows = self.detached[key]
        if detached.num_blocks > self.cache.num_free:
            happened["out of blocks in attach"] += 1
            self.fails(_csrc.OutOfBlocks, lambda: self.cache.attach(detached), "attach", key)
            return False
        sequences, blocks = self.cache.attach(detached)
        self.record("attach", key, results=[sequences, blocks])
        self.memory.swap_in(blocks, host)
        copies: dict[int, list[int]] = {}  # for it may be attached again
        for sequence, row in zip(sequences.tolist(), rows, strict=True):
            self.new(sequence, [copies.setdefault(id(block), list(block)) for block in row])
        return True

    def grow(self, num_blocks: int) -> None:
        self.cache.grow(num_blocks)
        self.record("grow", num_blocks, results=["ok"])
        memory = torch.full((num_blocks, *self.bytes.shape[1:]), torch.nan)
        memory[: len(self.bytes)] = self.bytes
        self.bind(memory)

    def forget(self, sequences: list[int]) -> None:
        for sequence in sequences:
            del self.model.rows[sequence]
        self.released += sequences

    def fails(self, error: type[Exception], call: Callable[[], object], *recorded: str | int | list[int]) -> str:
        """Makes a call that has to fail and to change nothing; returns the error's message."""
        before = self.snapshot()
        with pytest.raises(error) as caught:
            call()
        assert self.snapshot() == before, f"a call that failed changed the cache: {caught.value}"
        result = "out-of-blocks" if error is _csrc.OutOfBlocks else "invalid"
        if recorded:
            self.record(str(recorded[0]), *recorded[1:], results=[result])
        return str(caught.value)

    def snapshot(self) -> object:
        cache = self.cache
        tables = [(s, cache.length(s), cache.table(s).tolist()) for s in self.live]
        references = [cache.references(block) for block in range(cache.num_blocks)]
        return tables, references, cache.num_blocks, cache.num_free, cache.num_sequences, cache.utilisation()

    def check(self) -> None:
        """Compares everything that can be seen of the cache and the memory with the model."""
        cache, model, live = self.cache, self.model, self.live
        cache.check_integrity()
        tables = {s: cache.table(s).tolist() for s in live}
        lengths = [cache.length(s) for s in live]
        assert lengths == [len(model.tokens(s)) for s in live]
        assert cache.num_sequences == len(live)
        assert cache.num_free + cache.num_used == cache.num_blocks
        assert cache.num_used == len(model.blocks())
        assert all(len(set(table)) == len(table) for table in tables.values()), "a block is twice in a table"
        counts = Counter(block for table in tables.values() for block in table)
        assert all(cache.references(block) == counts[block] for block in range(cache.num_blocks))
        pairs = {(id(b), n) for s in live for b, n in zip(model.rows[s], tables[s], strict=True)}
        assert len(pairs) == len(model.blocks()) == len(counts), "sequences share other blocks than they should"
        slots = cache.num_used * cache.block_size
        assert cache.utilisation() == (sum(map(len, model.blocks())) / slots if slots else 1)
        self.check_bytes()
        flat = [block for s in live for block in tables[s]]
        self.record("state", cache.num_free, live, lengths, flat, results=["ok"])
        # What nobody holds is poison from here on.
        self.bytes[[block for block in range(cache.num_blocks) if not counts[block]]] = torch.nan

    def check_bytes(self) -> None:
        if not (live := self.live):
            return
        num_keys = max(self.cache.length(s) for s in live) + 1
        tables = np.full((len(live), self.cache.max_blocks), -7, dtype=np.int32)
        lengths = np.empty(len(live), dtype=np.int32)
        self.cache.fill_tables(live, tables, lengths)
        tokens = torch.full((len(live), num_keys), -1)
        for row, sequence in enumerate(live):
            values = self.model.tokens(sequence)
            tokens[row, : len(values)] = torch.tensor(values, dtype=torch.int64)
        for layer in range(NUM_LAYERS):
            got = [torch.full((len(live), NUM_HEADS, num_keys, HEAD_DIM), torch.nan) for _ in range(2)]
            self.memory.gather(layer, torch.from_numpy(tables), torch.from_numpy(lengths), *got)
            for side in (0, 1):
                expected = values_of(tokens, layer, side)  # [num_rows, num_keys, num_heads, head_dim]
                expected[tokens == -1] = 0
                assert torch.equal(got[side], expected.transpose(1, 2)), f"layer {layer}, side {side}: other bytes"
