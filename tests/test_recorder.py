"""The stand-in for CUDA graphs (tests/recorder.py) does what they do, and refuses what they do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.recorder import Recorder


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: torch.equal(x, x),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x.sum()),
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x + torch.tensor(1.0),
        lambda x: x[[0, 1]],
        lambda x: x.__setitem__(0, 1.0),  # of no dimension: a copy
    ],
)
def test_the_stand_in_refuses_what_a_capture_would(work: Callable[[Tensor], Any]) -> None:
    x = torch.ones(4)
    work(x.clone())
    with pytest.raises(AssertionError, match="aten::"):
        Recorder()(lambda: work(x))


def test_the_stand_in_replays_what_was_recorded_on_the_same_memory() -> None:
    factor, source, total = 2, torch.tensor([1.0, 2.0]), torch.zeros(3)

    def work() -> Tensor:
        total[2:] = factor  # filled, with a number
        total[:2] += source
        return total[:2] * factor

    replay, result = Recorder()(work)
    assert total.tolist() == [0, 0, 0]  # recording is not running
    replay()
    assert total.tolist() == [1, 2, 2] and result.tolist() == [2, 4]
    factor = 100  # a number that changes is not seen
    source.mul_(10)  # a tensor that does is
    replay()
    assert total.tolist() == [11, 22, 2] and result.tolist() == [22, 44]
    recorded, source = source, torch.full((2,), 1000.0)  # one that takes its place is not
    replay()
    assert total.tolist() == [21, 42, 2] and recorded.tolist() == [10, 20] and source.tolist() == [1000, 1000]


def test_work_that_fails_under_record_has_changed_nothing() -> None:
    total = torch.zeros(2)

    def work() -> None:
        total.add_(1)
        raise RuntimeError("by the test")

    with pytest.raises(RuntimeError, match="by the test"):
        Recorder()(work)
    assert total.tolist() == [0, 0]
