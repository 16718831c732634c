"""An engine from one call to the next."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from trocr_fast.engine import Engine
from trocr_fast.model import Network
from trocr_fast.search import SearchSettings

MOST_LANES = 8  # of an engine that is kept: larger ones hold much memory, and a new one costs their calls little


class KeptEngine:
    """Lends engines, and keeps the last one for a call like the one before: what it recorded on a GPU stays with it.

    Any thread may call.
    """

    def __init__(self) -> None:
        self._kept: tuple[Any, Engine] | None = None
        self._lock = Lock()

    @contextmanager
    def lend(self, network: Network, settings: SearchSettings, num_lanes: int, **more: Any) -> Iterator[Engine]:
        """An engine with nothing to do.

        Args:
            network, settings, num_lanes, more: as of `Engine`; a `table` is taken to be the same each time.
        """
        wanted = settings, num_lanes, {**more, "table": more.get("table") is not None}
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None and kept[0] == wanted and kept[1].network is network:
            engine = kept[1]
        else:
            kept = None  # goes before its like comes
            engine = Engine(network, settings, num_lanes, **more)
        yield engine
        # Processors are others at each call, and what they hold is not to be kept.
        if num_lanes <= MOST_LANES and not settings.processors and engine.is_idle:
            self._kept = wanted, engine

    def forget(self) -> None:
        """Keep none."""
        self._kept = None
