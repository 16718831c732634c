"""The scheduler once more, slow and obvious: one list of all lines in order of arrival, scanned anew for everything."""

from collections.abc import Callable
from dataclasses import dataclass

from trocr_fast.scheduler import Capacity, LineTooLarge, Load, Placed, Plan


@dataclass
class Entry:
    line: int
    state: str = "waiting"
    slot: int = -1
    lane: int = -1


def default_policy(load: Load) -> int:
    lines = 0
    while lines < load.waiting and lines < load.free_slots and lines < load.encode_batch:
        lines += 1
    if lines == load.encode_batch:
        spare = load.ready - load.free_lanes
        return lines if spare < load.encode_batch else 0
    lanes_without_line = load.free_lanes - load.ready
    if lanes_without_line <= 0:
        return 0
    num_lanes = load.free_lanes + load.running
    return lines if lines == load.waiting or lanes_without_line / num_lanes >= 0.25 else 0


class Oracle:
    def __init__(self, capacity: Capacity, policy: Callable[[Load], int] = default_policy) -> None:
        self.capacity = capacity
        self.policy = policy
        self.entries: list[Entry] = []
        self.freed_slots = list(range(capacity.num_slots))  # the one freed longest ago in front

    def of_state(self, *states: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.state in states]

    def add(self, line: int) -> None:
        self.entries.append(Entry(line))

    def encoded(self, *lines: int) -> None:
        for entry in self.entries:
            if entry.line in lines:
                entry.state = "ready"

    def end(self, *lines: int) -> None:
        for line in lines:
            (entry,) = [entry for entry in self.entries if entry.line == line]
            if entry.slot >= 0:
                self.freed_slots.append(entry.slot)
            self.entries.remove(entry)

    def plan(self, free_blocks: int, blocks_of: Callable[[int], int]) -> Plan:
        beams = self.capacity.num_beams
        running = self.of_state("running")
        if running and beams > free_blocks + sum(blocks_of(entry.line) for entry in running[1:]):
            raise LineTooLarge(running[0].line, beams, free_blocks)

        swap_out = []
        while len(self.of_state("running")) * beams > free_blocks:
            youngest = self.of_state("running")[-1]
            free_blocks += blocks_of(youngest.line)
            swap_out.append(Placed(youngest.line, youngest.slot, youngest.lane))
            youngest.state, youngest.lane = "swapped", -1

        swap_in, admit = list[Placed](), list[Placed]()
        while not swap_out and len(self.of_state("running")) < self.capacity.num_lanes:
            swapped, before = self.of_state("swapped"), self.of_state("encoding", "ready")
            if swapped:
                entry, own_blocks = swapped[0], blocks_of(swapped[0].line)
            elif before and before[0].state == "ready":
                entry, own_blocks = before[0], 0
            else:
                break
            neighbours = self.of_state("running")
            rows = (len(neighbours) + 1) * beams
            after_step = free_blocks - own_blocks - rows
            if not neighbours and after_step < 0:
                raise LineTooLarge(entry.line, own_blocks + rows, free_blocks)
            if neighbours and after_step < rows:
                break
            free_blocks -= own_blocks
            entry.state, entry.lane = "running", self.lowest_gap()
            (swap_in if swapped else admit).append(Placed(entry.line, entry.slot, entry.lane))

        moves = []
        while self.lowest_gap() < max((entry.lane for entry in self.entries), default=-1):
            last = max(self.entries, key=lambda entry: entry.lane)
            moves.append((last.lane, self.lowest_gap()))
            last.lane = self.lowest_gap()

        under_way = len(self.of_state("running", "swapped"))
        load = Load(
            waiting=len(self.of_state("waiting")),
            ready=len(self.of_state("encoding", "ready")),
            running=under_way,
            free_lanes=self.capacity.num_lanes - under_way,
            free_slots=len(self.freed_slots),
            encode_batch=self.capacity.encode_batch,
        )
        encode = []
        for entry in self.of_state("waiting")[: self.policy(load)]:
            entry.state, entry.slot = "encoding", self.freed_slots.pop(0)
            encode.append((entry.line, entry.slot))

        by_lane = sorted(self.of_state("running"), key=lambda entry: entry.lane)
        decode = tuple(entry.line for entry in by_lane)
        return Plan(tuple(swap_out), tuple(moves), tuple(swap_in), tuple(admit), decode, tuple(encode))

    def lowest_gap(self) -> int:
        used = [entry.lane for entry in self.of_state("running")]
        return min(lane for lane in range(self.capacity.num_lanes + 1) if lane not in used)
