"""Random calls of a paged cache, chosen by hypothesis. The calls and the comparisons are cache_driver.py's.

python -m tests.csrc.cache_machine FOLDER writes the calls of a fixed set of runs to FOLDER, for replay.cpp.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.csrc.cache_driver import CacheDriver, happened

MAX_SEQUENCES = 8
REFUSED = (
    "unknown sequence",
    "sequence twice",
    "num_tokens negative",
    "num_tokens too many",
    "num_tokens of another size",
    "out of blocks",
    "parents of another size",
    "parents outside",
    "tail outside",
    "tail off a border",
    "tail shared",
    "grow to fewer",
)


def with_live(machine: "CacheMachine") -> bool:
    return bool(machine.driver.live)


def with_room(machine: "CacheMachine") -> bool:
    return len(machine.driver.live) < MAX_SEQUENCES


class CacheMachine(RuleBasedStateMachine):
    trace_folder: Path | None = None
    num_runs = 0

    @initialize(
        block_size=st.sampled_from([1, 2, 4, 16]),
        num_blocks=st.sampled_from([2, 4, 6, 8, 12, 16]),
        max_blocks=st.integers(2, 6),
        first=st.lists(st.integers(0, 5), max_size=3),
    )
    def start(self, block_size: int, num_blocks: int, max_blocks: int, first: list[int]) -> None:
        self.trace = None
        if self.trace_folder is not None:
            self.trace = open(self.trace_folder / f"{CacheMachine.num_runs:04d}.trace", "w")  # noqa: SIM115
        CacheMachine.num_runs += 1
        self.driver = CacheDriver(num_blocks, block_size, max_blocks, self.trace)
        happened[f"block size {block_size}"] += 1
        self.driver.reserve([], [])
        self.driver.permute([], [], 2**63 - 1)
        self.driver.release([])
        self.driver.detach([])
        for count in first:
            sequence = self.driver.add()
            self.driver.reserve([sequence], [min(count, self.room(sequence))])

    def teardown(self) -> None:
        if getattr(self, "trace", None) is not None:
            self.trace.close()

    @invariant()
    def everything_equals_the_model(self) -> None:
        self.driver.check()
        happened["step"] += 1

    def group(self, data: st.DataObject, at_border: bool = False, least: int = 1, most: int = 5) -> list[int]:
        """Some live sequences, in any order; `at_border`: those whose next token begins a block."""
        block_size = self.driver.cache.block_size
        of = [s for s in self.driver.live if not at_border or self.driver.cache.length(s) % block_size == 0]
        sizes = {"min_size": min(least, len(of)), "max_size": most}
        return data.draw(st.lists(st.sampled_from(of), **sizes, unique=True)) if of else []

    def parents(self, data: st.DataObject, count: int) -> list[int]:
        return data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))

    def room(self, sequence: int) -> int:
        """Tokens that a sequence may still get."""
        cache = self.driver.cache
        return cache.max_blocks * cache.block_size - cache.length(sequence)

    @precondition(with_room)
    @rule()
    def add(self) -> None:
        self.driver.add()
        happened["add"] += 1

    @precondition(lambda self: with_live(self) and with_room(self))
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        self.driver.fork(data.draw(st.sampled_from(self.driver.live)))
        happened["fork"] += 1

    @precondition(with_live)
    @rule(data=st.data())
    def reserve_one(self, data: st.DataObject) -> None:
        group = [s for s in self.group(data) if self.room(s)]
        happened["reserve one"] += self.driver.reserve(group, [1] * len(group)) and bool(group)

    @precondition(with_live)
    @rule(data=st.data())
    def reserve_many(self, data: st.DataObject) -> None:
        group = self.group(data)
        most = 2 * self.driver.cache.block_size + 1
        counts = [data.draw(st.integers(0, min(most, self.room(s)))) for s in group]
        happened["reserve many"] += self.driver.reserve(group, counts) and max(counts) > 1

    @precondition(with_live)
    @rule(data=st.data())
    def fork_and_write_both(self, data: st.DataObject) -> None:
        """What copy-on-write is for; by chance alone it would be rare with block size 16."""
        parent = data.draw(st.sampled_from(self.driver.live))
        if not self.room(parent) or not with_room(self):
            return
        pair = [parent, self.driver.fork(parent)]
        self.driver.check()
        happened["fork and write both"] += self.driver.reserve(data.draw(st.permutations(pair)), [1, 1])

    @precondition(with_live)
    @rule(data=st.data(), left=st.integers(0, 1))
    def fill(self, data: st.DataObject, left: int) -> None:
        """As many blocks as there are, or but one, so that others find none."""
        sequence = data.draw(st.sampled_from(self.driver.live))
        cache = self.driver.cache
        free = (cache.num_free - left) * cache.block_size
        happened["fill"] += self.driver.reserve([sequence], [max(0, min(free, self.room(sequence)))])

    @precondition(with_live)
    @rule(data=st.data())
    def detach_fill_attach(self, data: st.DataObject) -> None:
        """What is swapped out finds its room taken."""
        self.detach(data)
        self.driver.check()
        if self.driver.live:
            self.fill(data, 0)
            self.driver.check()
        happened["detach, fill, attach"] += self.driver.attach(max(self.driver.detached))

    @precondition(with_live)
    @rule(data=st.data())
    def permute(self, data: st.DataObject) -> None:
        group = self.group(data, least=2)
        self.driver.permute(group, self.parents(data, len(group)))
        happened["permute"] += 1

    @precondition(with_live)
    @rule(data=st.data())
    def reserve_then_permute(self, data: st.DataObject) -> None:
        """A beam step whose parents are known late."""
        group = self.group(data, at_border=True, least=2)
        tail = data.draw(st.sampled_from([1, 1, 1, 2, self.driver.cache.block_size]))
        group = [s for s in group if self.room(s) >= tail]
        if not group or not self.driver.reserve(group, [tail] * len(group)):
            return
        self.driver.check()
        self.driver.permute(group, self.parents(data, len(group)), tail)
        happened["reserve then permute"] += 1

    @precondition(with_live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.driver.release(self.group(data, most=2))
        happened["release"] += 1

    @precondition(with_live)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        self.driver.detach(self.group(data, most=3))
        happened["detach"] += 1

    @precondition(lambda self: self.driver.detached)
    @rule(data=st.data(), again=st.booleans())
    def attach(self, data: st.DataObject, again: bool) -> None:
        key = data.draw(st.sampled_from(list(self.driver.detached)))
        if len(self.driver.live) + len(self.driver.detached[key][2]) > MAX_SEQUENCES:
            return
        happened["attach"] += self.driver.attach(key)
        if not again:
            del self.driver.detached[key]

    @precondition(lambda self: self.driver.cache.num_blocks < 24)
    @rule(more=st.integers(0, 3))
    def grow(self, more: int) -> None:
        self.driver.grow(self.driver.cache.num_blocks + more)
        happened["grow"] += more > 0

    @precondition(with_live)
    @rule(data=st.data(), kind=st.sampled_from(REFUSED))
    def refused(self, data: st.DataObject, kind: str) -> None:
        """A call that must fail and change nothing: what is wrong comes last, so that a call begun too early shows."""
        driver = self.driver
        group = self.group(data)
        count, last = len(group), group[-1]
        ones, same = [1] * count, list(range(count))
        calls: list[tuple[Any, ...]] = []
        if kind == "unknown sequence":
            wrong = data.draw(st.sampled_from([*driver.released, last + 2**32, last - 2**32]))
            group = data.draw(st.sampled_from([[*group, wrong], [wrong, *group]]))
            calls = [
                ("fork", wrong),
                ("length", wrong),
                ("reserve", group, [0] * (count + 1)),
                ("permute", group, [*same, 0], 0),
                ("release", group),
                ("detach", -1, group),
            ]
        elif kind == "sequence twice":
            group = [*group, group[0]]
            calls = [
                ("reserve", group, [0] * (count + 1)),
                ("permute", group, [*same, 0], 0),
                ("release", group),
                ("detach", -1, group),
            ]
        elif kind == "num_tokens negative":
            calls = [("reserve", group, [*ones[1:], -1])]
        elif kind == "num_tokens too many":
            calls = [("reserve", group, [*[0] * (count - 1), self.room(last) + 1]), ("reserve", group, [2**62] * count)]
        elif kind == "num_tokens of another size":
            calls = [("reserve", group, [0] * (count + 1)), ("reserve", group, [0] * (count - 1))]
        elif kind == "out of blocks":
            # the least that is surely too much, if a sequence may hold so many
            needed = (driver.cache.num_free + 1) * driver.cache.block_size
            able = [s for s in driver.live if self.room(s) >= needed]
            if not able:
                return
            assert not driver.reserve([able[-1]], [needed])
        elif kind == "parents of another size":
            calls = [("permute", group, [*same, 0], 0), ("permute", group, same[1:], 0)]
        elif kind == "parents outside":
            calls = [("permute", group, [*[0] * (count - 1), wrong], 0) for wrong in (-1, count, 2**62)]
        elif kind == "tail outside":
            most = min(driver.cache.length(s) for s in group)
            calls = [("permute", group, [0] * count, tail) for tail in (-1, most + 1, 2**63 - 1)]
        elif kind == "tail off a border":
            block_size = driver.cache.block_size
            tails = [t for t in range(1, driver.cache.length(last) + 1) if (driver.cache.length(last) - t) % block_size]
            if not tails:
                return
            calls = [("permute", group, [0] * count, tails[0])]
        elif kind == "tail shared":
            if not driver.cache.length(last) or not with_room(self):
                return
            driver.fork(last)
            calls = [("permute", [last], [0], len(driver.model.rows[last][-1]))]
        elif kind == "grow to fewer":
            calls = [("grow", driver.cache.num_blocks - 1), ("grow", 2**31), ("grow", -(2**63))]
        for name, *arguments in calls:
            given = arguments[1:] if name == "detach" else arguments  # the key is the trace's
            driver.fails(ValueError, partial(getattr(driver.cache, name), *given), name, *arguments)
        happened[f"refused: {kind}"] += 1


def machine_settings(examples: int, steps: int, derandomize: bool = True) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=derandomize,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        # tests/mutants has to know only that a run is red
        phases=[Phase.generate] if os.environ.get("TROCR_FAST_UNSHRUNK") else list(Phase),
    )


def write_traces(folder: Path, examples: int, steps: int) -> None:
    """The same calls each time."""
    folder.mkdir(parents=True, exist_ok=True)
    CacheMachine.trace_folder = folder
    try:
        run_state_machine_as_test(CacheMachine, settings=machine_settings(examples, steps))
    finally:
        CacheMachine.trace_folder = None


if __name__ == "__main__":
    write_traces(Path(sys.argv[1]), examples=100, steps=60)
    print(f"{CacheMachine.num_runs} traces, {happened['step']} steps")
