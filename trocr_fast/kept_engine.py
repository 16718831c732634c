"""An engine from one call to the next, with what it has recorded."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from trocr_fast.engine import Engine
from trocr_fast.model import Network
from trocr_fast.search import SearchSettings

# Of an engine that is kept. Larger ones hold much memory, and recording costs their calls little; long lines leave wide
# tensors behind, which would slow the next ones down.
MOST_LANES, MOST_TOKENS = 8, 128


class KeptEngine:
    """Lends engines of a network, and keeps the last one for a call like the one before if it has recordings.

    Any thread may call.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._kept: tuple[Any, Engine] | None = None
        self._lock = Lock()

    @contextmanager
    def lend(
        self, settings: SearchSettings, num_lanes: int, count_pads: bool, table: Tensor | None = None
    ) -> Iterator[Engine]:
        """An engine with nothing to do; the arguments are those of `Engine`."""
        device = self.network.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None  # which an engine never leaves
        wanted = settings, num_lanes, count_pads, None if table is None else table.tolist(), stream
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None and kept[0] == wanted:
            engine = kept[1]
        else:
            kept = None  # goes before its like comes
            engine = Engine(self.network, settings, num_lanes, count_pads=count_pads, table=table)
        yield engine
        small = num_lanes <= MOST_LANES and engine.lanes.room <= MOST_TOKENS
        if small and engine.has_recordings and engine.is_idle:
            self._kept = wanted, engine
