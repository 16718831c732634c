"""Continuous batching: lines join and leave the decode batch at every step.

    scheduler says who -> lanes, memory and search move them -> decoder feeds a token -> search chooses the next

Pictures are encoded in batches and wait, encoded, for a place. The host looks at the outcome of every step: which lines
are done, and which beam each beam goes on from.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trocr_fast.cross_memory import CrossMemory, Lines
from trocr_fast.lanes import Lanes, SwappedLane
from trocr_fast.model import Model, Network
from trocr_fast.scheduler import Capacity, Plan, Scheduler
from trocr_fast.search import Choice, Hypothesis, Search, SearchSettings, make_search

MAX_HELD = 4096  # results of `decode` that wait for one before them


@dataclass(frozen=True)
class _Swapped:
    """A line that waits for blocks."""

    blocks: SwappedLane
    search: dict[str, Tensor]
    memory: list[Tensor]


class Engine:
    """Decodes pictures with one search.

    Args:
        network: what is computed.
        settings: how tokens are chosen.
        num_lanes: pictures in the decode batch at most.
        encode_batch: pictures encoded together at most; None: as many.
        count_pads: the rule of sinusoidal positions, as of `Decoder.positions`.
        num_blocks: of the self-attention cache, never more; None: as many as are needed.
        table: for uint8 pictures: fp32 [channels, 256], the normalised value of each of the 256 values.

    Used by one thread at a time.
    """

    def __init__(
        self,
        network: Network,
        settings: SearchSettings,
        num_lanes: int,
        encode_batch: int | None = None,
        count_pads: bool = True,
        num_blocks: int | None = None,
        table: Tensor | None = None,
    ) -> None:
        self.network, self._table = network, table
        encode_batch = min(encode_batch or num_lanes, num_lanes)
        self._capacity = Capacity(num_lanes, num_lanes + encode_batch, settings.num_beams, encode_batch)
        self._positions = network.decoder.positions(count_pads)
        self._settings, self._num_blocks = settings, num_blocks
        self.num_swaps = 0
        self._next = 0  # number of the next line; none is used twice
        self._reset()

    def _reset(self) -> None:
        """Forget all lines."""
        network, capacity = self.network, self._capacity
        self.scheduler = Scheduler(capacity)
        self._pixels: dict[int, Tensor] = {}
        self._states: dict[int, Tensor] = {}  # [tokens, width] of lines that are encoded and not in the batch yet
        self._limits: dict[int, int] = {}
        self._lane_of: dict[int, int] = {}
        self._swapped: dict[int, _Swapped] = {}
        # What is large goes before its like comes: memory may be what there was too little of.
        for name in ("lanes", "_search", "_memory"):
            self.__dict__.pop(name, None)
        config, dtype, device = network.decoder.config, network.dtype, network.device
        self.lanes: Lanes = Lanes(config, capacity.num_lanes, capacity.num_beams, dtype, device, self._num_blocks)
        self._search: Search = make_search(self._settings, capacity.num_lanes, device)
        self._memory: CrossMemory = network.slots(capacity.num_lanes)  # a slot for each lane

    @property
    def is_idle(self) -> bool:
        """No line is waiting or being decoded."""
        return self.scheduler.is_idle

    def add(self, pixels: Tensor, max_length: int | None = None) -> int:
        """A picture to be decoded.

        Args:
            pixels: [channels, H, W]: uint8 if the engine has a table, else floating-point and normalised.
            max_length: at which this line is cut, the start token counted; None: as the others.

        Returns:
            The number of its line.

        Raises:
            ValueError: a limit that leaves no room for a new token, pixels of another shape or dtype.
        """
        encoder = self.network.encoder.config
        expected = (encoder.num_channels, *encoder.image_size)
        fits = pixels.is_floating_point() if self._table is None else pixels.dtype == torch.uint8
        if tuple(pixels.shape) != expected or not fits:
            kind = "floating-point" if self._table is None else "uint8"
            raise ValueError(f"pixels: expected {kind} {list(expected)}, got {pixels.dtype} {list(pixels.shape)}")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length: expected at least 2, got {max_length}")
        line, self._next = self._next, self._next + 1
        self.scheduler.add(line)
        self._pixels[line] = pixels
        if max_length is not None:
            self._limits[line] = max_length
        return line

    def cancel(self, line: int) -> None:
        """A line is not wanted any more.

        Raises:
            ValueError: no such line, or it has ended.
        """
        self.scheduler.cancel(line)
        self._forget(line)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, list[Hypothesis]]]:
        """One token more for every line of the batch, and pictures encoded where there is room.

        Returns:
            The lines that are done, and what was found.

        Raises:
            ValueError: a line that outgrows the position table, or all blocks there are. All lines are forgotten, as
                after any other error; the engine can be used again.
        """
        try:
            plan = self.scheduler.plan(self.lanes.free_blocks, self._blocks_of)
            self._place(plan)
            done = self._decode(len(plan.decode))
            # before encoding, which a GPU is given to do without waiting for it
            found = self._leave([plan.decode[lane] for lane in done])
            self._encode(plan)
            return found
        except BaseException:
            self._reset()
            raise

    def _blocks_of(self, line: int) -> int:
        if line in self._swapped:
            return self._swapped[line].blocks.num_blocks
        return self.lanes.blocks_of(self._lane_of[line])

    def _place(self, plan: Plan) -> None:
        """Put every line where the plan wants it."""
        for line, _, lane in plan.swap_out:
            known = self._search.lines.take(lane), self._memory.take(lane)
            self._swapped[line] = _Swapped(self.lanes.swap_out(lane), *known)
            del self._lane_of[line]
            self.num_swaps += 1
        for source, target in plan.moves:
            self.lanes.move(source, target)
            self._search.lines.move(source, target)
            self._memory.put(target, self._memory.take(source))
        for line, _, lane in plan.swap_in:
            swapped = self._swapped.pop(line)
            self.lanes.swap_in(lane, swapped.blocks)
            self._search.lines.put(lane, swapped.search)
            self._memory.put(lane, swapped.memory)
        for line, _, lane in plan.admit:
            self.lanes.admit(lane)
            self._search.lines.admit(lane)
            if line in self._limits:
                self._search.lines["limit"][lane] = self._limits.pop(line)
        if plan.admit:  # all in one product
            lanes = torch.tensor([lane for _, _, lane in plan.admit], device=self.network.device)
            self._memory.write(lanes, torch.stack([self._states.pop(line) for line, _, _ in plan.admit]))
        self._lane_of = {line: lane for lane, line in enumerate(plan.decode)}

    def _decode(self, num_lanes: int) -> list[int]:
        """A token more for the first lanes; gives those that are done."""
        if not num_lanes:
            return []
        decoder, lines = self.network.decoder, Lines(self._memory, num_lanes)
        step = self.lanes.begin_step(num_lanes)
        x = decoder.step(self._search.tokens(num_lanes), step, lines, self._positions)
        choice: Choice = self._search.choose(x, decoder, self.lanes.lengths[:num_lanes])
        if choice.parents is not None:
            self.lanes.reorder(choice.parents.cpu().numpy())
        return np.flatnonzero(choice.done.cpu().numpy()).tolist()

    def _encode(self, plan: Plan) -> None:
        """Encode the next pictures."""
        lines = [line for line, _ in plan.encode]
        if lines:
            pixels = torch.stack([self._pixels.pop(line) for line in lines])
            self._states.update(zip(lines, self.network.states(pixels, self._table), strict=True))
            self.scheduler.encoded(*lines)

    def _leave(self, lines: list[int]) -> list[tuple[int, list[Hypothesis]]]:
        """Lines that are done leave the batch."""
        found = [(line, self._search.result(self._lane_of[line])) for line in lines]
        self.scheduler.finish(*lines)
        for line in lines:
            self._forget(line)
        return found

    def _forget(self, line: int) -> None:
        self._pixels.pop(line, None)
        self._limits.pop(line, None)
        self._states.pop(line, None)
        self._swapped.pop(line, None)
        if line in self._lane_of:
            self.lanes.release(self._lane_of.pop(line))

    def check_integrity(self) -> None:
        """Nothing is lost or doubled; after every step in tests."""
        self.scheduler.check_integrity()
        self.lanes.check_integrity()

    def decode(self, pictures: Iterable[Tensor | None]) -> Iterator[list[Hypothesis]]:
        """What is found on pictures [channels, H, W], in their order, as they come; nothing for None.

        No more than `encode_batch` pictures wait to be encoded. A long line holds up what comes behind it, not the
        batch: so many results are kept until their turn.
        """
        rest, waiting = iter(pictures), deque[int]()
        found: dict[int, list[Hypothesis]] = {}
        nothing = -1
        exhausted = False
        try:
            while True:
                while (
                    not exhausted
                    and len(waiting) < MAX_HELD
                    and self.scheduler.num_waiting < self._capacity.encode_batch
                ):
                    try:
                        picture = next(rest)
                    except StopIteration:
                        exhausted = True
                    else:
                        waiting.append(self.add(picture) if picture is not None else nothing)
                while waiting and (waiting[0] == nothing or waiting[0] in found):
                    yield found.pop(waiting.popleft(), [])
                if waiting:
                    found.update(self.step())
                elif exhausted:
                    return
        finally:  # closed early
            for line in waiting:
                if line in self.scheduler:
                    self.cancel(line)


@torch.inference_mode()
def decode_batch(
    model: Model, pixels: Tensor, settings: SearchSettings, use_cache: bool | None = None
) -> list[Hypothesis]:
    """Decode pictures [batch, channels, H, W] together.

    Args:
        use_cache: which of transformers' two position rules a sinusoidal decoder follows; by default the checkpoint's.
            It never changes how much is computed.

    Returns:
        All hypotheses of the first picture, then those of the second, and so on.
    """
    if len(pixels) == 0:
        return []
    model.encoder.check_shape(pixels)
    count_pads = model.config.generation.use_cache if use_cache is None else use_cache
    engine = Engine(model, settings, len(pixels), count_pads=count_pads)
    return [hypothesis for found in engine.decode(pixels) for hypothesis in found]
