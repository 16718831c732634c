"""Who is encoded next, who is in the decode batch, who leaves: pure data, without tensors and without a clock.

A line is one picture. Its life:

    waiting -> encoding -> ready -> running -> ended          (cancel: from anywhere to ended)
                                    |     ^
                                    v     |
                                    swapped

Lines pass through this in the order of arrival and never overtake: whoever runs came before whoever is swapped, they
before all that are encoded ahead, those before the waiting ones. So "oldest" and "youngest" are the ends of ordered
dictionaries, and the same calls give the same plans.

A running line has a lane, its place in the decode batch, with one row a beam. Lanes are dense: n running lines have
lanes 0 to n - 1. From its encoding to its end a line has a cross slot, swapped or not.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from typing import Literal, NamedTuple, get_args

# Whoever joins the batch leaves blocks for so many steps of all its rows: this one and the next. With 1, joining could
# push a line out again at the very next step.
STEPS_AHEAD = 2

State = Literal["waiting", "encoding", "ready", "running", "swapped"]
Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Capacity:
    """What there is to share out.

    As many slots as lanes will do. num_lanes + 2 * encode_batch lets whole batches be encoded while all lanes are busy.
    """

    num_lanes: int  # lines in the decode batch at most
    num_slots: int  # lines that are encoded and have not ended at most
    num_beams: int  # rows of a line
    encode_batch: int  # lines encoded together at most

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if self.num_slots < self.num_lanes:
            raise ValueError(f"num_slots: expected at least num_lanes ({self.num_lanes}), got {self.num_slots}")
        if self.encode_batch > self.num_slots:
            raise ValueError(f"encode_batch: expected at most num_slots ({self.num_slots}), got {self.encode_batch}")


@dataclass(frozen=True)
class Load:
    """What a policy may look at: the state once the lines of this step have joined the batch."""

    waiting: int
    ready: int  # encoded or being encoded, not in the batch yet
    running: int  # in the batch, or swapped out of it and sure to come back
    free_lanes: int  # the others
    free_slots: int
    encode_batch: int


def fill_lanes(load: Load) -> int:
    """The default policy: how many lines to encode now.

    A whole batch, while less than a batch of encoded lines would be left over once the free lanes are filled. Part of
    a batch only for empty lanes that nobody is on the way to: at once if no line is left behind, else (slots are short)
    when they are a quarter of all lanes.
    """
    possible = min(load.waiting, load.free_slots, load.encode_batch)
    empty_lanes = load.free_lanes - load.ready
    if possible == load.encode_batch:
        wanted = empty_lanes > -load.encode_batch
    elif possible == load.waiting:
        wanted = empty_lanes > 0
    else:
        wanted = 4 * empty_lanes >= load.running + load.free_lanes
    return possible if wanted else 0


class Placed(NamedTuple):
    line: int
    slot: int
    lane: int


@dataclass(frozen=True)
class Plan:
    """One step. The engine carries it out in the order of the fields.

    1. `swap_out` first: it needs what lies in the lanes that `moves`, `swap_in` and `admit` overwrite.
    2. `moves`, `swap_in`, `admit`: independent of each other, since each lane is written once at most and none that is
       read is written (moves come from lanes after the batch's new end). So all moves can be one gather.
    3. `decode`, which reads the lanes as they are now.
    4. `encode`: nothing in `decode` reads what it writes, so it may run beside it, on another stream.
    """

    swap_out: tuple[Placed, ...]  # youngest first; the lane is the one left; never beside swap_in or admit
    moves: Pairs  # (from_lane, to_lane)
    swap_in: tuple[Placed, ...]  # oldest first
    admit: tuple[Placed, ...]  # in order of arrival
    decode: tuple[int, ...]  # the batch of this step: the line of each lane
    encode: Pairs  # (line, slot) in order of arrival; to be told to `encoded` when done


class LineTooLarge(ValueError):
    """There are not even enough blocks for the oldest line alone."""

    def __init__(self, line: int, needed: int, free_blocks: int) -> None:
        super().__init__(f"free_blocks: expected at least {needed} for the next step of line {line}, got {free_blocks}")
        self.line = line


class Scheduler:
    """Plans one step after another. Between them the engine reports what it has learned of single lines.

    Every call checks first and changes nothing if it raises.

    Args:
        capacity: what there is to share out.
        policy: says how many lines to encode, from 0 to the least of waiting, free_slots and encode_batch, and not 0
            when nothing else goes on.
    """

    def __init__(self, capacity: Capacity, policy: Callable[[Load], int] = fill_lanes) -> None:
        self.capacity = capacity
        self.policy = policy
        # Dictionaries stand for ordered sets; oldest line first, but for _swapped.
        self._waiting: dict[int, None] = {}
        self._encoded: dict[int, bool] = {}  # before the batch -> whether encoding is done
        self._lanes: dict[int, int] = {}  # running -> lane; with gaps from the end of a line until the next plan
        self._swapped: dict[int, None] = {}  # oldest last: the youngest leave first
        self._slots: dict[int, int] = {}
        self._free_slots = deque(range(capacity.num_slots))  # the one that was freed first is taken first

    def __contains__(self, line: int) -> bool:
        """Whether a line was added and has not ended."""
        return line in self._slots or line in self._waiting

    @property
    def num_waiting(self) -> int:
        """Lines still to be encoded. Keep `encode_batch` of them here as long as there are more to come."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        return not (self._slots or self._waiting)

    def state(self, line: int) -> State:
        if line in self._waiting:
            return "waiting"
        if line in self._encoded:
            return "ready" if self._encoded[line] else "encoding"
        if line in self._slots:
            return "running" if line in self._lanes else "swapped"
        raise ValueError(f"line: expected one that was added and has not ended, got {line}")

    def add(self, line: int) -> None:
        if line in self:
            raise ValueError(f"line: expected a new one, got {line}, which is {self.state(line)}")
        self._waiting[line] = None

    def encoded(self, *lines: int) -> None:
        """What `plan` gave to encode is in its slots, or will be before the next decode step reads them."""
        self._expect(lines, "encoding")
        self._encoded.update(dict.fromkeys(lines, True))

    def finish(self, *lines: int) -> None:
        """Lines have come to their end; the report may be late, and the line even swapped out since."""
        self._expect(lines, "running", "swapped")
        self._end(lines)

    def cancel(self, *lines: int) -> None:
        """Lines are not wanted any more, or failed; they may be in any state."""
        self._expect(lines, *get_args(State))
        self._end(lines)

    def _expect(self, lines: tuple[int, ...], *expected: State) -> None:
        if len(set(lines)) < len(lines):
            raise ValueError(f"lines: expected each once, got {lines}")
        for line in lines:
            if self.state(line) not in expected:
                raise ValueError(f"line {line}: expected it {' or '.join(expected)}, got {self.state(line)}")

    def _end(self, lines: tuple[int, ...]) -> None:
        for line in lines:
            if line in self._slots:
                self._free_slots.append(self._slots.pop(line))
            for lines_of_a_state in (self._waiting, self._encoded, self._lanes, self._swapped):
                lines_of_a_state.pop(line, None)

    def plan(self, free_blocks: int, blocks_of: Callable[[int], int]) -> Plan:
        """Decide on the next step, in which each row of the batch takes up to one block.

        Args:
            free_blocks: of the paged cache; ended lines hold none any more.
            blocks_of: blocks that a running line would free by leaving, or that a swapped one needs to come back.

        Raises:
            LineTooLarge: the oldest line can't make a step even alone; it has to be cancelled.
            ValueError: `free_blocks` is negative, or the policy's answer is outside its limits.
        """
        if free_blocks < 0:
            raise ValueError(f"free_blocks: expected at least 0, got {free_blocks}")
        leaving = self._decide_leaving(free_blocks, blocks_of)
        # If anybody leaves, nobody comes: there would be too few blocks even for those who are here.
        swap_in, admit = self._decide_coming(free_blocks, blocks_of)
        lane_of, moves = self._decide_lanes(leaving, [*swap_in, *admit])
        encode = self._decide_encode(len(admit))
        swap_out = self._placed(leaving)
        # All is decided; from here on nothing fails.
        for line in leaving:
            del self._lanes[line]
            self._swapped[line] = None
        for line in swap_in:
            del self._swapped[line]
        for line in admit:
            del self._encoded[line]
        self._lanes.update(lane_of)
        for line, slot in encode:
            del self._waiting[line]
            self._encoded[line] = False
            self._slots[line] = slot
            self._free_slots.popleft()
        decode = tuple(sorted(self._lanes, key=self._lanes.__getitem__))
        return Plan(swap_out, moves, self._placed(swap_in), self._placed(admit), decode, encode)

    def _placed(self, lines: list[int]) -> tuple[Placed, ...]:
        return tuple(Placed(line, self._slots[line], self._lanes[line]) for line in lines)

    def _decide_leaving(self, free_blocks: int, blocks_of: Callable[[int], int]) -> list[int]:
        """The youngest lines, until the blocks are enough for a step of the others."""
        staying, leaving = list(self._lanes), list[int]()
        while (needed := len(staying) * self.capacity.num_beams) > free_blocks:
            if len(staying) == 1:
                raise LineTooLarge(staying[0], needed, free_blocks)
            leaving.append(staying.pop())
            free_blocks += blocks_of(leaving[-1])
        return leaving

    def _decide_coming(self, free_blocks: int, blocks_of: Callable[[int], int]) -> tuple[list[int], list[int]]:
        """Who joins the batch as it is: swapped lines first, then ready ones, each kind oldest first."""
        swap_in, admit = list[int](), list[int]()
        num_running = len(self._lanes)
        for line in chain(reversed(self._swapped), takewhile(self._encoded.__getitem__, self._encoded)):
            if num_running == self.capacity.num_lanes:
                break
            own_blocks = blocks_of(line) if line in self._swapped else 0
            num_steps = STEPS_AHEAD if num_running else 1  # alone, a line may take the last block
            needed = own_blocks + num_steps * (num_running + 1) * self.capacity.num_beams
            if needed > free_blocks:
                if num_running == 0:
                    raise LineTooLarge(line, needed, free_blocks)
                break
            (swap_in if line in self._swapped else admit).append(line)
            free_blocks -= own_blocks
            num_running += 1
        return swap_in, admit

    def _decide_lanes(self, leaving: list[int], coming: list[int]) -> tuple[dict[int, int], Pairs]:
        """The lanes of all who run, oldest first, and the moves to them.

        Whoever comes takes the lowest gaps. If there are more, the last lines of the batch move into them.
        """
        lane_of = {line: lane for line, lane in self._lanes.items() if line not in leaving}
        line_at = {lane: line for line, lane in lane_of.items()}
        num_running = len(lane_of) + len(coming)
        gaps = [lane for lane in range(num_running) if lane not in line_at]
        beyond = sorted((lane for lane in line_at if lane >= num_running), reverse=True)
        moves = tuple(zip(beyond, gaps[len(coming) :], strict=True))
        lane_of |= {line_at[from_lane]: to_lane for from_lane, to_lane in moves}
        lane_of |= dict(zip(coming, gaps, strict=False))
        return lane_of, moves

    def _decide_encode(self, num_admitted: int) -> Pairs:
        """The next waiting lines, as many as the policy says, and slots for them."""
        waiting, ready, free_slots = len(self._waiting), len(self._encoded) - num_admitted, len(self._free_slots)
        running = len(self._lanes) + len(self._swapped) + num_admitted
        free_lanes, encode_batch = self.capacity.num_lanes - running, self.capacity.encode_batch
        load = Load(waiting, ready, running, free_lanes, free_slots, encode_batch)
        num_lines = self.policy(load)
        least, most = int(waiting > 0 and ready == running == 0), min(waiting, free_slots, encode_batch)
        if not least <= num_lines <= most:
            raise ValueError(f"policy: expected {least} to {most} lines to encode, got {num_lines} for {load}")
        return tuple(zip(islice(self._waiting, num_lines), self._free_slots, strict=False))

    def check_integrity(self) -> None:
        """For tests and debugging: nothing is lost, doubled or out of order. Linear in all lines."""
        holders = [*self._lanes, *reversed(self._swapped), *self._encoded]
        everyone, lanes = [*holders, *self._waiting], sorted(self._lanes.values())
        assert len(set(everyone)) == len(everyone), f"a line is in two states: {everyone}"
        # Slots are given in order of arrival, so their holders stand in it.
        assert list(self._slots) == holders, f"slots are held by {list(self._slots)}, expected {holders}"
        slots = sorted([*self._slots.values(), *self._free_slots])
        assert slots == list(range(self.capacity.num_slots)), f"used and free slots: {slots}"
        assert len(set(lanes)) == len(lanes) <= self.capacity.num_lanes - len(self._swapped), f"lanes: {lanes}"
