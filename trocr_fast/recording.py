"""Work on a GPU, recorded once and then replayed: one call in place of some hundred launches.

What is recorded are launches with their arguments: numbers by value, tensors by address. So the work has to read its
input from tensors that stay where they are, must not wait for the device, and gives its results in the same tensors
every time. It is recorded for a few sizes; a batch between two of them takes the larger, with rows that mean nothing.
"""

import gc
import os
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from threading import RLock
from typing import Generic, TypeVar

import torch

from trocr_fast import ops

T = TypeVar("T")
Work = Callable[[], T]
# Runs the work under record, and gives what replays it and what it returned.
Recorder = Callable[[Work[T]], tuple[Callable[[], None], T]]
MakeRecorder = Callable[[], Recorder[T] | None]

SWITCH = "TROCR_FAST_GRAPHS"  # set to 0: nothing is recorded


class _Arena:
    """A stream to record on and the memory of what is recorded.

    Lent to one recorder after another, until `give_back`: what the graphs of a pool leave, torch uses again only for
    graphs of that pool on that stream.
    """

    def __init__(self, device: torch.device) -> None:
        # torch shares streams out again and again, and what somebody else launches on this one would be recorded, too:
        # few ask for streams of high priority
        self.stream, self.pool = torch.cuda.Stream(device, priority=-1), torch.cuda.graph_pool_handle()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its being empty
            self._anchor, _ = self.capture(lambda: None)  # the pool would go with its last graph

    def capture(self, work: Work[T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """Only under the lock."""
        graph = torch.cuda.CUDAGraph()
        # Made for each thread, which cannot be done while recording. Its workspace, whose address a graph keeps, is one
        # for each stream: here it is allocated by the first recording on this one, in the pool.
        torch.cuda.current_blas_handle()
        collects = gc.isenabled()
        gc.disable()  # a graph that is collected would end the recording
        try:
            with torch.cuda.stream(self.stream):
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")  # other threads may launch
                try:
                    result = work()
                except BaseException:
                    with suppress(RuntimeError):  # that the recording is broken
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            if collects:
                gc.enable()
        return graph, result


# Nobody waits for the device while another thread records, which would end the recording; and torch before 2.13 neither
# replays nor draws random numbers then.
_LOCK = RLock()
_FREE: defaultdict[torch.device, list[_Arena]] = defaultdict(list)  # arenas that nobody records in


def give_back() -> None:
    """Let torch have the memory of recordings that are gone."""
    with _LOCK:
        for arenas in _FREE.values():
            arenas.clear()


class CudaRecorder:
    """Records CUDA graphs, which share their memory: they must not run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arena: _Arena | None = None  # from the first recording on

    def __call__(self, work: Work[T]) -> tuple[Callable[[], None], T]:
        with _LOCK:
            if self._arena is None:
                self._arena = self._borrow()
            try:
                graph, result = self._arena.capture(work)
            except BaseException:
                self._giving_back.detach()  # who knows what it is good for
                self._arena = None
                raise
        return partial(_replay, graph), result

    def _borrow(self) -> _Arena:
        free = _FREE[self._device]
        if free:
            arena = free.pop()
            torch.cuda.synchronize(self._device)  # graphs of who had it before may still run
        else:
            arena = _Arena(self._device)
        self._giving_back = weakref.finalize(self, free.append, arena)
        return arena


def _replay(graph: torch.cuda.CUDAGraph) -> None:
    with _LOCK:
        graph.replay()


def cuda_recorder(device: torch.device) -> CudaRecorder | None:
    """A recorder on a GPU, unless the environment variable TROCR_FAST_GRAPHS is 0."""
    return CudaRecorder(device) if device.type == "cuda" and os.environ.get(SWITCH) != "0" else None


def no_recorder() -> None:
    """Nothing is recorded."""


def padded(size: int, most: int) -> int:
    """The least size that is recorded and not below this one; these are 1, 2, 3, 4, 6, 8, 12 and so on, and `most`."""
    power = 1 << (size - 1).bit_length()
    return min(3 * power // 4 if size <= 3 * power // 4 else power, most)


class Recordings(Generic[T]):
    """A function of a size, replayed where it can be.

    Args:
        recorder: None: the function is called each time, with the very size.
        most: the largest size.
    """

    def __init__(self, recorder: Recorder[T] | None, most: int) -> None:
        self._recorder, self._most = recorder, most
        self._version: Hashable = None
        self._recordings: dict[int, tuple[Callable[[], None], T] | None] = {}

    def size(self, size: int) -> int:
        """The size that the function is called with."""
        return padded(size, self._most) if self.is_on else size

    @property
    def is_on(self) -> bool:
        """Whether anything is recorded."""
        return self._recorder is not None

    def forget(self) -> None:
        """Let all recordings go."""
        self._recordings = {}

    def run(self, work: Callable[[int], T], size: int, version: Hashable) -> T:
        """What a function gives for a size from `size`; the next call may overwrite it.

        Args:
            work: the function, the same each time; it is not kept.
            version: differs from the last call's if a tensor that the function reads or writes lies elsewhere now.
        """
        if self._recorder is None:
            return work(size)
        version = version, ops.chosen()
        if version != self._version:
            self._recordings, self._version = {}, version
        if size not in self._recordings:
            result = work(size)  # compiles kernels, which cannot be done while recording
            self._recordings[size] = None
            return result
        recording = self._recordings[size]
        if recording is None:
            try:
                recording = self._recordings[size] = self._recorder(lambda: work(size))
            except RuntimeError as error:
                self._recorder, self._recordings = None, {}
                # torch before 2.13 may hold on to memory that was freed meanwhile
                warnings.warn(
                    f"CUDA graphs could not be recorded, which makes small batches slower ({SWITCH}=0 does not try): "
                    f"{error!r}",
                    stacklevel=2,
                )
        if recording is None:  # out of the handler, whose error holds on to memory
            return work(size)
        replay, result = recording
        replay()
        return result
