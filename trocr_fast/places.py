"""Room for so many, waited for by threads and event loops alike."""

from collections import deque
from concurrent.futures import Future
from threading import Lock

CLOSED = "expected an open engine, got one that is closed, or that was made before this process was forked"


class Places:
    """A semaphore that a thread or an event loop can wait for, first come, first served."""

    def __init__(self, number: int) -> None:
        self._free = number  # negative where some were taken at once
        self._queue: deque[Future[None]] = deque()
        self._lock, self._closed = Lock(), False

    def take(self) -> Future[None]:
        """Ends when there is a place, and it is taken; with RuntimeError if there will be none."""
        place: Future[None] = Future()
        with self._lock:
            if self._closed:
                place.set_exception(RuntimeError(CLOSED))
            else:
                self._queue.append(place)
                self._hand_out()
        return place

    def take_at_once(self) -> None:
        """One more than there are, if need be."""
        with self._lock:
            self._free -= 1

    def give(self) -> None:
        """A place that was taken is free again."""
        with self._lock:
            self._free += 1
            self._hand_out()

    def give_up(self, place: Future[None]) -> None:
        """Wait no longer; or give it back, had it come."""
        if not place.cancel() and place.exception() is None:
            self.give()

    def close(self) -> None:
        """Let nobody wait any longer."""
        with self._lock:
            self._closed = True
            for place in self._queue:
                if place.set_running_or_notify_cancel():
                    place.set_exception(RuntimeError(CLOSED))
            self._queue.clear()

    def _hand_out(self) -> None:
        while self._free > 0 and self._queue:
            place = self._queue.popleft()
            if place.set_running_or_notify_cancel():
                self._free -= 1
                place.set_result(None)
