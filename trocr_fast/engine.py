"""Continuous batching: lines join and leave the decode batch at every step.

    scheduler says who -> lanes, memory and search move them -> decoder feeds a token -> search chooses the next

Pictures are encoded in batches and wait, encoded, for a place. The host looks at the outcome of every step: which lines
are done, and which beam each beam goes on from. On a GPU it does so when the next step has begun, so that the GPU never
waits for it: a line that is done takes part in one step more, in which its rows are empty, and results come a step
later. What the device does in a step is recorded and replayed there.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trocr_fast.cross_memory import CrossMemory, Lines
from trocr_fast.decoder import check_length
from trocr_fast.errors import is_out_of_memory
from trocr_fast.host_copy import HostCopy, to_device
from trocr_fast.lanes import Lanes, SwappedLane
from trocr_fast.model import Model, Network
from trocr_fast.picture_encoder import Encoded, PictureEncoder
from trocr_fast.recording import MakeRecorder, Recordings, cuda_recorder, no_recorder
from trocr_fast.scheduler import STEPS_AHEAD, Capacity, LineTooLarge, Plan, Scheduler
from trocr_fast.search import Choice, Hypothesis, Search, SearchSettings, make_search

MAX_HELD = 4096  # results of `decode` that wait for one before them


Found = list[tuple[int, list[Hypothesis]]]  # lines that are done, and what was found


@dataclass(frozen=True)
class _Swapped:
    """A line that waits for blocks."""

    blocks: SwappedLane
    search: dict[str, Tensor]
    memory: list[Tensor]  # on the host


@dataclass(frozen=True)
class _Outcome:
    """What a step has chosen, which the host is still to learn."""

    lines: tuple[int, ...]  # of the lanes at that step
    choice: HostCopy


class Engine:
    """Decodes pictures with one search.

    Args:
        network: what is computed.
        settings: how tokens are chosen.
        num_lanes: pictures in the decode batch at most.
        encode_batch: pictures encoded together at most; None: as many.
        count_pads: the rule of sinusoidal positions, as of `Decoder.positions`.
        num_blocks: of the self-attention cache, never more; None: as many as are needed, while there is memory.
        table: for uint8 pictures: fp32 [channels, 256], the normalised value of each of the 256 values.
        late: whether the host learns of a step when the next one has begun; by default on a GPU.
        make_recorder: of what the device does in a step, and to encode a few pictures; by default of CUDA graphs on a
            GPU. For a late host only.

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
        late: bool | None = None,
        make_recorder: MakeRecorder[Any] | None = None,
    ) -> None:
        self.network, self._dtypes = network, "floating-point" if table is None else "uint8"
        encode_batch = min(encode_batch or num_lanes, num_lanes)
        self._capacity = Capacity(num_lanes, num_lanes + encode_batch, settings.num_beams, encode_batch)
        self._positions = network.decoder.positions(count_pads)
        self._settings, self._num_blocks = settings, num_blocks
        self._late = network.device.type == "cuda" if late is None else late
        if make_recorder is None:
            make_recorder = partial(cuda_recorder, network.device)
        if not self._late:
            make_recorder = no_recorder
        self._recordings = Recordings(make_recorder() if settings.is_recordable else None, num_lanes)
        on_gpu = network.device.type == "cuda"
        self._stream = torch.cuda.current_stream(network.device) if on_gpu else None
        self._encoder = PictureEncoder(network, table, make_recorder())
        self.num_swaps = 0
        self._next = 0  # number of the next line; none is used twice
        with self._on_stream():
            self._reset()

    def _reset(self) -> None:
        """Forget all lines."""
        network, capacity = self.network, self._capacity
        self.scheduler = Scheduler(capacity)
        self._pixels: dict[int, Tensor] = {}
        self._encoding = deque[tuple[list[int], Encoded]]()
        self._states: dict[int, Tensor] = {}  # [tokens, width] of lines that are encoded and not in the batch yet
        self._own: dict[int, dict[str, int]] = {}  # what the search is to know of a line of its own
        self._lane_of: dict[int, int] = {}
        self._swapped: dict[int, _Swapped] = {}
        self._under_way = deque[_Outcome]()
        self._results = deque[tuple[list[int], HostCopy]]()  # of lines that have left the batch
        self._left: set[int] = set()  # those lines
        self._longest = 0  # tokens of a row in the last step
        self._found: Found = []  # not given out yet
        # What is large goes before its like comes: memory may be what there was too little of.
        self._recordings.forget()
        for name in ("lanes", "_search", "_memory"):
            self.__dict__.pop(name, None)
        config, dtype, device = network.decoder.config, network.dtype, network.device
        sizes = capacity.num_lanes, capacity.num_beams
        self.lanes: Lanes = Lanes(config, *sizes, dtype, device, self._num_blocks, self._late)
        self._search: Search = make_search(self._settings, capacity.num_lanes, device)
        self._memory: CrossMemory = network.slots(capacity.num_lanes)  # a slot for each lane

    @property
    def is_idle(self) -> bool:
        """No line is waiting or being decoded, no result is to come."""
        return self.scheduler.is_idle and not (self._left or self._found)

    @property
    def has_recordings(self) -> bool:
        """Whether steps are recorded: what a call like the last one would gain by this engine."""
        return self._recordings.is_on

    def __contains__(self, line: int) -> bool:
        """Whether a line was added, and neither its result given nor the line cancelled."""
        return line in self.scheduler or line in self._left

    def add(self, pixels: Tensor, max_length: int | None = None, seed: int | None = None) -> int:
        """A picture to be decoded.

        Args:
            pixels: [channels, H, W]: uint8 if the engine has a table, else floating-point and normalised.
            max_length: at which this line is cut, the start token counted; None: as the others.
            seed: of what is random in this line, where the settings sample; None: the number of the line.

        Returns:
            The number of its line.

        Raises:
            ValueError: a limit that leaves no room for a new token, pixels of another shape or dtype.
        """
        encoder = self.network.encoder.config
        expected = (encoder.num_channels, *encoder.image_size)
        fits = pixels.dtype == torch.uint8 if self._dtypes == "uint8" else pixels.is_floating_point()
        if tuple(pixels.shape) != expected or not fits:
            wanted = f"{self._dtypes} {list(expected)}"
            raise ValueError(f"pixels: expected {wanted}, got {pixels.dtype} {list(pixels.shape)}")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length: expected at least 2, got {max_length}")
        if pixels.device.type == "cuda":
            pixels = pixels.to(self.network.device)
        self._encoder.follow(pixels)
        line, self._next = self._next, self._next + 1
        self.scheduler.add(line)
        self._pixels[line] = pixels
        limit = self._settings.max_length if max_length is None else max_length
        self._own[line] = {"limit": limit, "seed": line if seed is None else seed}
        return line

    def cancel(self, line: int) -> None:
        """A line is not wanted any more.

        Raises:
            ValueError: no such line, or it has ended.
        """
        if line in self._left:
            self._left.remove(line)
            return
        self.scheduler.cancel(line)
        self._forget(line)
        if self.scheduler.is_idle:
            self._encoding.clear()

    @torch.inference_mode()
    def step(self) -> Found:
        """One token more for every line of the batch, and pictures encoded where there is room.

        Returns:
            The lines that are done, and what was found. A line for which there is too little memory, even alone, is
            done, too, with an error in place of its tokens.

        Raises:
            ValueError: a line that outgrows the position table. All lines are forgotten, as after any other error; the
                engine can be used again.
        """
        with self._on_stream():
            try:
                self._look_at_encoded()
                plan = self._plan()
                self._place(plan)
                self._decode(plan.decode)
                # before encoding, which takes long on a CPU
                self._learn(steps_ahead=1 if self._late and plan.decode else 0)
                self._encode([line for line, _ in plan.encode])
            except BaseException:
                self._reset()
                raise
        found, self._found = self._found, []
        return found

    def _on_stream(self) -> AbstractContextManager[object]:
        """That of who made the engine: whoever calls it, work is done in the order in which it was given."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _plan(self) -> Plan:
        if self._positions.limit is not None and self._longest >= self._positions.limit:
            self._learn(steps_ahead=0)  # the next step would be an error for a line that has not ended
        while True:
            running = len(self._lane_of)
            rows = (running + len(self._swapped) + len(self._states)) * self._capacity.num_beams
            free_blocks = self.lanes.find_blocks(STEPS_AHEAD * rows)
            if free_blocks < running * self._capacity.num_beams and self._under_way:
                self._learn(steps_ahead=0)  # who leaves may leave blocks enough; and the host has to know who goes
                continue
            try:
                return self.scheduler.plan(free_blocks, self._blocks_of)
            except LineTooLarge as error:
                self._fail(error.line, str(error))

    def _blocks_of(self, line: int) -> int:
        if line in self._swapped:
            return self._swapped[line].blocks.num_blocks
        return self.lanes.blocks_of(self._lane_of[line])

    def _place(self, plan: Plan) -> None:
        """Put every line where the plan wants it."""
        for line, _, lane in plan.swap_out:
            known = self._search.lines.take(lane), [part.cpu() for part in self._memory.take(lane)]
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
            self._memory.put(lane, [part.to(self.network.device) for part in swapped.memory])
        if plan.admit:  # all at once
            lines, lanes = [line for line, _, _ in plan.admit], [lane for _, _, lane in plan.admit]
            own = [self._own.pop(line) for line in lines]
            for lane, one in zip(lanes, own, strict=True):
                self.lanes.admit(lane, one["limit"] - 1)
            self._search.lines.admit(lanes, {name: [one[name] for one in own] for name in own[0]})
            states = torch.stack([self._states.pop(line) for line in lines])
            self._write(to_device(lanes, self.network.device), states)
        self._lane_of = {line: lane for lane, line in enumerate(plan.decode)}

    def _write(self, lanes: Tensor, states: Tensor) -> None:
        """Fill the cross memory of lanes, of fewer at a time where there is too little memory."""
        try:
            return self._memory.write(lanes, states)
        except (RuntimeError, MemoryError) as error:
            if len(lanes) == 1 or not is_out_of_memory(error):
                raise
        half = len(lanes) // 2
        self._write(lanes[:half], states[:half])
        self._write(lanes[half:], states[half:])

    def _decode(self, batch: tuple[int, ...]) -> None:
        """A token more for the lines of the first lanes."""
        if not batch:
            return
        self._longest = self.lanes.reserve(len(batch))
        check_length(self._longest, self._positions)
        self._search.lines.make_room(self._longest + 2)  # a line that is done may be one token longer
        version = self.lanes.version, self._search.lines.version
        choice = self._recordings.run(self._feed, self._recordings.size(len(batch)), version)
        outcome = {"done": choice.done[: len(batch)]}
        if choice.parents is not None:
            outcome["parents"] = choice.parents[: len(batch)]
        self._under_way.append(_Outcome(batch, HostCopy(outcome)))

    def _feed(self, num_lanes: int) -> Choice:
        """The device's part of a step of the first lanes, of which the last ones may be empty."""
        decoder, lines = self.network.decoder, Lines(self._memory, num_lanes)
        done = self._search.lines["done"][:num_lanes] if self._late else None
        longest = self.lanes.room if self._recordings.is_on else self._longest
        step = self.lanes.paged_step(num_lanes, longest, done)
        if done is not None:
            done |= step.context_lens.view(num_lanes, -1)[:, 0] == 0  # an empty lane stays as it is
        x = decoder.step(self._search.tokens(num_lanes), step, lines, self._positions)
        choice: Choice = self._search.choose(x, decoder, self.lanes.lengths[:num_lanes])
        if choice.parents is not None and self._late:
            self.lanes.follow(choice.parents)
        return choice

    def _learn(self, steps_ahead: int) -> None:
        """Let the host know what steps have chosen, but for the last ones; lines that are done leave the batch."""
        while self._results:
            self._give(*self._results.popleft())
        while len(self._under_way) > steps_ahead:
            outcome = self._under_way.popleft()
            choice = {name: tensor.numpy() for name, tensor in outcome.choice.wait().items()}
            there = [place for place, line in enumerate(outcome.lines) if line in self._lane_of]  # not cancelled
            if "parents" in choice and not self._late:
                self.lanes.reorder(choice["parents"])
            elif "parents" in choice and there:
                lanes = np.array([self._lane_of[outcome.lines[place]] for place in there])
                self.lanes.replay(lanes, choice["parents"][there], tail=len(self._under_way))
            done = [outcome.lines[place] for place in there if choice["done"][place]]
            if done:
                lanes_of_done = [self._lane_of[line] for line in done]
                result = HostCopy(self._search.lines.gather(self._search.RESULT, lanes_of_done))
                self.scheduler.finish(*done)
                for line in done:
                    self._forget(line)
                self._left.update(done)
                if steps_ahead:
                    self._results.append((done, result))
                else:
                    self._give(done, result)

    def _give(self, lines: list[int], result: HostCopy) -> None:
        tensors = result.wait()
        for place, line in enumerate(lines):
            if line in self._left:  # else it was cancelled
                self._left.remove(line)
                found = self._search.found({name: tensor[place] for name, tensor in tensors.items()})
                self._found.append((line, found))

    def _encode(self, lines: list[int]) -> None:
        """Encode pictures, fewer at a time where there is too little memory."""
        if not lines:
            return
        encoded = None
        try:
            encoded = self._encoder.encode([self._pixels[line] for line in lines])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(lines) == 1:
                return self._fail(lines[0], f"too little memory to encode one picture: {error}")
        if encoded is None:  # out of the handler, whose error holds on to memory
            half = len(lines) // 2
            self._encode(lines[:half])
            return self._encode(lines[half:])
        for line in lines:
            del self._pixels[line]
        self._encoding.append((lines, encoded))
        self._look_at_encoded()

    def _look_at_encoded(self) -> None:
        """Let those that are encoded join the batch; wait for some if there is none."""
        while self._encoding:
            lines, encoded = self._encoding[0]
            if not encoded.is_ready and self._lane_of:
                return
            self._encoding.popleft()
            states = encoded.take()
            there = [(line, one) for line, one in zip(lines, states, strict=True) if line in self.scheduler]
            self._states.update(there)
            self.scheduler.encoded(*(line for line, _ in there))

    def _fail(self, line: int, error: str) -> None:
        """A line ends without tokens."""
        self.cancel(line)
        self._found.append((line, [Hypothesis([self._settings.start_token], error=error)]))

    def _forget(self, line: int) -> None:
        self._pixels.pop(line, None)
        self._own.pop(line, None)
        self._states.pop(line, None)
        self._swapped.pop(line, None)
        if line in self._lane_of:
            self.lanes.release(self._lane_of.pop(line))

    @torch.inference_mode()
    def so_far(self, line: int) -> list[int]:
        """The tokens that a line has at the moment, the start token first; of beams, those of the best running one.

        Raises:
            ValueError: no such line, or it has ended.
        """
        if line not in self:
            raise ValueError(f"line: expected one that was added and has not ended, got {line}")
        with self._on_stream():
            if line in self._swapped:
                return self._search.so_far(self._swapped[line].search)
            if line in self._lane_of:
                return self._search.so_far(self._search.lines.take(self._lane_of[line]))
        return [self._settings.start_token]

    def check_integrity(self) -> None:
        """Nothing is lost or doubled; after every step in tests."""
        self.scheduler.check_integrity()
        self.lanes.check_integrity()

    def decode(self, pictures: Iterable[Tensor | None]) -> Iterator[list[Hypothesis]]:
        """What is found on pictures [channels, H, W], in their order, as they come; nothing for None.

        The seed of a line is its number among the pictures, those that are None counted.
        No more than `encode_batch` pictures wait to be encoded. A long line holds up what comes behind it, not the
        batch: so many results are kept until their turn.
        """
        rest, waiting = enumerate(pictures), deque[int]()
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
                        seed, picture = next(rest)
                    except StopIteration:
                        exhausted = True
                    else:
                        waiting.append(self.add(picture, seed=seed) if picture is not None else nothing)
                while waiting and (waiting[0] == nothing or waiting[0] in found):
                    yield found.pop(waiting.popleft(), [])
                if waiting:
                    found.update(self.step())
                elif exhausted:
                    return
        finally:  # closed early
            for line in waiting:
                if line in self:
                    self.cancel(line)


@torch.inference_mode()
def decode_batch(model: Model, pixels: Tensor, settings: SearchSettings) -> list[Hypothesis]:
    """Decode pictures [batch, channels, H, W] together.

    Returns:
        All hypotheses of the first picture, then those of the second, and so on.
    """
    if len(pixels) == 0:
        return []
    model.encoder.check_shape(pixels)
    engine = Engine(model, settings, len(pixels), count_pads=model.config.generation.use_cache)
    return [hypothesis for found in engine.decode(pixels) for hypothesis in found]
