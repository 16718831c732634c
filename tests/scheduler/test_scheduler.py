"""The scheduler step by step: single situations, refusals, and the default policy."""

import copy
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.scheduler.simulation import Request, Simulation, Trace, eager, happened
from trocr_fast.scheduler import Capacity, LineTooLarge, Load, Placed, Plan, Scheduler, fill_lanes

PLENTY = 1000


def five(line: int) -> int:
    """Blocks of any line."""
    return 5


def step(scheduler: Scheduler, free_blocks: int = PLENTY, encoded: bool = True) -> Plan:
    plan = scheduler.plan(free_blocks, five)
    scheduler.check_integrity()
    if encoded:
        scheduler.encoded(*(line for line, _ in plan.encode))
    return plan


def running(num_lines: int, num_lanes: int, num_slots: int | None = None, num_beams: int = 1) -> Scheduler:
    """A scheduler that runs lines 0, 1, ... in lanes and slots of the same numbers."""
    num_slots = num_slots or num_lanes
    scheduler = Scheduler(Capacity(num_lanes, num_slots, num_beams, encode_batch=num_slots), eager)
    for line in range(num_lines):
        scheduler.add(line)
    step(scheduler)
    assert step(scheduler).decode == tuple(range(num_lines))
    return scheduler


def all_states() -> Scheduler:
    """Line 0 runs, 1 is swapped out, 2 ready, 3 being encoded, 4 waiting for a slot."""
    scheduler = running(2, num_lanes=3, num_slots=4)
    scheduler.add(2)
    assert step(scheduler, free_blocks=1).decode == (0,)
    scheduler.add(3)
    scheduler.add(4)
    step(scheduler, free_blocks=1, encoded=False)
    states = [scheduler.state(line) for line in range(5)]
    assert states == ["running", "swapped", "ready", "encoding", "waiting"]
    return scheduler


def test_the_life_of_a_line() -> None:
    scheduler = Scheduler(Capacity(num_lanes=2, num_slots=2, num_beams=4, encode_batch=2))
    assert scheduler.is_idle and 7 not in scheduler
    scheduler.add(7)
    assert not scheduler.is_idle and 7 in scheduler and scheduler.num_waiting == 1
    assert scheduler.plan(16, five) == Plan((), (), (), (), (), encode=((7, 0),))
    assert scheduler.num_waiting == 0
    assert scheduler.plan(16, five) == Plan((), (), (), (), (), ())
    scheduler.encoded(7)
    assert scheduler.plan(16, five) == Plan((), (), (), admit=(Placed(7, 0, 0),), decode=(7,), encode=())
    assert scheduler.plan(12, five) == Plan((), (), (), (), decode=(7,), encode=())
    scheduler.finish(7)
    assert scheduler.is_idle and 7 not in scheduler
    assert scheduler.plan(16, five) == Plan((), (), (), (), (), ())


def test_whoever_comes_takes_the_gaps() -> None:
    scheduler = running(4, num_lanes=4)
    scheduler.finish(1, 2)
    for line in (4, 5):
        scheduler.add(line)
    # Without anybody to come, the last lane fills the lowest gap.
    plan = step(scheduler)
    assert plan.moves == ((3, 1),) and plan.decode == (0, 3)
    plan = step(scheduler)
    assert plan.moves == () and plan.decode == (0, 3, 4, 5)
    scheduler.finish(0, 4)
    scheduler.add(6)
    step(scheduler)
    scheduler.finish(5, 3)
    assert step(scheduler).decode == (6,)


def test_moves_and_newcomers_in_one_plan() -> None:
    scheduler = running(6, num_lanes=6, num_slots=7)
    scheduler.add(6)
    step(scheduler)
    scheduler.finish(0, 2, 3)
    plan = step(scheduler)
    assert plan.admit == (Placed(6, 6, 0),)
    assert plan.moves == ((5, 2), (4, 3)) and plan.decode == (6, 1, 5, 4)


def test_the_youngest_leave_and_the_oldest_come_back_first() -> None:
    scheduler = running(4, num_lanes=4, num_slots=5)
    scheduler.add(4)
    step(scheduler)
    scheduler.finish(0)
    assert step(scheduler).decode == (4, 1, 2, 3)  # the youngest has the lowest lane
    plan = scheduler.plan(1, lambda line: 1)
    assert plan.swap_out == (Placed(4, 4, 0), Placed(3, 3, 3))
    assert plan.moves == ((2, 0),) and plan.decode == (2, 1)
    scheduler.add(5)
    assert step(scheduler, free_blocks=2).encode == ((5, 0),)
    # Two steps of three lines, and five blocks of line 3 itself: 11.
    assert step(scheduler, free_blocks=10).swap_in == ()
    plan = step(scheduler, free_blocks=11)
    assert plan.swap_in == (Placed(3, 3, 2),) and plan.admit == ()
    # Line 5 is ready and would fit, but not before line 4.
    assert step(scheduler, free_blocks=12).decode == (2, 1, 3)
    plan = step(scheduler, free_blocks=13)
    assert plan.swap_in == (Placed(4, 4, 3),) and plan.decode == (2, 1, 3, 4)
    scheduler.finish(2)
    assert step(scheduler).admit == (Placed(5, 0, 0),)


def test_swapped_and_new_lines_join_together() -> None:
    scheduler = all_states()
    plan = step(scheduler)
    assert plan.swap_in == (Placed(1, 1, 1),) and plan.admit == (Placed(2, 2, 2),) and plan.decode == (0, 1, 2)


@pytest.mark.parametrize(("free_blocks", "admitted"), [(0, 0), (7, 0), (8, 1), (11, 1), (12, 2), (100, 2)])
def test_joining_leaves_blocks_for_two_steps(free_blocks: int, admitted: int) -> None:
    """Two beams: one line runs and needs 2 blocks a step; with a second 4, with a third 6."""
    scheduler = running(1, num_lanes=3, num_beams=2)
    scheduler.add(1)
    scheduler.add(2)
    step(scheduler)
    if free_blocks < 2:
        with pytest.raises(LineTooLarge):
            scheduler.plan(free_blocks, five)
    else:
        assert len(step(scheduler, free_blocks).admit) == admitted


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_line_alone_may_take_the_last_block(num_beams: int) -> None:
    scheduler = Scheduler(Capacity(2, 2, num_beams, 2))
    scheduler.add(0)
    scheduler.add(1)
    step(scheduler)
    for _ in range(3):
        assert step(scheduler, free_blocks=num_beams).decode == (0,)


def test_lines_join_in_order_of_arrival() -> None:
    """Line 1's encoding is told to be done before line 0's."""
    scheduler = Scheduler(Capacity(2, 2, 1, encode_batch=1), eager)
    for line in (5, 3):
        scheduler.add(line)
        step(scheduler, encoded=False)
    scheduler.encoded(3)
    assert step(scheduler).decode == ()
    scheduler.encoded(5)
    assert step(scheduler).decode == (5, 3)


def test_an_end_told_late_frees_nobody_elses_place() -> None:
    scheduler = running(3, num_lanes=3)
    late = step(scheduler).decode  # line 0's last token is made here, which the host learns after the next plan
    assert late == (0, 1, 2)
    scheduler.cancel(1)
    scheduler.add(3)
    assert step(scheduler).decode == (0, 2)
    scheduler.finish(0)
    plan = step(scheduler)
    assert plan.decode == (3, 2) and plan.admit == (Placed(3, 1, 0),)


def test_an_end_told_late_of_a_line_that_was_swapped_out() -> None:
    scheduler = running(2, num_lanes=2)
    assert step(scheduler, free_blocks=1).decode == (0,)
    scheduler.finish(1)
    assert step(scheduler).decode == (0,)
    assert 1 not in scheduler


def test_slots_rest_as_long_as_they_can() -> None:
    """The longer a slot was free, the surer its last reader is done."""
    scheduler = running(3, num_lanes=3, num_slots=4)
    scheduler.finish(2, 0)
    for line in (3, 4, 5):
        scheduler.add(line)
    assert step(scheduler).encode == ((3, 3), (4, 2), (5, 0))


def test_cancelled_from_any_state() -> None:
    scheduler = all_states()
    for line in (3, 1, 4, 0, 2):
        scheduler.cancel(line)
        scheduler.check_integrity()
        assert line not in scheduler
    assert scheduler.is_idle
    assert step(scheduler) == Plan((), (), (), (), (), ())


def test_swapping_can_be_forced() -> None:
    """`free_blocks` is what the engine says, and a test of the engine may say less than there are."""
    scheduler = running(3, num_lanes=3)
    assert scheduler.plan(0, lambda line: 1).decode == (0,)
    assert step(scheduler, PLENTY).decode == (0, 1, 2)


# Refusals: the message names what was wrong, and nothing changes.


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1, 1), "num_lanes: expected an integer of at least 1, got 0"),
        ((1, -1, 1, 1), "num_slots: expected an integer of at least 1, got -1"),
        ((1, 1, 0, 1), "num_beams: expected an integer of at least 1, got 0"),
        ((1, 1, 1, 0), "encode_batch: expected an integer of at least 1, got 0"),
        ((1, 1.5, 1, 1), "num_slots: expected an integer of at least 1, got 1.5"),
        ((4, 3, 1, 1), r"num_slots: expected at least num_lanes \(4\), got 3"),
        ((4, 4, 1, 5), r"encode_batch: expected at most num_slots \(4\), got 5"),
    ],
)
def test_capacity_refuses(sizes: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Capacity(*sizes)


def refuses(
    scheduler: Scheduler, call: Callable[[], object], message: str, error: type[Exception] = ValueError
) -> None:
    def content() -> dict[str, Any]:
        # Order counts, in dictionaries too.
        return {name: list(x.items()) if isinstance(x, dict) else copy.copy(x) for name, x in vars(scheduler).items()}

    before = content()
    with pytest.raises(error, match=message):
        call()
    assert content() == before, "a call that was refused changed something"


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("add", (0,), "line: expected a new one, got 0, which is running"),
        ("add", (4,), "line: expected a new one, got 4, which is waiting"),
        ("encoded", (9,), "line: expected one that was added and has not ended, got 9"),
        ("encoded", (3, 2), "line 2: expected it encoding, got ready"),
        ("encoded", (3, 3), r"lines: expected each once, got \(3, 3\)"),
        ("finish", (9,), "line: expected one that was added and has not ended, got 9"),
        ("finish", (0, 4), "line 4: expected it running or swapped, got waiting"),
        ("finish", (0, 3), "line 3: expected it running or swapped, got encoding"),
        ("finish", (1, 2), "line 2: expected it running or swapped, got ready"),
        ("finish", (0, 1, 0), r"lines: expected each once, got \(0, 1, 0\)"),
        ("cancel", (0, 9), "line: expected one that was added and has not ended, got 9"),
        ("cancel", (4, 4), r"lines: expected each once, got \(4, 4\)"),
        ("state", (9,), "line: expected one that was added and has not ended, got 9"),
    ],
)
def test_reports_are_refused(name: str, lines: tuple[int, ...], message: str) -> None:
    scheduler = all_states()
    refuses(scheduler, lambda: getattr(scheduler, name)(*lines), f"^{message}$")


def test_an_end_is_told_once() -> None:
    scheduler = running(2, num_lanes=2)
    scheduler.finish(1)
    for report in (scheduler.finish, scheduler.cancel):
        refuses(scheduler, lambda report=report: report(1), "got 1$")  # type: ignore[misc]


def test_nothing_changes_if_a_plan_fails() -> None:
    scheduler = all_states()
    refuses(scheduler, lambda: scheduler.plan(-1, five), "^free_blocks: expected at least 0, got -1$")

    def broken(argument: Any) -> int:
        raise KeyError("broken")

    refuses(scheduler, lambda: scheduler.plan(PLENTY, broken), "broken", KeyError)
    scheduler.policy = broken
    refuses(scheduler, lambda: scheduler.plan(PLENTY, five), "broken", KeyError)


@pytest.mark.parametrize(("num_lines", "expected"), [(-1, "0 to 1"), (2, "0 to 1"), (99, "0 to 1")])
def test_policies_outside_their_limits_are_refused(num_lines: int, expected: str) -> None:
    scheduler = all_states()
    scheduler.cancel(2)  # a slot is free, one line waits
    scheduler.policy = lambda load: num_lines
    refuses(
        scheduler, lambda: scheduler.plan(PLENTY, five), f"^policy: expected {expected} lines to .* got {num_lines}"
    )


def test_a_policy_must_not_let_all_wait() -> None:
    scheduler = Scheduler(Capacity(2, 2, 1, 2), lambda load: 0)
    assert step(scheduler) == Plan((), (), (), (), (), ())
    scheduler.add(0)
    refuses(scheduler, lambda: scheduler.plan(PLENTY, five), "^policy: expected 1 to 1 lines to encode, got 0")


def test_too_few_blocks_for_one_line() -> None:
    """While it runs, as it comes back, and before it begins."""
    scheduler = running(3, num_lanes=3, num_beams=4)
    message = "^free_blocks: expected at least {} for the next step of line {}, got {}$"
    # The others would free two blocks in all, which is not enough even so.
    refuses(scheduler, lambda: scheduler.plan(1, lambda line: 1), message.format(4, 0, 3), LineTooLarge)
    assert scheduler.plan(2, lambda line: 1).decode == (0,)
    scheduler.cancel(0)
    refuses(scheduler, lambda: scheduler.plan(8, five), message.format(9, 1, 8), LineTooLarge)
    scheduler.cancel(1, 2)
    scheduler.add(3)
    step(scheduler)
    with pytest.raises(LineTooLarge, match=message.format(4, 3, 3)) as caught:
        scheduler.plan(3, five)
    assert caught.value.line == 3
    scheduler.cancel(caught.value.line)
    assert scheduler.is_idle


CORRUPTIONS: dict[str, Callable[[Scheduler], object]] = {
    "a line in two states": lambda scheduler: scheduler._waiting.update({0: None}),
    "running and swapped": lambda scheduler: scheduler._swapped.update({0: None}),
    "lost while running": lambda scheduler: scheduler._lanes.pop(0),
    "lost while swapped": lambda scheduler: scheduler._swapped.pop(1),
    "without a slot": lambda scheduler: scheduler._slots.pop(2),
    "a slot freed twice": lambda scheduler: scheduler._free_slots.append(3),
    "a slot shared": lambda scheduler: scheduler._slots.update({3: 2}),
    "a lane shared": lambda scheduler: (scheduler._lanes.update({1: 0}), scheduler._swapped.pop(1)),
    "out of order": lambda scheduler: scheduler._encoded.update({2: scheduler._encoded.pop(2)}),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_check_integrity_finds(name: str) -> None:
    scheduler = all_states()
    scheduler.check_integrity()
    CORRUPTIONS[name](scheduler)
    with pytest.raises(AssertionError):
        scheduler.check_integrity()


# The default policy.


@pytest.mark.parametrize(
    ("why", "waiting", "ready", "running", "free_lanes", "free_slots", "expected"),
    [
        ("nothing waits", 0, 0, 0, 16, 32, 0),
        ("no slot", 9, 0, 16, 0, 0, 0),
        ("the first line of all", 1, 0, 0, 16, 32, 1),
        ("a whole batch to begin with", 20, 0, 0, 16, 32, 8),
        ("the next, for the other lanes", 12, 8, 0, 16, 24, 8),
        ("one more, so that it is at hand", 20, 0, 16, 0, 16, 8),
        ("a batch is nearly used up", 20, 7, 16, 0, 9, 8),
        ("a batch is at hand", 20, 8, 16, 0, 8, 0),
        ("a batch is left over from the free lanes", 20, 12, 12, 4, 16, 0),
        ("not quite", 20, 11, 12, 4, 16, 8),
        ("few wait, but lanes are full", 3, 0, 16, 0, 16, 0),
        ("few wait, and have lanes", 3, 0, 15, 1, 16, 3),
        ("few wait, and those lanes are taken", 3, 1, 15, 1, 16, 0),
        ("dense: one lane is empty", 20, 0, 15, 1, 1, 0),
        ("dense: nearly a quarter", 20, 0, 13, 3, 3, 0),
        ("dense: a quarter", 20, 0, 12, 4, 4, 4),
        ("dense: a quarter, but some are ready", 20, 1, 12, 4, 3, 0),
        ("dense: no line runs", 20, 0, 0, 3, 3, 3),
        ("dense: a single lane", 20, 0, 0, 1, 1, 1),
    ],
)
def test_default_policy(
    why: str, waiting: int, ready: int, running: int, free_lanes: int, free_slots: int, expected: int
) -> None:
    load = Load(waiting, ready, running, free_lanes, free_slots, encode_batch=8)
    assert fill_lanes(load) == expected, why


def lengths_of_lines(count: int, seed: int) -> list[int]:
    """As on IAM: 11 tokens, some lines far more."""
    draw = random.Random(seed)
    return [max(1, min(40, round(draw.lognormvariate(2.3, 0.5)))) for _ in range(count)]


@pytest.mark.parametrize(
    ("spare_slots", "least_filled", "least_batch"), [(16, 0.99, 7.9), (8, 0.95, 6), (4, 0.9, 4), (0, 0.8, 4)]
)
def test_lanes_are_kept_full(spare_slots: int, least_filled: float, least_batch: float) -> None:
    """After the start and as long as lines wait: how full the decode batch is, and how large encode batches are."""
    requests = tuple(Request(0, length, 1) for length in lengths_of_lines(200, seed=1))
    simulation = Simulation(Trace(Capacity(16, 16 + spare_slots, 1, 8), 16 * 50, requests, encode_steps=1))
    simulation.run()
    encodes = [number for number, plan in enumerate(simulation.plans) if plan.encode]
    steady = simulation.plans[10 : encodes[-1] + 1]
    filled = sum(len(plan.decode) for plan in steady) / (16 * len(steady))
    batches = [len(plan.encode) for plan in steady if plan.encode]
    batch = sum(batches) / len(batches)
    print(f"{spare_slots} spare slots: {filled:.3f} of the lanes are filled, {batch:.2f} of 8 lines in an encode batch")
    assert filled >= least_filled and batch >= least_batch


@pytest.mark.parametrize("num_beams", [1, 2, 5])
@pytest.mark.parametrize("real_cache", [False, True])
def test_blocks_of_one_line_are_enough_for_all(num_beams: int, real_cache: bool) -> None:
    """Nobody is too large, however many others there are."""
    happened.clear()
    requests = tuple(Request(0, length, late=number % 2) for number, length in enumerate(lengths_of_lines(40, seed=2)))
    num_blocks = num_beams * max(request.num_steps for request in requests)
    simulation = Simulation(Trace(Capacity(8, 12, num_beams, 4), num_blocks, requests, real_cache=real_cache))
    simulation.run()
    assert set(simulation.ended.values()) == {"finished"}
    assert happened["swapped out"] and happened["swapped in"]


def test_it_needs_neither_torch_nor_numpy() -> None:
    program = "import sys, trocr_fast.scheduler; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
