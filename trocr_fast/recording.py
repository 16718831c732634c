"""Work on a GPU, recorded once and then replayed: one call in place of some hundred launches.

What is recorded are launches with their arguments: numbers by value, tensors by address. So the work has to read its
input from tensors that stay where they are, must not wait for the device, and gives its results in the same tensors
every time. It is recorded for a few sizes; a batch between two of them takes the larger, with rows that mean nothing.
"""

import os
import warnings
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
Work = Callable[[], T]
# Runs the work under record, and gives what replays it and what it returned.
Recorder = Callable[[Work[T]], tuple[Callable[[], None], T]]
MakeRecorder = Callable[[], Recorder[T] | None]

SWITCH = "TROCR_FAST_GRAPHS"  # set to 0: nothing is recorded


class CudaRecorder:
    """Records CUDA graphs, which share their memory: they must not run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, work: Work[T]) -> tuple[Callable[[], None], T]:
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`, which waits for the device and gives all cached memory back.
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # others may use the GPU meanwhile
            try:
                result = work()
            finally:
                graph.capture_end()
        return graph.replay, result


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
        make_recorder: if it makes none, the function is called each time, with the very size.
        most: the largest size.
    """

    def __init__(self, make_recorder: MakeRecorder[T], most: int) -> None:
        self._make_recorder, self._recorder, self._most = make_recorder, make_recorder(), most
        self._places: Hashable = None
        self._recordings: dict[int, tuple[Callable[[], None], T] | None] = {}

    def size(self, size: int) -> int:
        """The size that the function is called with."""
        return padded(size, self._most) if self.is_on else size

    @property
    def is_on(self) -> bool:
        """Whether anything is recorded."""
        return self._recorder is not None

    def run(self, work: Callable[[int], T], size: int, places: Hashable) -> T:
        """What a function gives for a size from `size`; the next call may overwrite it.

        Args:
            work: the function, the same each time; it is not kept.
            places: differs from the last call's if a tensor that the function reads or writes lies elsewhere now.
        """
        recorder = self._recorder
        if recorder is not None and places != self._places:
            self._recordings, self._places = {}, places
            recorder = self._recorder = self._make_recorder()  # the memory of the old one goes with the recordings
        if recorder is None or size not in self._recordings:
            self._recordings[size] = None  # the first time kernels are compiled and workspaces allocated, unrecorded
            return work(size)
        recording = self._recordings[size]
        if recording is None:
            try:
                recording = self._recordings[size] = recorder(lambda: work(size))
            except RuntimeError as error:
                warnings.warn(f"steps are not recorded as CUDA graphs, which makes them slower: {error}", stacklevel=2)
                self._recorder, self._recordings = None, {}
                return work(size)
        replay, result = recording
        replay()
        return result
