"""The rows of a decode batch in the paged cache, by lane: lines join, move, leave and come back.

A lane is a line's place in the batch, with one row a beam. Lanes are filled without gaps from the first one on, so the
rows of a step are those of the first lanes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trocr_fast.config import DecoderConfig
from trocr_fast.paged_cache import BLOCK_SIZE, OutOfBlocks, PagedKV, PagedStep, StepBuffers, Swapped

FIRST_TOKENS = 32  # of a row that the cache has room for at first; it grows when lines are longer


@dataclass(frozen=True)
class SwappedLane:
    """A line that was taken out of the batch, to come back."""

    blocks: Swapped
    length: int
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
        num_blocks: of the cache, never more; None: as many as are needed.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_lanes: int,
        num_beams: int,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int | None = None,
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
        self._num_columns = FIRST_TOKENS  # of the block tables
        self._buffers = StepBuffers(num_lanes * num_beams, self._num_columns, device)

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache as it is now."""
        return self._kv.cache.num_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that are there to be taken."""
        return 2**62 if self._may_grow else self._kv.cache.num_free

    def blocks_of(self, lane: int) -> int:
        """Blocks that would be free without the line in a lane."""
        return len({block for sequence in self._sequences[lane] for block in self._kv.cache.table(sequence).tolist()})

    def admit(self, lane: int) -> None:
        """An empty line in a lane."""
        self._sequences[lane] = [self._kv.cache.add() for _ in range(self.num_beams)]
        self.lengths[lane] = 0
        self._counted(lane).zero_()

    def release(self, lane: int) -> None:
        """Forget the line in a lane."""
        self._kv.cache.release(self._sequences[lane])

    def move(self, source: int, target: int) -> None:
        """The line in a lane goes to another one."""
        self._sequences[target] = self._sequences[source]
        self.lengths[target] = self.lengths[source]
        self._counted(target).copy_(self._counted(source))

    def swap_out(self, lane: int) -> SwappedLane:
        """Take the line out of a lane, its blocks into host memory."""
        blocks = self._kv.swap_out(self._sequences[lane])
        return SwappedLane(blocks, int(self.lengths[lane]), self._counted(lane).clone())

    def swap_in(self, lane: int, swapped: SwappedLane) -> None:
        """Bring a line back, into any lane."""
        self._sequences[lane] = self._kv.swap_in(swapped.blocks)
        self.lengths[lane] = swapped.length
        self._counted(lane).copy_(swapped.num_counted)

    def reorder(self, parents: np.ndarray) -> None:
        """Let the beams of the first lanes go on from others of their line.

        Args:
            parents: int64 [lanes, beams], from 0 to num_beams - 1.
        """
        lanes = len(parents)
        flat = (parents + np.arange(lanes)[:, None] * self.num_beams).ravel()
        self._kv.cache.permute(self._sequences[:lanes].ravel(), flat)
        rows = lanes * self.num_beams
        self.num_counted[:rows] = self.num_counted[torch.from_numpy(flat).to(self.num_counted.device)]

    def begin_step(self, num_lanes: int) -> PagedStep:
        """Make room for one token more of every row of the first lanes, and count it."""
        cache, sequences = self._kv.cache, self._sequences[:num_lanes].ravel()
        try:
            slots = self._kv.reserve(sequences)
        except OutOfBlocks:
            if not self._may_grow:
                raise
            self._kv.grow(2 * cache.num_blocks + len(sequences))
            slots = self._kv.reserve(sequences)
        self.lengths[:num_lanes] += 1
        longest = int(self.lengths[:num_lanes].max())
        if longest > self._num_columns * BLOCK_SIZE:
            self._num_columns = 2 * longest // BLOCK_SIZE
            self._buffers = StepBuffers(self._sequences.size, self._num_columns, self._kv.memory.device)
        buffers, rows = self._buffers, len(sequences)
        buffers.fill(cache, sequences, slots)
        return PagedStep(
            self._kv,
            buffers.slot_mapping[:rows],
            buffers.context_lens[:rows],
            buffers.block_tables[:rows],
            longest,
            self.num_counted[:rows],
        )

    def check_integrity(self) -> None:
        """Of the cache; after every step in tests."""
        self._kv.cache.check_integrity()

    def _counted(self, lane: int) -> Tensor:
        return self.num_counted[lane * self.num_beams : (lane + 1) * self.num_beams]
