"""Pictures on their way through the encoder, on a GPU beside the decoding of others.

There encoding has a stream of its own, and a few pictures are encoded by a recording: many keep the GPU busy while the
host launches.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from trocr_fast.model import Network
from trocr_fast.recording import Recorder, Recordings

MOST_RECORDED = 8  # pictures


@dataclass(frozen=True)
class Encoded:
    """Encoder states of pictures, [lines, tokens, width], which are there when their stream has got so far."""

    states: Tensor
    ready: torch.cuda.Event | None

    @property
    def is_ready(self) -> bool:
        """Whether nobody would have to wait."""
        return self.ready is None or self.ready.query()

    def take(self) -> Tensor:
        """The states, for the current stream, which waits for them."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.states.device)
            stream.wait_event(self.ready)
            self.states.record_stream(stream)
        return self.states


class PictureEncoder:
    """`Network.states` of pictures that came one by one.

    Args:
        table: as of `Network.states`.
        recorder: of what the device does; None: nothing is recorded.
    """

    def __init__(self, network: Network, table: Tensor | None, recorder: Recorder[Tensor] | None) -> None:
        self._network, self._table = network, table if table is None else table.to(network.device)
        self._stream = torch.cuda.Stream(network.device) if network.device.type == "cuda" else None
        self._recordings = Recordings(recorder, MOST_RECORDED)
        self._pixels: Tensor | None = None  # of a recording, [MOST_RECORDED, channels, H, W]
        self.follow()  # of who made the weights

    def follow(self, pixels: Tensor | None = None) -> None:
        """Let encoding wait for what the current stream has been given to do so far, such as making these pixels."""
        if self._stream is not None and (pixels is None or pixels.device.type == "cuda"):
            self._stream.wait_stream(torch.cuda.current_stream(self._network.device))
            if pixels is not None:
                pixels.record_stream(self._stream)

    def encode(self, pictures: list[Tensor]) -> Encoded:
        """Begin to encode pictures, each [channels, H, W], all of one dtype.

        Raises:
            RuntimeError: too little memory, which `trocr_fast.errors.is_out_of_memory` can tell.
        """
        with self._on_stream():
            pixels = self._stacked(pictures)
            if self._recordings.is_on and len(pixels) <= MOST_RECORDED:
                states = self._replayed(pixels)
            else:
                states = self._network.states(pixels, self._table)
            return Encoded(states, None if self._stream is None else self._stream.record_event())

    def _replayed(self, pixels: Tensor) -> Tensor:
        if self._pixels is None or self._pixels.dtype != pixels.dtype:
            self._pixels = pixels.new_zeros((MOST_RECORDED, *pixels.shape[1:]))
        kept, num = self._pixels, len(pixels)
        kept[:num] = pixels
        size = self._recordings.size(num)
        states = self._recordings.run(lambda size: self._network.states(kept[:size], self._table), size, kept.dtype)
        return states[:num].clone()  # the next replay writes there

    def _stacked(self, pictures: list[Tensor]) -> Tensor:
        """[pictures, channels, H, W], on the device or on the way to it."""
        if self._stream is None or pictures[0].device.type != "cpu":
            return torch.stack(pictures)
        # from pinned memory: else the host would wait until the stream is done with the pictures before
        pinned = torch.empty((len(pictures), *pictures[0].shape), dtype=pictures[0].dtype, pin_memory=True)
        return torch.stack(pictures, out=pinned).to(self._network.device, non_blocking=True)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
