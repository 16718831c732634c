"""Requests that join the running decode batch, from any thread or event loop.

    submit -> waiting -> loading (in a pool of threads) -> loaded -> decoding (in an `Engine`) -> ended

One worker thread owns all requests and engines; others send it messages. Requests that differ in their limit and seed
alone share an engine. Engines take turns, a step each.
"""

import asyncio
import os
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from queue import Empty, SimpleQueue
from threading import Lock, Thread, current_thread
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trocr_fast.engine import Engine
from trocr_fast.errors import PictureError, UsageError
from trocr_fast.images import Picture
from trocr_fast.line import Line
from trocr_fast.places import CLOSED, Places
from trocr_fast.search import SearchSettings

if TYPE_CHECKING:
    from trocr_fast.trocr import TrOCR

MAX_ENGINES = 4  # each holds memory for a whole batch; other searches wait for one of them to run empty

OnText = Callable[[str], object]
Message = tuple[Callable[..., None], tuple[Any, ...]] | None  # what the worker is to call; None: to end
Inbox = SimpleQueue[Message]


class Request(Future[Line]):
    """Pending until it ends, so that it can be cancelled at any time before."""

    def __init__(
        self, engine: "AsyncEngine", picture: Picture, settings: SearchSettings, on_text: OnText | None
    ) -> None:
        super().__init__()
        # A result may be kept for long; engine and picture are not to be kept with it.
        self.engine: AsyncEngine | None = engine
        self.picture: Picture | None = picture
        self.settings, self.on_text = settings, on_text
        # Has to be hashable, which is found out here, not by the worker thread.
        # What requests of one engine have in common: each brings its own limit and seed.
        sampling = settings.sampling and replace(settings.sampling, seed=0)
        self.shared = replace(settings, max_length=2, sampling=sampling, processors=tuple(settings.processors))
        hash(self.shared)
        self.group: Group
        self.path: str | None = None
        self.pixels: Tensor | None = None  # until it ends: a step that fails is tried again
        self.line: int | None = None  # its number in the engine of its group
        self.text = ""  # that `on_text` has seen

    def cancel(self) -> bool:
        engine = self.engine
        cancelled = super().cancel()
        if cancelled and engine is not None:
            engine._send(engine._end, self, None)
        return cancelled


@dataclass
class Group:
    """The requests of one search, and their engine. Dictionaries stand for ordered sets."""

    settings: SearchSettings
    engine: Engine | None = None
    waiting: dict[Request, None] = field(default_factory=dict)
    loading: "dict[Request, Future[None]]" = field(default_factory=dict)
    loaded: dict[Request, None] = field(default_factory=dict)
    lines: dict[int, Request] = field(default_factory=dict)  # in the engine
    suspects: dict[Request, None] = field(default_factory=dict)  # of a step that failed: each is tried again, alone

    @property
    def can_step(self) -> bool:
        return bool(self.loaded or self.lines or self.suspects)

    @property
    def is_busy(self) -> bool:
        """Something waits no more and has not ended."""
        return self.can_step or bool(self.loading)

    @property
    def requests(self) -> list[Request]:
        return [*self.lines.values(), *self.suspects, *self.loaded, *self.loading, *self.waiting]


class AsyncEngine:
    """Reads pictures that are submitted one by one, at any time, in one batch.

    Any thread may call any method. The worker thread ends with `close`, with the interpreter, and when nobody holds
    this object any more and all requests have ended.

    Args:
        ocr: the checkpoint.
        batch_size: pictures of one search decoded together at most.
        max_waiting: requests at most whose pictures wait to be loaded; `submit` waits as long as there are so many.

    Raises:
        UsageError: `batch_size` or `max_waiting` below 1.
    """

    def __init__(self, ocr: "TrOCR", batch_size: int = 16, max_waiting: int = 1024) -> None:
        for name, value in (("batch_size", batch_size), ("max_waiting", max_waiting)):
            if value < 1:
                raise UsageError(f"{name}: expected at least 1, got {value}")
        self._ocr, self._batch_size = ocr, batch_size
        self._places = Places(max_waiting)
        self._groups: dict[SearchSettings, Group] = {}
        self._pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="pictures")
        self._closed, self._closing = False, Lock()
        self._inbox: Inbox = SimpleQueue()
        # A daemon: the interpreter waits for all others before it calls what would end this one.
        self._worker = Thread(target=_work, args=(weakref.ref(self), self._inbox), name="trocr_fast", daemon=True)
        self._end_worker = weakref.finalize(self, _end_worker, self._inbox, self._worker)
        self._worker.start()

    def submit(self, picture: Picture, settings: SearchSettings, on_text: OnText | None = None) -> Future[Line]:
        """A picture to be read; waits as long as `max_waiting` others wait.

        Args:
            picture: a path, bytes, a `PIL.Image` picture or a NumPy array, not to be changed before the request ends.
            settings: how tokens are chosen. What is sampled depends on their seed alone, not on other requests.
            on_text: called with the text so far each time it has grown, by the worker thread. Every text begins with
                the one before it; beams that turn out differently are seen in the result alone.

        Returns:
            The line; of a bad picture one with `error` set. `cancel` succeeds until the request has ended, and gives
            its place in the batch to another. Callbacks are called by the worker thread, which does nothing else
            meanwhile, or by who cancels; `submit` never waits in the worker thread. What `on_text` raises is the
            outcome of its request.

        Raises:
            RuntimeError: this object is closed, or was made before this process was forked.
            TypeError: settings that can't be hashed.
        """
        request = Request(self, picture, settings, on_text)
        if current_thread() is self._worker:  # the only one that could end the wait
            self._places.take_at_once()
        else:
            place = self._places.take()
            try:
                place.result()
            except BaseException:
                self._places.give_up(place)
                raise
        self._submit(request)
        return request

    async def submit_async(self, picture: Picture, settings: SearchSettings, on_text: OnText | None = None) -> Line:
        """`submit` in an event loop, which gives the line itself. Whoever cancels the task cancels the request."""
        request = Request(self, picture, settings, on_text)
        place = self._places.take()
        try:
            await asyncio.wrap_future(place)
        except BaseException:
            self._places.give_up(place)
            raise
        self._submit(request)
        try:
            return await asyncio.wrap_future(request)
        finally:
            request.cancel()

    def stream(self, picture: Picture, settings: SearchSettings) -> Generator[str, None, None]:
        """The text so far each time it has grown, as `on_text` of `submit` is told, and at last the whole text.

        The request begins with the first text asked for, and closing the iterator cancels it.

        Raises:
            PictureError: the picture can't be read.
            RuntimeError: as by `submit`.
        """
        texts: SimpleQueue[str | None] = SimpleQueue()
        request = self.submit(picture, settings, texts.put)
        request.add_done_callback(lambda _: texts.put(None))
        last = None
        try:
            while (text := texts.get()) is not None:
                yield (last := text)
            if (text := _text_of(request.result())) != last:
                yield text
        finally:
            request.cancel()

    async def stream_async(self, picture: Picture, settings: SearchSettings) -> AsyncGenerator[str, None]:
        """`stream` in an event loop."""
        loop = asyncio.get_running_loop()
        texts: asyncio.Queue[str | None] = asyncio.Queue()

        def on_text(text: str) -> None:
            loop.call_soon_threadsafe(texts.put_nowait, text)

        line = asyncio.ensure_future(self.submit_async(picture, settings, on_text))
        line.add_done_callback(lambda _: texts.put_nowait(None))
        last = None
        try:
            while (text := await texts.get()) is not None:
                yield (last := text)
            if (text := _text_of(await line)) != last:
                yield text
        finally:
            line.cancel()

    def close(self) -> None:
        """Cancel the requests that have not ended, refuse new ones, and wait for the worker thread to end."""
        with self._closing:
            self._closed = True
        self._places.close()
        self._end_worker()
        if current_thread() is not self._worker:
            self._worker.join()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "AsyncEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, request: Request) -> None:
        """`submit` once there is a place."""
        with self._closing:  # nothing is to lie in the inbox behind the message to end
            if self._closed or not self._worker.is_alive():
                raise RuntimeError(CLOSED)
            self._send(self._arrived, request)

    def _send(self, method: Callable[..., None], *arguments: Any) -> None:
        self._inbox.put((method, arguments))

    def _load(self, request: Request) -> None:
        """In a thread of the pool."""
        picture = request.picture
        if picture is None:  # it has ended meanwhile
            return
        try:
            path, pixels = self._ocr.load_picture(picture)
        except Exception as error:
            self._send(self._end, request, error)
        else:
            self._send(self._loaded, request, path, pixels)

    # All that follows is for the worker thread.

    def _serve(self, message: Message) -> bool:
        """Work until all requests have ended; says whether there may be others."""
        messages = [message]
        try:
            while True:
                for message in messages:
                    if message is None:
                        self._end_all(None)
                        return False
                    method, arguments = message
                    method(*arguments)
                self._turn()
                groups = self._groups.values()
                if not any(group.requests for group in groups):
                    return True
                leaving = self._leaving()
                can_go_on = any(group.can_step for group in groups) or (leaving is not None and not leaving.is_busy)
                messages = [] if can_go_on else [self._inbox.get()]
                with suppress(Empty):
                    while True:
                        messages.append(self._inbox.get_nowait())
        except BaseException as error:  # nobody is to wait in vain
            with self._closing:
                self._closed = True
            self._places.close()
            with suppress(Empty):
                while True:
                    messages.append(self._inbox.get_nowait())
            for method, arguments in filter(None, messages):
                if method == self._arrived:
                    self._arrived(*arguments)
            self._end_all(error)
            raise

    def _arrived(self, request: Request) -> None:
        request.group = self._groups.setdefault(request.shared, Group(request.shared))
        request.group.waiting[request] = None

    def _loaded(self, request: Request, path: str | None, pixels: np.ndarray | PictureError) -> None:
        if request.engine is None:  # it has ended meanwhile
            return
        request.path, request.picture = path, None
        if isinstance(pixels, PictureError):
            self._end(request, Line(path=path, error=str(pixels)))
        else:
            del request.group.loading[request]
            request.group.loaded[request] = None
            request.pixels = torch.from_numpy(pixels)

    def _turn(self) -> None:
        """Begin to load what comes next, and take a step of each engine."""
        leaving = self._leaving()
        if leaving is not None and not leaving.is_busy:
            del self._groups[leaving.settings]
            leaving.engine = None
            if leaving.waiting:
                self._groups[leaving.settings] = leaving  # at the end
            leaving = self._leaving()
        for group in list(islice(self._groups.values(), MAX_ENGINES)):
            if group is not leaving and not self._closed:
                self._load_next(group)
            if group.can_step:
                self._step(group)

    def _load_next(self, group: Group) -> None:
        while group.waiting and len(group.loading) + len(group.loaded) < self._batch_size:
            request = next(iter(group.waiting))
            try:
                loading = self._pool.submit(self._load, request)
            except RuntimeError as error:  # the interpreter is ending
                self._end(request, error)
            else:
                group.loading[request] = loading
                del group.waiting[request]
                self._places.give()

    def _leaving(self) -> Group | None:
        """Where there are too many: the group that makes room for the next, the first unless one has nothing to do."""
        if len(self._groups) <= MAX_ENGINES:
            return None
        groups = list(islice(self._groups.values(), MAX_ENGINES))
        return next((group for group in groups if not group.requests), groups[0])

    def _step(self, group: Group) -> None:
        """Put requests into a group's engine and take a step."""
        try:
            if group.engine is None:
                ocr = self._ocr
                table = torch.from_numpy(ocr.images.table)
                count_pads = ocr.model.config.generation.use_cache
                group.engine = Engine(ocr.model, group.settings, self._batch_size, count_pads=count_pads, table=table)
            engine = group.engine
            if not group.suspects:
                while group.loaded and engine.scheduler.num_waiting < self._batch_size:
                    self._add(engine, next(iter(group.loaded)))
            elif engine.is_idle:
                self._add(engine, next(iter(group.suspects)))
            found = engine.step()
        except Exception as error:
            self._failed(group, error)
            return
        for line, hypotheses in found:
            request = group.lines.pop(line)
            request.line = None
            try:
                outcome: Line | Exception = self._ocr._line(request.path, hypotheses[0])
            except Exception as error:
                outcome = error
            self._end(request, outcome)
        for line, request in list(group.lines.items()):
            if request.on_text is not None:
                try:
                    self._tell(request, engine.so_far(line), request.on_text)
                except Exception as error:
                    self._end(request, error)

    def _add(self, engine: Engine, request: Request) -> None:
        assert request.pixels is not None
        sampling = request.settings.sampling
        seed = None if sampling is None else sampling.seed
        request.line = engine.add(request.pixels, request.settings.max_length, seed)
        request.group.lines[request.line] = request
        request.group.loaded.pop(request, None)

    def _tell(self, request: Request, tokens: list[int], on_text: OnText) -> None:
        # The end may be part of a character that takes several tokens.
        text = self._ocr.text.decode(tokens).rstrip("\N{REPLACEMENT CHARACTER}")
        if len(text) > len(request.text) and text.startswith(request.text):
            request.text = text
            on_text(text)

    def _failed(self, group: Group, error: Exception) -> None:
        """A step has failed, and its engine has forgotten all lines: only who fails alone is to blame."""
        requests = list(group.lines.values())
        group.engine = None
        group.lines.clear()
        for request in requests:
            request.line = None
        if len(requests) > 1:
            group.suspects.update(dict.fromkeys(requests))
            return
        # Not to keep with it all that the step had in its hands
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        clear_frames(error.__traceback__)
        for request in requests or [*group.suspects, *group.loaded]:  # there was no engine to be had
            self._end(request, error)

    def _end(self, request: Request, outcome: Line | BaseException | None) -> None:
        """End a request, wherever it is; None: it is cancelled."""
        if request.engine is None:  # it has ended before
            return
        group = request.group
        if request in group.waiting:
            del group.waiting[request]
            self._places.give()
        if (loading := group.loading.pop(request, None)) is not None:
            loading.cancel()
        group.loaded.pop(request, None)
        group.suspects.pop(request, None)
        if request.line is not None:
            assert group.engine is not None
            group.engine.cancel(request.line)
            del group.lines[request.line]
        request.engine = request.picture = request.pixels = request.on_text = request.line = None
        del request.group
        if outcome is None:
            request.cancel()
        if not request.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Line):
            request.set_result(outcome)
        else:
            request.set_exception(outcome)

    def _end_all(self, outcome: BaseException | None) -> None:
        for group in self._groups.values():
            group.engine = None
            for request in group.requests:
                request.line = None
                self._end(request, outcome)
        self._groups.clear()


def _text_of(line: Line) -> str:
    if line.text is None:
        raise PictureError(line.error)
    return line.text


def _work(engine: "weakref.ref[AsyncEngine]", inbox: Inbox) -> None:
    """The worker thread."""
    while _serve(engine, inbox):
        pass


def _serve(reference: "weakref.ref[AsyncEngine]", inbox: Inbox) -> bool:
    # Holds the engine only once there is a message, and no longer than there is work: so it can be collected.
    message = inbox.get()
    engine = reference()
    return engine is not None and engine._serve(message)


def _end_worker(inbox: Inbox, worker: Thread) -> None:
    inbox.put(None)
    if worker is not current_thread():
        worker.join()
