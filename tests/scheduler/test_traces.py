"""Random traces through an engine with a fake model, each plan compared with the oracle's."""

import os

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.scheduler.simulation import POLICIES, Request, Simulation, Trace, happened
from trocr_fast.scheduler import Capacity

NUM_TRACES = 10_000
STATES = ["waiting", "encoding", "ready", "running", "swapped"]
CASES = ["swapped out", "two swapped out at once", "swapped in", "two swapped in at once", "swapped line held back"]
CASES += ["swapped in and admitted at once", "admission held back", "all lanes full", "out of slots", "moved"]
CASES += ["two moved at once", "moved and admitted at once", "finished while swapped out", "finished late"]
CASES += ["several finished at once", "whole batch encoded", "part of a batch encoded", "line too large", "real cache"]


def trace_of(shape: tuple[int, ...], lines: list[int], cancels: list[int]) -> Trace:
    # One number stands for several: drawing is what costs.
    num_lanes, rows, encodes, blocks = shape
    placing_first, real_cache, num_beams = rows % 2 == 0, rows // 2 % 4 == 0, rows // 8 + 1
    encode_steps, encode_batch, spare_slots = encodes % 4, encodes // 4 % 4 + 1, encodes // 16
    num_slots = num_lanes + spare_slots
    capacity = Capacity(num_lanes, num_slots, num_beams, min(encode_batch, num_slots))
    cancel_after = dict(divmod(number, 12) for number in cancels)
    requests, arrival = [], 0
    for line, number in enumerate(lines):
        length, late, gap = number // 8 + 1, number // 4 % 2, number % 4
        arrival += (0, 0, 0, 2)[gap]
        requests.append(Request(arrival, length, late, cancel_after.get(line)))
    policy, extra = divmod(blocks, 7)
    # Mostly as many blocks as a line alone may need, or some more; sometimes too few.
    least = num_beams * max(request.num_steps for request in requests)
    num_blocks = max(1, least * (extra + 3) // 4 if extra else least // 2)
    return Trace(
        capacity=capacity,
        num_blocks=num_blocks,
        requests=tuple(requests),
        encode_steps=encode_steps,
        policy=("default", "default", "default", "default", "default", "eager", "lazy")[policy],
        real_cache=real_cache,
        placing_first=placing_first,
    )


SHAPES = st.tuples(
    st.sampled_from([1, 2, 3, 4, 6, 8, 8]),  # lanes
    st.integers(0, 2 * 4 * 3 - 1),  # beams and more
    st.integers(0, 4 * 4 * 4 - 1),  # of encoding
    st.integers(0, 7 * 7 - 1),  # blocks and policy
)
LINES = st.lists(st.integers(0, 8 * 8 - 1), min_size=3, max_size=24)
CANCELS = st.lists(st.integers(0, 12 * 10 - 1), max_size=6)
TIMES = int(os.environ.get("TROCR_FAST_RANDOM_RUNS", "0"))


@settings(
    max_examples=NUM_TRACES * max(TIMES, 1),
    derandomize=not TIMES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    # tests/mutants has to know only that a run is red
    phases=[Phase.generate] if os.environ.get("TROCR_FAST_UNSHRUNK") else [Phase.generate, Phase.shrink],
)
@given(SHAPES, LINES, CANCELS)
def run_random_traces(shape: tuple[int, ...], lines: list[int], cancels: list[int]) -> None:
    Simulation(trace_of(shape, lines, cancels)).run()


def test_random_traces() -> None:
    """The same traces each time; TROCR_FAST_RANDOM_RUNS=3 draws new ones, three times as many."""
    happened.clear()
    run_random_traces()
    expected = CASES + [f"cancelled {state}" for state in STATES] + [f"policy {name}" for name in POLICIES]
    missing = [what for what in expected if happened[what] < 30]
    assert not missing, f"hardly ever happened: {[(what, happened[what]) for what in missing]}"
    assert happened["trace"] >= NUM_TRACES
