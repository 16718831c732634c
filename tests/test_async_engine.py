"""Requests that come at any time get what `read` gives, and end exactly once."""

import asyncio
import dataclasses
import gc
import itertools
import random
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any, ClassVar

import pytest

from trocr_fast import Line, PictureError, TrOCR, async_engine
from trocr_fast.async_engine import MAX_ENGINES, AsyncEngine
from trocr_fast.engine import Engine
from trocr_fast.errors import UsageError
from trocr_fast.places import Places
from trocr_fast.search import SearchSettings

ROOT = Path(__file__).parent.parent
SAMPLES = sorted(path for path in (ROOT / "examples" / "lines").iterdir() if path.suffix != ".txt")
SAFETY = 60  # seconds after which a test that hangs fails
SHORT: dict[str, Any] = {"max_new_tokens": 4}


class CheckedEngine(Engine):
    """An engine that is checked after every step."""

    made: ClassVar[list["CheckedEngine"]]
    late = False  # True: as on a GPU

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, late=self.late, **options)
        self.made.append(self)

    def step(self) -> Any:
        found = super().step()
        self.check_integrity()
        return found


class Watched(AsyncEngine):
    """Remembers how many requests waited, and how many engines there were, at most."""

    most_waiting = most_engines = 0

    def _turn(self) -> None:
        self.most_waiting = max(self.most_waiting, sum(len(group.waiting) for group in self._groups.values()))
        super()._turn()
        engines = sum(group.engine is not None for group in self._groups.values())
        self.most_engines = max(self.most_engines, engines)


class Gate:
    """An `on_text` that holds the worker thread, while the request is running, until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open = Event(), Event()
        self.texts: list[str] = []

    def __call__(self, text: str) -> None:
        self.texts.append(text)
        self.reached.set()
        assert self.open.wait(SAFETY)


Start = Callable[..., Watched]


@pytest.fixture(scope="module")
def ocr() -> TrOCR:
    return TrOCR.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def expected(ocr: TrOCR) -> dict[Path, Line]:
    return dict(zip(SAMPLES, ocr.read(SAMPLES), strict=True))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[CheckedEngine]:
    """The engines that were made; all are checked."""
    monkeypatch.setattr(async_engine, "Engine", CheckedEngine)
    monkeypatch.setattr(CheckedEngine, "made", [], raising=False)
    return CheckedEngine.made


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With either way in which the host learns of a step."""
    monkeypatch.setattr(CheckedEngine, "late", request.param)


@pytest.fixture
def greedy(ocr: TrOCR) -> SearchSettings:
    return ocr.search_settings()


@pytest.fixture
def start(ocr: TrOCR, made: list[CheckedEngine]) -> Iterator[Start]:
    """Makes engines, which are closed in the end."""
    started: list[Watched] = []

    def start(**options: Any) -> Watched:
        started.append(Watched(ocr, **options))
        return started[-1]

    yield start
    for engine in started:
        engine.close()
        assert not engine._worker.is_alive()


def assert_nothing_is_left(engine: AsyncEngine, made: list[CheckedEngine]) -> None:
    """To be called when all requests have ended."""
    settings = engine._ocr.search_settings(**SHORT)
    engine.submit(SAMPLES[0], settings).result(SAFETY)  # all messages before it have been worked off
    engine.close()
    assert all(checked.is_idle for checked in made)
    assert engine._places._free == 1024


def test_four_threads_get_what_read_gives(
    start: Start, greedy: SearchSettings, expected: dict[Path, Line], made: list[CheckedEngine]
) -> None:
    engine = start(batch_size=3)

    def read_all(seed: int) -> list[tuple[Path, Line]]:
        order = random.Random(seed).sample(SAMPLES, 5 if seed else len(SAMPLES))
        requests = [(path, engine.submit(path, greedy)) for path in order]
        return [(path, request.result(SAFETY)) for path, request in requests]

    with ThreadPoolExecutor(4) as pool:
        for rows in pool.map(read_all, range(4)):
            for path, line in rows:
                whole = expected[path]
                assert (line.path, line.text, line.token_ids) == (str(path), whole.text, whole.token_ids)
                assert line.confidence == pytest.approx(whole.confidence, rel=1e-4)
    assert len(made) == 1
    assert_nothing_is_left(engine, made)


@pytest.mark.usefixtures("late")
def test_cancelling(
    start: Start, greedy: SearchSettings, expected: dict[Path, Line], made: list[CheckedEngine]
) -> None:
    engine, gate = start(batch_size=1), Gate()
    running = engine.submit(SAMPLES[0], greedy, gate)
    assert gate.reached.wait(SAFETY)
    loading, waiting = (engine.submit(path, greedy) for path in SAMPLES[1:3])
    after = engine.submit(SAMPLES[3], greedy)
    called: list[Future[Line]] = []
    for request in (waiting, loading, running):
        request.add_done_callback(called.append)
        assert request.cancel() and request.cancel() and request.cancelled()
    gate.open.set()
    assert after.result(SAFETY).text == expected[SAMPLES[3]].text
    assert called == [waiting, loading, running]
    assert wait(called, SAFETY).not_done == set()  # those who wait are told as well
    with pytest.raises(CancelledError):
        running.result()
    assert len(gate.texts) == 1  # it took no step more, else it would hold the only lane
    assert not after.cancel() and after.result().text == expected[SAMPLES[3]].text
    assert_nothing_is_left(engine, made)


def test_bad_pictures_are_lines_with_an_error(start: Start, greedy: SearchSettings, expected: dict[Path, Line]) -> None:
    engine = start(batch_size=2)
    pictures = [b"", SAMPLES[0], "no/such/file.png", object(), SAMPLES[1]]
    lines = [engine.submit(picture, greedy) for picture in pictures]
    found = [request.result(SAFETY) for request in lines]
    assert [line.error is None for line in found] == [False, True, False, False, True]
    assert found[2].path == "no/such/file.png" and found[2].text is None
    assert [found[1].text, found[4].text] == [expected[path].text for path in SAMPLES[:2]]
    assert engine.submit(SAMPLES[0].read_bytes(), greedy).result(SAFETY).path is None


def test_only_who_fails_alone_is_to_blame(ocr: TrOCR, start: Start, made: list[CheckedEngine]) -> None:
    """A line that outgrows the position table makes the whole step fail."""
    endless = replace(ocr.search_settings(), end_tokens=())
    reach = ocr.model.config.decoder.max_position_embeddings + 1
    healthy = [replace(endless, max_length=reach - 9 * number) for number in range(5)]
    engine = start()
    alone = [engine.submit(path, settings) for path, settings in zip(SAMPLES, healthy, strict=False)]
    rows = [request.result(SAFETY).token_ids for request in alone]
    made.clear()
    engine = start(batch_size=3)
    texts: list[str] = []
    guilty = engine.submit(SAMPLES[9], replace(endless, max_length=reach + 1))
    requests = [engine.submit(SAMPLES[0], healthy[0], texts.append)]
    requests += [engine.submit(path, settings) for path, settings in zip(SAMPLES[1:], healthy[1:], strict=False)]
    with pytest.raises(ValueError, match=r"at most \d+ tokens"):
        guilty.result(SAFETY)
    found = [request.result(SAFETY) for request in requests]
    assert [line.token_ids for line in found] == rows
    assert all(line.truncated for line in found)
    assert len(made) > 1  # whoever was in the failed step came into a fresh batch
    assert texts == sorted(set(texts), key=len) and found[0].text.startswith(texts[-1])  # nothing twice, nothing back
    assert len(texts) > 20
    assert_nothing_is_left(engine, made)
    failed = weakref.ref(made[0])
    made.clear()
    gc.collect()
    assert failed() is None and guilty.exception().__traceback__  # to keep the error is not to keep the engine


def test_an_engine_that_cannot_be_made_fails_its_own_requests(
    ocr: TrOCR, start: Start, greedy: SearchSettings, expected: dict[Path, Line]
) -> None:
    engine = start()
    too_large = [engine.submit(path, replace(greedy, num_beams=10**13)) for path in SAMPLES[:2]]
    fine = engine.submit(SAMPLES[0], greedy)
    assert all(isinstance(request.exception(SAFETY), Exception) for request in too_large)
    assert fine.result(SAFETY).text == expected[SAMPLES[0]].text


@pytest.mark.usefixtures("late")
def test_what_a_callback_raises_touches_no_other_request(
    start: Start, greedy: SearchSettings, expected: dict[Path, Line], made: list[CheckedEngine]
) -> None:
    engine = start(batch_size=2)

    def fail(text: object) -> None:
        raise ZeroDivisionError(text)

    failing, fine = engine.submit(SAMPLES[0], greedy, fail), engine.submit(SAMPLES[1], greedy)
    with pytest.raises(ZeroDivisionError, match=expected[SAMPLES[0]].text[0]):
        failing.result(SAFETY)
    fine.add_done_callback(fail)  # is logged, as of any future
    assert fine.result(SAFETY).text == expected[SAMPLES[1]].text
    assert_nothing_is_left(engine, made)


def test_requests_that_differ_in_limit_and_seed_share_an_engine(
    ocr: TrOCR, start: Start, expected: dict[Path, Line], made: list[CheckedEngine]
) -> None:
    engine = start()
    requests = [engine.submit(path, ocr.search_settings(max_new_tokens=n)) for n, path in enumerate(SAMPLES, start=1)]
    for number, (path, request) in enumerate(zip(SAMPLES, requests, strict=True), start=1):
        assert request.result(SAFETY).token_ids == expected[path].token_ids[: number + 1]
    assert len(made) == 1

    def draw(seed: int) -> Future[Line]:
        settings = ocr.search_settings(do_sample=True, temperature=4.0, max_new_tokens=12, seed=seed)
        return engine.submit(SAMPLES[1], settings)

    first, second = ([draw(seed) for seed in seeds] for seeds in (range(8), reversed(range(8))))
    texts = [request.result(SAFETY).text for request in first]
    assert len(set(texts)) > 4
    assert [request.result(SAFETY).text for request in second] == texts[::-1]
    assert len(made) == 2


def test_more_searches_than_engines(ocr: TrOCR, start: Start, made: list[CheckedEngine]) -> None:
    engine = start(batch_size=2)
    searches = [SHORT, *({**SHORT, "num_beams": 2, "length_penalty": float(n)} for n in range(MAX_ENGINES + 2))]
    requests = [
        (search, path, engine.submit(path, ocr.search_settings(**search)))
        for path in SAMPLES[:6]
        for search in searches
    ]
    found = {(str(search), path): request.result(SAFETY).token_ids for search, path, request in requests}
    for search in searches:
        assert [found[str(search), path] for path in SAMPLES[:6]] == [
            line.token_ids for line in ocr.read(SAMPLES[:6], **search)
        ]
    assert engine.most_engines == MAX_ENGINES
    assert_nothing_is_left(engine, made)


def test_no_more_wait_than_may(ocr: TrOCR, start: Start) -> None:
    engine, settings = start(batch_size=2, max_waiting=3), ocr.search_settings(**SHORT)

    def submit(number: int) -> Line:
        return engine.submit(SAMPLES[number], settings).result(SAFETY)

    with ThreadPoolExecutor(12) as pool:
        assert all(line.text for line in pool.map(submit, range(36)))
    assert 0 < engine.most_waiting <= 3


def test_submit_waits_for_room(start: Start, greedy: SearchSettings, expected: dict[Path, Line]) -> None:
    engine, gate = start(batch_size=1, max_waiting=1), Gate()
    engine.submit(SAMPLES[0], greedy, gate)
    assert gate.reached.wait(SAFETY)
    waiting = engine.submit(SAMPLES[1], greedy)
    place = engine._places.take()
    assert not place.done()
    engine._places.give_up(place)

    async def main() -> str | None:
        """The loop is not held up: it opens the gate while a task of it waits for room."""
        given_up = asyncio.create_task(engine.submit_async(SAMPLES[3], greedy))
        reading = asyncio.create_task(engine.submit_async(SAMPLES[2], greedy))
        await asyncio.sleep(0)
        given_up.cancel()
        gate.open.set()
        return (await reading).text

    assert asyncio.run(main()) == expected[SAMPLES[2]].text
    assert waiting.result(SAFETY).text == expected[SAMPLES[1]].text
    assert engine.submit(SAMPLES[3], greedy).result(SAFETY).text == expected[SAMPLES[3]].text
    assert engine._places._free == 1


def test_a_callback_may_submit(start: Start, greedy: SearchSettings, expected: dict[Path, Line]) -> None:
    engine = start(batch_size=1, max_waiting=1)
    chained: list[Future[Line]] = []
    submitted = Event()

    def submit_more(_: object) -> None:
        chained.extend(engine.submit(path, greedy) for path in SAMPLES[1:4])
        submitted.set()

    engine.submit(SAMPLES[0], greedy).add_done_callback(submit_more)
    assert submitted.wait(SAFETY)
    assert [one.result(SAFETY).text for one in chained] == [expected[path].text for path in SAMPLES[1:4]]


def test_places() -> None:
    places = Places(2)
    first, second, third, fourth = (places.take() for _ in range(4))
    assert first.done() and second.done() and not third.done()
    places.give_up(third)
    places.give_up(first)  # which had come
    assert fourth.done()
    places.take_at_once()
    places.give()
    late = places.take()
    assert not late.done()
    places.give()
    assert late.done()
    waiting = places.take()
    places.close()
    for place in (waiting, places.take()):
        with pytest.raises(RuntimeError, match="closed"):
            place.result(0)


def test_streams_grow_to_the_whole_text(ocr: TrOCR, expected: dict[Path, Line]) -> None:
    for path in SAMPLES[::8]:
        texts = list(ocr.stream(path))
        assert all(after.startswith(before) and after != before for before, after in itertools.pairwise(texts))
        assert texts[-1] == expected[path].text
        assert len(texts) > len(texts[-1]) / 2

    async def read(path: Path) -> list[str]:
        return [text async for text in ocr.stream_async(path)]

    async def main() -> list[list[str]]:
        return await asyncio.gather(*map(read, SAMPLES[::8]))

    assert asyncio.run(main()) == [list(ocr.stream(path)) for path in SAMPLES[::8]]
    (line,) = ocr.read(SAMPLES[:1], num_beams=3)
    assert list(ocr.stream(SAMPLES[0], num_beams=3))[-1] == line.text
    assert list(ocr.stream(SAMPLES[0], max_new_tokens=1)) == [expected[SAMPLES[0]].text[:1]]


@pytest.mark.usefixtures("late")
def test_streams_raise_and_cancel(
    ocr: TrOCR, start: Start, greedy: SearchSettings, made: list[CheckedEngine], expected: dict[Path, Line]
) -> None:
    with pytest.raises(PictureError, match="got 0 bytes"):
        list(ocr.stream(b""))
    with pytest.raises(UsageError, match="max_new_tokens"):
        ocr.stream(SAMPLES[0], max_new_tokens=0)
    engine = start(batch_size=1)
    assert list(engine.stream(SAMPLES[0], greedy))[-1] == expected[SAMPLES[0]].text
    texts = engine.stream(SAMPLES[1], greedy)
    next(texts)
    texts.close()

    async def first() -> str:
        with pytest.raises(PictureError, match="got 0 bytes"):
            [text async for text in engine.stream_async(b"", greedy)]
        texts = engine.stream_async(SAMPLES[1], greedy)
        text = await anext(texts)
        await texts.aclose()
        return text

    assert asyncio.run(first())
    assert_nothing_is_left(engine, made)


def test_event_loops(
    ocr: TrOCR, start: Start, greedy: SearchSettings, expected: dict[Path, Line], made: list[CheckedEngine]
) -> None:
    engine, gate = start(batch_size=2), Gate()
    gate.open.set()

    async def main() -> list[Line]:
        cancelled = asyncio.create_task(engine.submit_async(SAMPLES[1], greedy, gate))
        others = [engine.submit_async(path, greedy) for path in SAMPLES[:10]]
        await asyncio.to_thread(gate.reached.wait, SAFETY)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        return await asyncio.gather(*others, ocr.submit_async(b""))

    *lines, bad = asyncio.run(main())
    assert [line.text for line in lines] == [expected[path].text for path in SAMPLES[:10]]
    assert bad.error
    assert_nothing_is_left(engine, made)
    assert len(gate.texts) < len(expected[SAMPLES[1]].text)  # else it was not cancelled while it ran


def test_closing_while_busy(start: Start, greedy: SearchSettings) -> None:
    engine, gate = start(batch_size=1, max_waiting=2), Gate()
    requests = [engine.submit(SAMPLES[1], greedy, gate)]
    assert gate.reached.wait(SAFETY)
    requests += [engine.submit(path, greedy) for path in SAMPLES[:2]]
    late: list[BaseException] = []
    place = engine._places.take()

    def submit() -> None:
        try:
            engine.submit(SAMPLES[0], greedy)
        except RuntimeError as error:
            late.append(error)

    submitting, closing = Thread(target=submit), Thread(target=engine.close)
    submitting.start()
    closing.start()
    with pytest.raises(RuntimeError, match="closed"):
        place.result(SAFETY)  # now it is closing
    while engine._inbox.qsize() < 3:  # two requests and the message to end; the worker is held
        assert closing.is_alive()
    gate.open.set()
    for thread in (submitting, closing):
        thread.join(SAFETY)
    assert not engine._worker.is_alive() and len(late) == 1
    assert all(request.cancelled() for request in requests)
    assert wait(requests, SAFETY).not_done == set()
    with pytest.raises(RuntimeError, match="expected an open engine"):
        engine.submit(SAMPLES[0], greedy)
    engine.close()


def test_closing_in_a_callback(start: Start, greedy: SearchSettings) -> None:
    engine = start(batch_size=1)
    requests = [engine.submit(SAMPLES[0], greedy, lambda _: engine.close())]
    requests += [engine.submit(path, greedy) for path in SAMPLES[:3]]
    for request in requests:
        with pytest.raises(CancelledError):
            request.result(SAFETY)
    engine._worker.join(SAFETY)
    assert not engine._worker.is_alive()


def test_the_public_class_closes(expected: dict[Path, Line]) -> None:
    with TrOCR.from_pretrained(device="cpu") as ocr:
        assert ocr.submit(SAMPLES[0]).result(SAFETY) == next(ocr.read(SAMPLES[:1]))
        assert ocr._async_engine is not None
        worker = ocr._async_engine._worker
    assert not worker.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        ocr.submit(SAMPLES[0])
    assert next(ocr.read(SAMPLES[:1])).text == expected[SAMPLES[0]].text


def test_an_engine_that_nobody_holds_ends_its_requests_and_its_thread(
    ocr: TrOCR, greedy: SearchSettings, expected: dict[Path, Line]
) -> None:
    engine = AsyncEngine(ocr)
    worker, gate = engine._worker, Gate()
    requests = [engine.submit(SAMPLES[0], greedy, gate), engine.submit(SAMPLES[1], greedy)]
    assert gate.reached.wait(SAFETY)
    del engine
    gc.collect()
    gate.open.set()
    assert [request.result(SAFETY).text for request in requests] == [expected[path].text for path in SAMPLES[:2]]
    worker.join(SAFETY)
    assert not worker.is_alive()  # though the results are still held


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_waiting": 0}])
def test_unknown_counts(ocr: TrOCR, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))}: expected at least 1, got 0"):
        AsyncEngine(ocr, **options)


def test_an_interpreter_ends_while_requests_run(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, threading\n"
        "from trocr_fast import TrOCR\n"
        "ocr, running = TrOCR.from_pretrained(device='cpu'), threading.Event()\n"
        "requests = [ocr.submit(sys.argv[1], on_text=lambda _: running.set()) for _ in range(500)]\n"
        "assert running.wait(60)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    try:\n"
        "        ocr.submit(sys.argv[1])\n"
        "    except RuntimeError as error:\n"
        "        os._exit('forked' not in str(error))\n"
        "    os._exit(2)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "print(sum(not request.done() for request in requests))\n"
    )
    done = subprocess.run(
        [sys.executable, script, SAMPLES[1]], cwd=ROOT, capture_output=True, text=True, timeout=2 * SAFETY
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100  # had it waited for them all, the test would not know
    assert "Error" not in done.stderr and "terminate" not in done.stderr


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("seed", range(3))
def test_every_request_ends_exactly_once(ocr: TrOCR, start: Start, made: list[CheckedEngine], seed: int) -> None:
    """Whatever is submitted, cancelled and waited for, in two threads."""
    engine = start(batch_size=random.Random(seed).choice([1, 3, 8]))
    expected = {
        path: line.token_ids for path, line in zip(SAMPLES, ocr.read(SAMPLES[:12], max_new_tokens=8), strict=False)
    }

    def act(seed: int) -> list[tuple[Future[Line], Path | bytes, list[Future[Line]]]]:
        rng = random.Random(seed)
        sent: list[tuple[Future[Line], Path | bytes, list[Future[Line]]]] = []
        for _ in range(50):
            action = rng.random()
            if action < 0.6 or not sent:
                picture: Any = rng.choice([b"bad", *SAMPLES[:12]])
                num_beams = 2 if rng.random() < 0.2 else 1
                settings = ocr.search_settings(max_new_tokens=rng.randint(1, 8), num_beams=num_beams)
                ended: list[Future[Line]] = []
                request = engine.submit(picture, settings, rng.choice([None, len]))
                request.add_done_callback(ended.append)
                sent.append((request, picture if num_beams == 1 else b"", ended))
            elif action < 0.9:
                rng.choice(sent[-6:])[0].cancel()
            else:
                wait([rng.choice(sent)[0]], SAFETY)
        return sent

    with ThreadPoolExecutor(2) as pool:
        sent = [one for rows in pool.map(act, [2 * seed, 2 * seed + 1]) for one in rows]
    assert wait([request for request, _, _ in sent], SAFETY).not_done == set()
    assert {request.cancelled() for request, _, _ in sent} == {True, False}
    for request, picture, _ in sent:
        if not request.cancelled():
            line = request.result()
            if picture in expected:
                assert line.token_ids == expected[picture][: len(line.token_ids)]
    assert_nothing_is_left(engine, made)
    assert all(ended == [request] for request, _, ended in sent)


def test_settings_that_cannot_be_hashed_take_no_place(start: Start, greedy: SearchSettings) -> None:
    engine = start(max_waiting=1)
    for _ in range(3):
        with pytest.raises(TypeError, match="unhashable"):
            engine.submit(SAMPLES[0], dataclasses.replace(greedy, end_tokens=[2]))
    assert engine.submit(SAMPLES[0], greedy).result(SAFETY).text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_breaks_tells_everybody(start: Start, greedy: SearchSettings) -> None:
    class Broken(BaseException):
        pass

    def broken(text: str) -> None:
        raise Broken

    engine, gate = start(batch_size=1), Gate()
    first = engine.submit(SAMPLES[0], greedy, gate)
    assert gate.reached.wait(SAFETY)
    others = [engine.submit(path, greedy, broken) for path in SAMPLES[:3]]  # in the inbox when it happens
    gate.open.set()
    assert first.result(SAFETY).text
    assert all(isinstance(request.exception(SAFETY), Broken) for request in others)
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(SAMPLES[0], greedy)
