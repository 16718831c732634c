"""A model without tensors: pictures are numbers, and a token depends on everything that it should.

The next token of a row is made of its line's cross memory, of what the cache holds of the row, and of the row's place
among the line's beams. So a line gets its own tokens only if nothing was lost, doubled, mixed up or decoded twice.
"""

from functools import cache

from trocr_fast._csrc import Detached, PagedCache

MODULUS = 1_000_003


def picture_of(line: int) -> int:
    return 7919 * line + 13


def next_token(cross: int, row: list[int], beam: int) -> int:
    mixed = cross + 31 * beam + len(row)
    for token in row:
        mixed = (mixed * 1009 + token) % MODULUS
    return mixed


def parents_of(tokens: list[int]) -> list[int]:
    """Where each beam goes on from, as chance would have it."""
    return [token // 7 % len(tokens) for token in tokens]


@cache
def rows_alone(line: int, num_steps: int, num_beams: int) -> list[list[int]]:
    """What the rows of a line hold after some steps, in no company."""
    rows: list[list[int]] = [[] for _ in range(num_beams)]
    for _ in range(num_steps):
        tokens = [next_token(picture_of(line), row, beam) for beam, row in enumerate(rows)]
        rows = [[*rows[parent], tokens[beam]] for beam, parent in enumerate(parents_of(tokens))]
    return rows


class ListCache:
    """Blocks of one token as objects; beams of a line share them."""

    def __init__(self, num_blocks: int, num_beams: int, max_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.num_beams = num_beams
        self.rows: dict[int, list[list[list[int]]]] = {}  # line -> row -> block -> its one token
        self.out: dict[int, list[list[list[int]]]] = {}
        self.held: dict[int, int] = {}  # line -> distinct blocks, in the cache or swapped out of it

    @property
    def num_free(self) -> int:
        return self.num_blocks - sum(self.held[line] for line in self.rows)

    def blocks_of(self, line: int) -> int:
        return self.held[line]

    def start(self, line: int) -> None:
        self.rows[line] = [[] for _ in range(self.num_beams)]
        self.held[line] = 0

    def tokens(self, line: int) -> list[list[int]]:
        return [[block[0] for block in row] for row in self.rows[line]]

    def append(self, tokens_of: dict[int, list[int]]) -> None:
        """One token to each row of some lines; then each row goes on from its parent, but for this token."""
        assert len(tokens_of) * self.num_beams <= self.num_free, "out of blocks"
        for line, tokens in tokens_of.items():
            rows = self.rows[line]
            rows = [[*rows[parent], [tokens[beam]]] for beam, parent in enumerate(parents_of(tokens))]
            self.rows[line] = rows
            self.held[line] = len({id(block) for row in rows for block in row})

    def swap_out(self, line: int) -> None:
        self.out[line] = self.rows.pop(line)

    def swap_in(self, line: int) -> None:
        self.rows[line] = self.out.pop(line)
        assert self.num_free >= 0, "out of blocks"

    def end(self, line: int) -> None:
        for lines in (self.rows, self.out, self.held):
            lines.pop(line, None)


class RealCache:
    """The same with trocr_fast's own cache; a list of numbers stands for the memory behind it."""

    def __init__(self, num_blocks: int, num_beams: int, max_tokens: int) -> None:
        self.cache = PagedCache(num_blocks, 1, max_tokens)
        self.num_beams = num_beams
        self.memory = [-1] * num_blocks
        self.rows: dict[int, list[int]] = {}  # line -> sequences
        self.out: dict[int, tuple[Detached, list[int]]] = {}  # line -> and the tokens of its blocks

    @property
    def num_free(self) -> int:
        return self.cache.num_free

    def blocks_of(self, line: int) -> int:
        if line in self.out:
            return self.out[line][0].num_blocks
        return len({block for row in self.rows[line] for block in self.cache.table(row).tolist()})

    def start(self, line: int) -> None:
        self.rows[line] = [self.cache.add() for _ in range(self.num_beams)]

    def tokens(self, line: int) -> list[list[int]]:
        return [[self.memory[block] for block in self.cache.table(row).tolist()] for row in self.rows[line]]

    def append(self, tokens_of: dict[int, list[int]]) -> None:
        slots, copies = self.cache.reserve([row for line in tokens_of for row in self.rows[line]])
        assert len(copies) == 0
        tokens = [token for line in tokens_of for token in tokens_of[line]]
        for slot, token in zip(slots.tolist(), tokens, strict=True):
            self.memory[slot] = token
        for line, of_line in tokens_of.items():
            self.cache.permute(self.rows[line], parents_of(of_line), 1)

    def swap_out(self, line: int) -> None:
        detached, blocks = self.cache.detach(self.rows.pop(line))
        self.out[line] = detached, [self.memory[block] for block in blocks.tolist()]
        for block in blocks.tolist():
            self.memory[block] = -1

    def swap_in(self, line: int) -> None:
        detached, tokens = self.out.pop(line)
        sequences, blocks = self.cache.attach(detached)
        self.rows[line] = sequences.tolist()
        for block, token in zip(blocks.tolist(), tokens, strict=True):
            self.memory[block] = token

    def end(self, line: int) -> None:
        self.cache.release(self.rows.pop(line, []))
        self.out.pop(line, None)
