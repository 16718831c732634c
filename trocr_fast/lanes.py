"""The rows of a decode batch in the paged cache, by lane: lines join, move, leave and come back.

A lane is a line's place in the batch, with one row a beam. Lanes are filled without gaps from the first one on, so the
rows of a step are those of the first lanes.

Which beams go on is decided on the device. The host, who shares out blocks, learns of it before the next step
(`reorder`), or when that has begun already: then the device follows at once (`follow`), and the host later (`replay`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trocr_fast.config import DecoderConfig
from trocr_fast.errors import is_out_of_memory
from trocr_fast.host_copy import to_device
from trocr_fast.paged_cache import BLOCK_SIZE, PagedKV, PagedStep, StepBuffers, Swapped

FIRST_TOKENS = 32  # of a row that the cache has room for at first; it grows when lines are longer


@dataclass(frozen=True)
class SwappedLane:
    """A line that was taken out of the batch, to come back."""

    blocks: Swapped
    length: int
    limit: int
    num_counted: Tensor  # int64 [beams]

    @property
    def num_blocks(self) -> int:
        """Blocks that it needs to come back."""
        return self.blocks.detached.num_blocks


class Lanes:
    """What the rows of the batch remember: keys and values of the tokens fed so far.

    Args:
        config: of the decoder.
        num_lanes: lines at most.
        num_beams: rows of a line.
        num_blocks: of the cache, never more; None: as many as are needed, while there is memory.
        late: the host learns of parents when the next step has begun (`follow`).
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_lanes: int,
        num_beams: int,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int | None = None,
        late: bool = False,
    ) -> None:
        self.num_beams = num_beams
        self._may_grow = num_blocks is None
        if num_blocks is None:
            num_blocks = num_lanes * num_beams * FIRST_TOKENS // BLOCK_SIZE
        # What a sequence can be is bounded by what the cache can count; memory is taken for what is really fed.
        sizes = (config.num_layers, config.num_heads, config.head_dim)
        self._kv = PagedKV(*sizes, num_blocks, 2**31 - 1, dtype, device)
        self._sequences = np.zeros((num_lanes, num_beams), np.int64)
        self.lengths = np.zeros(num_lanes, np.int64)  # tokens fed
        # those of a row that are no pad token, int64 [rows]
        self.num_counted = torch.zeros(num_lanes * num_beams, dtype=torch.int64, device=device)
        self._limits = np.zeros(num_lanes, np.int64)  # tokens that a line is fed at most
        # of the last step, int64 [lanes, beams]; None: the host knows them
        self._parents = torch.arange(num_beams, device=device).repeat(num_lanes, 1) if late and num_beams > 1 else None
        self._first_rows = torch.arange(num_lanes, device=device).unsqueeze(1) * num_beams  # of each lane
        self._num_columns = FIRST_TOKENS  # of the block tables
        self._buffers = StepBuffers(num_lanes * num_beams, self._num_columns, device)
        self.version = 0  # changes when what a step reads or writes moves in memory

    @property
    def room(self) -> int:
        """Tokens of a row that there is room for in what a step reads."""
        return self._num_columns * BLOCK_SIZE

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache as it is now."""
        return self._kv.cache.num_blocks

    def find_blocks(self, num_blocks: int) -> int:
        """Blocks that are free to be taken: at least so many, if the cache may grow and there is memory for it."""
        cache = self._kv.cache
        if self._may_grow and cache.num_free < num_blocks:
            self._may_grow = self._grew(2 * cache.num_blocks + num_blocks) or self._grew(cache.num_blocks + num_blocks)
            # if not, what there is has to do: lines take turns
        return cache.num_free

    def _grew(self, num_blocks: int) -> bool:
        try:
            self._kv.grow(num_blocks)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        self.version += 1
        return True

    def blocks_of(self, lane: int) -> int:
        """Blocks that would be free without the line in a lane."""
        return len({block for sequence in self._sequences[lane] for block in self._kv.cache.table(sequence).tolist()})

    def admit(self, lane: int, max_tokens: int = 2**31 - 1) -> None:
        """An empty line in a lane, to be fed so many tokens at most."""
        self._sequences[lane] = [self._kv.cache.add() for _ in range(self.num_beams)]
        self.lengths[lane], self._limits[lane] = 0, max_tokens
        self._counted(lane).zero_()  # the parents of who was here before find nothing to permute

    def release(self, lane: int) -> None:
        """Forget the line in a lane."""
        self._kv.cache.release(self._sequences[lane])

    def move(self, source: int, target: int) -> None:
        """The line in a lane goes to another one."""
        self._sequences[target] = self._sequences[source]
        self.lengths[target], self._limits[target] = self.lengths[source], self._limits[source]
        self._counted(target).copy_(self._counted(source))
        if self._parents is not None:
            self._parents[target] = self._parents[source]

    def swap_out(self, lane: int) -> SwappedLane:
        """Take the line out of a lane, its blocks into host memory; the host knows its parents."""
        blocks = self._kv.swap_out(self._sequences[lane])
        return SwappedLane(blocks, int(self.lengths[lane]), int(self._limits[lane]), self._counted(lane).clone())

    def swap_in(self, lane: int, swapped: SwappedLane) -> None:
        """Bring a line back, into any lane."""
        self._sequences[lane] = self._kv.swap_in(swapped.blocks)
        self.lengths[lane], self._limits[lane] = swapped.length, swapped.limit
        self._counted(lane).copy_(swapped.num_counted)
        self._forget_parents(lane)

    def reorder(self, parents: np.ndarray) -> None:
        """Let the beams of the first lanes go on from others of their line.

        Args:
            parents: int64 [lanes, beams], from 0 to num_beams - 1.
        """
        self.replay(np.arange(len(parents)), parents, tail=0)
        self._permute_counted(torch.from_numpy(parents).to(self.num_counted.device))

    def follow(self, parents: Tensor) -> None:
        """`reorder` as far as the device goes: parents, int64 [lanes, beams], lie there."""
        assert self._parents is not None
        self._parents[: len(parents)] = parents
        self._permute_counted(parents)

    def replay(self, lanes: np.ndarray, parents: np.ndarray, tail: int) -> None:
        """`reorder` as far as the host goes, for some lanes.

        Args:
            lanes: int64 [lanes].
            parents: of these, int64 [lanes, beams].
            tail: steps that have begun since those parents were chosen, 0 or 1.
        """
        flat = (parents + np.arange(len(lanes))[:, None] * self.num_beams).ravel()
        self._kv.cache.permute(self._sequences[lanes].ravel(), flat, tail)
        if tail == 0:
            self._forget_parents(to_device(lanes.tolist(), self.num_counted.device))

    def reserve(self, num_lanes: int) -> int:
        """Make room for one token more of every row of the first lanes, and count it.

        Returns:
            Tokens of the longest of these rows.

        Raises:
            OutOfBlocks: too few blocks, and no more may or can be had; nothing has changed.
        """
        cache, sequences = self._kv.cache, self._sequences[:num_lanes].ravel()
        self.find_blocks(len(sequences))
        slots = self._kv.reserve(sequences)
        self.lengths[:num_lanes] = np.minimum(self.lengths[:num_lanes] + 1, self._limits[:num_lanes])
        longest = int(self.lengths[:num_lanes].max())
        if longest + 1 > self.room:  # a line that is done may have one token more
            self._num_columns = 2 * longest // BLOCK_SIZE
            self._buffers = StepBuffers(self._sequences.size, self._num_columns, self._kv.memory.device)
            self.version += 1
        self._buffers.fill(cache, sequences, slots)
        return longest

    def paged_step(self, num_lanes: int, longest: int, done: Tensor | None = None) -> PagedStep:
        """The rows of the first lanes as `reserve` left them; of lanes behind those that it had, rows of length 0.

        Nothing but work for the device, in tensors that stay where they are until `version` changes.

        Args:
            longest: of the rows, at least.
            done: bool [lanes], on the device: lines that have ended, which the host does not know yet; their rows are
                of length 0.
        """
        buffers, rows = self._buffers, num_lanes * self.num_beams
        tables = buffers.block_tables[:rows]
        if self._parents is not None:
            tables = buffers.permute(self._flat(self._parents[:num_lanes]))
        if done is not None:
            done = done.repeat_interleave(self.num_beams, output_size=rows)
            buffers.slot_mapping[:rows].masked_fill_(done, -1)
            buffers.context_lens[:rows].masked_fill_(done, 0)
        return PagedStep(
            self._kv,
            buffers.slot_mapping[:rows],
            buffers.context_lens[:rows],
            tables,
            longest,
            self.num_counted[:rows],
        )

    def begin_step(self, num_lanes: int) -> PagedStep:
        """`reserve` and `paged_step` of the same lanes."""
        return self.paged_step(num_lanes, self.reserve(num_lanes))

    def check_integrity(self) -> None:
        """Of the cache; after every step in tests."""
        self._kv.cache.check_integrity()

    def _flat(self, parents: Tensor) -> Tensor:
        """Rows instead of beams: parents int64 [lanes, beams] -> int64 [rows]."""
        return (parents + self._first_rows[: len(parents)]).flatten()

    def _permute_counted(self, parents: Tensor) -> None:
        rows = self._flat(parents)
        self.num_counted[: len(rows)] = self.num_counted[rows]

    def _forget_parents(self, lanes: int | Tensor) -> None:
        """Every beam goes on from itself."""
        if self._parents is not None:
            self._parents[lanes] = torch.arange(self.num_beams, device=self._parents.device)

    def _counted(self, lane: int) -> Tensor:
        return self.num_counted[lane * self.num_beams : (lane + 1) * self.num_beams]
