"""CUDA graphs are recorded in memory that is lent and given back; here their own calls do nothing."""

import gc
import time
from collections.abc import Iterator
from contextlib import nullcontext
from threading import Thread
from typing import Any

import pytest
import torch

from trocr_fast.recording import CudaRecorder, give_back


class Graph:
    """What torch.cuda.CUDAGraph is called for."""

    fails = False

    def capture_begin(self, **_: Any) -> None:
        pass

    def capture_end(self) -> None:
        if self.fails:
            raise RuntimeError("the recording is broken")

    def replay(self) -> None:
        pass


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Lets `CudaRecorder` run without a GPU; gives what it has asked of the device."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: asked.append("pool"))
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: asked.append("synchronize"))
    give_back()
    yield asked
    give_back()


def test_an_arena_is_lent_to_one_recorder_after_another(graphs: list[str]) -> None:
    device = torch.device("cuda", 0)
    first, second = CudaRecorder(device), CudaRecorder(device)
    for recorder in (first, second, first):
        _, result = recorder(lambda: 3)
        assert result == 3
    assert graphs == ["pool", "pool"] and first._arena is not second._arena
    arena = first._arena
    del first, recorder
    third = CudaRecorder(device)
    third(lambda: None)
    assert third._arena is arena and graphs == ["pool", "pool", "synchronize"]
    del second
    give_back()
    CudaRecorder(device)(lambda: None)
    assert graphs == ["pool", "pool", "synchronize", "pool"]


def test_an_arena_is_not_used_again_once_a_recording_has_failed(
    graphs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    recorder(lambda: None)
    monkeypatch.setattr(Graph, "fails", True)

    def fail() -> None:
        raise ValueError("what went wrong first")

    with pytest.raises(ValueError, match="what went wrong first"):
        recorder(fail)
    with monkeypatch.context() as working:
        working.setattr(Graph, "fails", False)
        recorder(lambda: None)
    assert graphs == ["pool", "pool"]
    with pytest.raises(RuntimeError, match="the recording is broken"):
        recorder(lambda: None)
    assert gc.isenabled()


def test_recordings_of_many_threads_leave_the_garbage_collector_as_it_was(graphs: list[str]) -> None:
    is_off = []

    def work() -> None:
        is_off.append(not gc.isenabled())
        time.sleep(0.01)

    threads = [Thread(target=CudaRecorder(torch.device("cuda", 0)), args=(work,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_off == [True] * 6 and gc.isenabled()
