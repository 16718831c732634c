"""An engine with a fake model and a simulated clock, which holds every plan of the scheduler against its promises."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tests.scheduler.fake_model import ListCache, RealCache, next_token, picture_of, rows_alone
from tests.scheduler.oracle import Oracle, default_policy
from trocr_fast.scheduler import STEPS_AHEAD, Capacity, LineTooLarge, Load, Plan, Scheduler, fill_lanes

# What happened over all simulations of this process, so that a test can tell that it tested something.
happened: Counter[str] = Counter()


def eager(load: Load) -> int:
    return min(load.waiting, load.free_slots, load.encode_batch)


def lazy(load: Load) -> int:
    return int(load.waiting > 0 and load.running == load.ready == 0)


POLICIES: dict[str, tuple[Callable[[Load], int], Callable[[Load], int]]] = {  # the scheduler's and the oracle's
    "default": (fill_lanes, default_policy),
    "eager": (eager, eager),
    "lazy": (lazy, lazy),
}


@dataclass(frozen=True)
class Request:
    arrival: int  # step
    length: int  # tokens
    late: int  # steps from the last token until the engine learns that it was the last, 0 or 1
    cancel: int | None = None  # steps after the arrival

    @property
    def num_steps(self) -> int:
        """In the batch, if nothing comes between."""
        return self.length + self.late


@dataclass(frozen=True)
class Trace:
    capacity: Capacity
    num_blocks: int
    requests: tuple[Request, ...]  # in order of arrival
    encode_steps: int = 0  # steps from an encoding's start until the engine learns of its end
    policy: str = "default"
    real_cache: bool = False
    placing_first: bool = False  # swap_in and admit before moves


@dataclass
class Lane:
    """What the device keeps of a line that runs."""

    line: int
    slot: int
    num_tokens: int = 0


class Simulation:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.capacity = trace.capacity
        policy, oracle_policy = POLICIES[trace.policy]
        self.scheduler = Scheduler(trace.capacity, policy)
        self.oracle = Oracle(trace.capacity, oracle_policy)
        max_tokens = max(request.num_steps for request in trace.requests)
        self.cache = (RealCache if trace.real_cache else ListCache)(
            trace.num_blocks, trace.capacity.num_beams, max_tokens
        )
        # The device's memory. None is poison.
        self.lanes: list[Lane | None] = [None] * trace.capacity.num_lanes
        self.cross: list[int | None] = [None] * trace.capacity.num_slots
        self.saved: dict[int, Lane] = {}
        # The host's.
        self.step = 0
        self.encodings: list[tuple[int, tuple[tuple[int, int], ...]]] = []  # when they end, and what
        self.finishing: list[tuple[int, int]] = []  # when the host learns it, and the line
        self.decoded: Counter[int] = Counter()  # line -> steps in the batch
        self.batch: list[int] = []  # of the last plan, by lane
        self.admitted: list[int] = []
        self.latest: dict[int, int] = {}  # line -> step at which it has to be admitted at the latest
        self.ended: dict[int, str] = {}
        self.plans: list[Plan] = []

    def run(self) -> None:
        requests = self.trace.requests
        while len(self.ended) < len(requests):
            self.arrive()
            self.report()
            plan = self.make_plan()
            self.check_plan(plan)
            self.execute(plan)
            self.check()
            self.plans.append(plan)
            self.step += 1
            work = sum(request.num_steps + self.trace.encode_steps + 1 for request in requests)
            assert self.step <= requests[-1].arrival + work + 1, "it does not come to an end"
        assert self.scheduler.is_idle and not self.scheduler.num_waiting
        assert self.cache.num_free == self.trace.num_blocks, "blocks are held when idle"
        assert self.admitted == sorted(self.admitted), "admitted out of order"
        happened["trace"] += 1
        happened[f"policy {self.trace.policy}"] += 1
        happened["real cache"] += self.trace.real_cache

    # What the engine does between plans.

    def arrive(self) -> None:
        for line, request in enumerate(self.trace.requests):
            if request.arrival == self.step:
                ahead = [other for other in range(line) if other not in self.ended]
                work = sum(self.trace.requests[other].num_steps - self.decoded[other] for other in ahead)
                self.latest[line] = self.step + work + (len(ahead) + 1) * (self.trace.encode_steps + 1)
                self.scheduler.add(line)
                self.oracle.add(line)

    def report(self) -> None:
        done = [line for step, line in self.finishing if step == self.step and line not in self.ended]
        happened["finished while swapped out"] += any(self.scheduler.state(line) == "swapped" for line in done)
        happened["several finished at once"] += len(done) > 1
        happened["finished late"] += any(self.trace.requests[line].late for line in done)
        self.scheduler.finish(*done)
        self.end(done, "finished")
        for line, request in enumerate(self.trace.requests):
            if request.cancel is not None and request.arrival + request.cancel == self.step and line not in self.ended:
                happened[f"cancelled {self.scheduler.state(line)}"] += 1
                self.scheduler.cancel(line)
                self.end([line], "cancelled")
        self.end_encodings()

    def end_encodings(self) -> None:
        while self.encodings and self.encodings[0][0] == self.step:
            _, encoding = self.encodings.pop(0)
            for line, slot in encoding:
                self.cross[slot] = picture_of(line)  # even if it was cancelled meanwhile
            known = [line for line, _ in encoding if line in self.scheduler]
            self.scheduler.encoded(*known)
            self.oracle.encoded(*known)

    def end(self, lines: list[int], how: str) -> None:
        for line in lines:
            assert line not in self.ended, f"line {line} ended twice"
            self.ended[line] = how
            request, decoded = self.trace.requests[line], self.decoded[line]
            if how == "finished":
                assert request.length <= decoded <= request.num_steps, f"line {line} was decoded {decoded} times"
            else:
                assert decoded <= request.num_steps
            self.cache.end(line)
            self.saved.pop(line, None)
            if line in self.batch:
                self.lanes[self.batch.index(line)] = None
        self.oracle.end(*lines)

    # What it does in a step.

    def make_plan(self) -> Plan:
        while True:
            try:
                plan = self.scheduler.plan(self.cache.num_free, self.cache.blocks_of)
            except LineTooLarge as error:
                self.scheduler.check_integrity()
                try:
                    self.oracle.plan(self.cache.num_free, self.cache.blocks_of)
                except LineTooLarge as expected:
                    assert error.line == expected.line
                else:
                    raise
                happened["line too large"] += 1
                self.scheduler.cancel(error.line)
                self.end([error.line], "too large")
            else:
                expected_plan = self.oracle.plan(self.cache.num_free, self.cache.blocks_of)
                assert plan == expected_plan, f"step {self.step}: got {plan}, expected {expected_plan}"
                return plan

    def execute(self, plan: Plan) -> None:
        for line, slot, lane in plan.swap_out:
            held = self.lanes[lane]
            assert held is not None and (held.line, held.slot) == (line, slot)
            self.saved[line], self.lanes[lane] = held, None
            self.cache.swap_out(line)
        if self.trace.placing_first:
            self.place(plan)
            self.move(plan)
        else:
            self.move(plan)
            self.place(plan)
        tokens_of = {}
        for lane, line in enumerate(plan.decode):
            held = self.lanes[lane]
            assert held is not None and held.line == line, f"line {line} is not in lane {lane}"
            cross, rows = self.cross[held.slot], self.cache.tokens(line)
            assert cross is not None and [len(row) for row in rows] == [held.num_tokens] * self.capacity.num_beams
            tokens_of[line] = [next_token(cross, row, beam) for beam, row in enumerate(rows)]
            held.num_tokens += 1
            self.decoded[line] += 1
            request = self.trace.requests[line]
            if self.decoded[line] == request.length:
                self.finishing.append((self.step + 1 + request.late, line))
        self.cache.append(tokens_of)
        for line in plan.decode:
            rows = rows_alone(line, self.decoded[line], self.capacity.num_beams)
            assert self.cache.tokens(line) == rows, f"other tokens of line {line} than alone"
        self.batch = list(plan.decode)
        if plan.encode:
            self.encodings.append((self.step + self.trace.encode_steps, plan.encode))
            self.end_encodings()

    def move(self, plan: Plan) -> None:
        for from_lane, to_lane in plan.moves:
            assert self.lanes[from_lane] is not None
            self.lanes[to_lane], self.lanes[from_lane] = self.lanes[from_lane], None

    def place(self, plan: Plan) -> None:
        for line, slot, lane in plan.swap_in:
            assert self.lanes[lane] is None and self.saved[line].slot == slot
            self.lanes[lane] = self.saved.pop(line)
            self.cache.swap_in(line)
        for line, slot, lane in plan.admit:
            assert self.lanes[lane] is None
            self.lanes[lane] = Lane(line, slot)
            self.cache.start(line)
            self.admitted.append(line)
            assert self.cross[slot] == picture_of(line), f"line {line} joins before it is encoded"
            assert self.step <= self.latest[line], f"line {line} waited until {self.step}, allowed {self.latest[line]}"

    # What has to be true.

    def check_plan(self, plan: Plan) -> None:
        coming = [*plan.swap_in, *plan.admit]
        before = [line for line in self.batch if line not in self.ended]
        left = [placed.line for placed in plan.swap_out]
        assert set(plan.decode) == {*before, *(placed.line for placed in coming)} - set(left), "somebody was lost"
        assert len(set(plan.decode)) == len(plan.decode) <= self.capacity.num_lanes
        assert not set(plan.decode) & self.ended.keys(), "an ended line is decoded"
        if left:
            assert not coming and plan.decode and min(left) > max(plan.decode), "others than the youngest left"
            assert left == sorted(left, reverse=True)
            last = self.plans[-1]
            assert not last.admit and not last.swap_in, "who joined has pushed somebody out at once"
        swapped = [line for line in self.saved if line not in [placed.line for placed in plan.swap_in]]
        assert not swapped or not plan.admit, "a new line was admitted before one that is swapped out"

        # The batch is as full as can be: whoever is next had no lane, or no blocks.
        needed = STEPS_AHEAD * (len(plan.decode) + 1) * self.capacity.num_beams
        free_blocks = self.cache.num_free - sum(self.cache.blocks_of(placed.line) for placed in plan.swap_in)
        if len(plan.decode) < self.capacity.num_lanes and not left:
            waiting = self.oracle.of_state("encoding", "ready")
            newly = [line for line, _ in plan.encode]
            if swapped:
                assert free_blocks < needed + self.cache.blocks_of(min(swapped)), "a lane is left empty"
                happened["swapped line held back"] += 1
            elif waiting and waiting[0].state == "ready" and waiting[0].line not in newly:
                assert free_blocks < needed, "a lane is left empty"
                happened["admission held back"] += 1

        num_encoded = len(self.oracle.of_state("encoding", "ready", "running", "swapped"))
        assert num_encoded <= self.capacity.num_slots
        happened["step"] += 1
        happened["all lanes full"] += len(plan.decode) == self.capacity.num_lanes
        happened["out of slots"] += num_encoded == self.capacity.num_slots and self.scheduler.num_waiting > 0
        happened["swapped out"] += len(plan.swap_out)
        happened["two swapped out at once"] += len(plan.swap_out) > 1
        happened["swapped in"] += len(plan.swap_in)
        happened["two swapped in at once"] += len(plan.swap_in) > 1
        happened["swapped in and admitted at once"] += bool(plan.swap_in and plan.admit)
        happened["moved"] += len(plan.moves)
        happened["two moved at once"] += len(plan.moves) > 1
        happened["moved and admitted at once"] += bool(plan.moves and plan.admit)
        happened["whole batch encoded"] += len(plan.encode) == self.capacity.encode_batch
        happened["part of a batch encoded"] += 0 < len(plan.encode) < self.capacity.encode_batch

    def check(self) -> None:
        self.scheduler.check_integrity()
        assert sum(map(self.cache.blocks_of, self.batch)) == self.trace.num_blocks - self.cache.num_free
        for line in self.ended:
            assert line not in self.scheduler
