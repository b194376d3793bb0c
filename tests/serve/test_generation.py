"""The engine's events of one call as batches: nothing lost, not too often, and signs of life."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import pytest

from shoestring.core.nouns import Event, Sampling
from shoestring.serve import generation as generations
from shoestring.serve.alarm import Alarm
from shoestring.serve.engine_client import EngineClient, Stream
from shoestring.serve.engine_process import EngineSpec, _obey
from shoestring.serve.errors import ApiError
from shoestring.serve.generation import CROWD, JOIN_SECONDS, Generation, Part, Tally


class Loop(asyncio.SelectorEventLoop):
    """Time goes by where everybody sleeps, and nowhere else: a busy machine changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.now, look = 1000.0, self._selector.select

        def select(seconds: float | None) -> Any:
            assert seconds is not None, "everybody waits for somebody else"
            self.now += seconds
            return look(0)

        self._selector.select = select  # type: ignore[method-assign]

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    """A loop with a clock of its own, which what is tested reads too."""
    found = Loop()
    monkeypatch.setattr(generations, "time", found)
    return found


def run(loop: Loop, work: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(work)


class Engine:
    """Keeps what is submitted; the test says what comes of it."""

    def __init__(self, in_flight: int) -> None:
        self.in_flight = in_flight
        self.ended: list[str] = []

    def submit(self, stream: Stream, part: int, request_id: str, *_: Any) -> None:
        self.stream, self.part, self.id = stream, part, request_id

    def say(self, place: int, *, last: bool = False) -> None:
        event = Event(self.id, 0, [place], "", [0.0], finish_reason="length" if last else None, cached_tokens=3)
        self.stream.put(self.part, event)

    def cancel(self, request_id: str) -> None:
        self.ended.append(f"cancelled {request_id}")

    def done(self, request_id: str) -> None:
        self.ended.append(f"done {request_id}")


class Place:
    """A place in a line in which nobody waits."""

    entered = 0.0
    left = False

    async def turned(self, seconds: float) -> bool:
        return True

    def leave(self) -> None:
        self.left = True


def generation(engine: Engine, place: Place, **seconds: float) -> Generation:
    times = {"queue_seconds": 5.0, "request_seconds": 5.0, "beat": 5.0} | seconds
    part, tally = Part([1, 2, 3], Sampling()), Tally(began=generations.time.monotonic())
    return Generation(engine, place, [part], tally, request_id="r", salt="", **times)  # type: ignore[arg-type]


async def heard(found: Generation, say: Callable[[], Any]) -> list[tuple[float, list[int]]]:
    """(when, token ids) of each batch, while `say` runs."""
    speaking, batches = asyncio.ensure_future(say()), []
    async for batch in found.batches():
        batches.append((generations.time.monotonic(), [token for _, event in batch for token in event.token_ids]))
    await speaking
    return batches


@pytest.mark.parametrize("crowded", [False, True])
def test_tokens_are_joined_in_a_crowd_and_none_is_lost(loop: Loop, crowded: bool):
    engine, place = Engine(CROWD + 1 if crowded else 1), Place()

    async def say() -> None:
        for number in range(40):
            await asyncio.sleep(JOIN_SECONDS / 8)
            engine.say(number, last=number == 39)

    found = generation(engine, place)
    batches = run(loop, heard(found, say))
    assert [token for _, tokens in batches for token in tokens] == list(range(40))
    times = [when for when, _ in batches]
    if crowded:
        assert len(batches[0][1]) == 1 and len(batches) <= 40 / 3  # the first one waits for nobody
        assert all(b - a >= 0.9 * JOIN_SECONDS for a, b in pairwise(times))
    else:
        assert len(batches) == 40
    assert (found.tally.completion, found.tally.cached, found.tally.prompt) == (40, 3, 3)
    assert engine.ended == ["done r-0"] and place.left


def test_an_engine_slower_than_that_is_not_waited_for(loop: Loop):
    """Each token is given on at once: joining costs no time where there is nothing to join."""
    engine, late = Engine(CROWD + 1), []

    async def say() -> None:
        for number in range(5):
            await asyncio.sleep(2 * JOIN_SECONDS)
            late.append(loop.time())
            engine.say(number, last=number == 4)

    batches = run(loop, heard(generation(engine, Place()), say))
    assert [tokens for _, tokens in batches] == [[0], [1], [2], [3], [4]]
    assert [when for when, _ in batches] == late


def test_signs_of_life(loop: Loop):
    engine = Engine(1)

    async def say() -> None:
        await asyncio.sleep(0.35)
        engine.say(0, last=True)

    batches = run(loop, heard(generation(engine, Place(), beat=0.1), say))
    assert [tokens for _, tokens in batches] == [[], [], [], [0]]


def test_an_error_comes_after_what_was_said():
    engine = Engine(1)

    async def until_it_fails() -> list[int]:
        found, tokens = generation(engine, Place()).batches(), []
        first = asyncio.ensure_future(anext(found))
        await asyncio.sleep(0)
        engine.say(7)
        engine.stream.fail(ApiError(503, "gone"))
        engine.stream.fail(ApiError(500, "again"))
        tokens += [token for _, event in await first for token in event.token_ids]
        with pytest.raises(ApiError, match="gone"):
            await anext(found)
        return tokens

    assert asyncio.run(until_it_fails()) == [7]
    assert engine.ended == ["cancelled r-0"]


def test_too_long_a_call(loop: Loop):
    engine = Engine(1)

    async def say() -> None:
        for number in range(100):
            await asyncio.sleep(0.02)
            engine.say(number)

    async def until_it_is_cut() -> None:
        speaking = asyncio.ensure_future(say())
        with pytest.raises(ApiError, match="took longer than"):
            await heard(generation(engine, Place(), request_seconds=0.1), _nothing)
        speaking.cancel()

    run(loop, until_it_is_cut())
    assert loop.now == pytest.approx(1000.12, abs=0.03)  # at the first token after it
    assert engine.ended == ["cancelled r-0"]


async def _nothing() -> None:
    pass


def test_an_alarm_rings_only_when_it_is_let_alone(loop: Loop):
    rings: list[float] = []

    async def touched_and_let_alone() -> tuple[int, int, int]:
        alarm = Alarm(0.1, lambda: rings.append(loop.time()))
        for _ in range(10):
            await asyncio.sleep(0.03)
            alarm.touch()
        while_touched = len(rings)
        await asyncio.sleep(0.25)
        alone = len(rings)
        alarm.stop()
        await asyncio.sleep(0.15)
        return while_touched, alone, len(rings)

    assert run(loop, touched_and_let_alone()) == (0, 2, 2)
    assert [ring - 1000.3 for ring in rings] == pytest.approx([0.1, 0.2])


def test_a_request_that_the_engine_cannot_take_is_no_reason_to_end_the_others():
    """A fault of ours in taking one request: told to that one, with its traceback for the log; the process goes on."""

    class Engine:
        def add(self, *_: Any, **__: Any) -> None:
            raise ValueError("an id out of range")

    ours, theirs = multiprocessing.Pipe()
    assert _obey(Engine(), theirs, ("add", "r", [1], None, ""))
    kind, name, words = ours.recv()
    assert (kind, name) == ("broken", "r") and "an id out of range" in words

    async def heard() -> None:
        client = EngineClient(EngineSpec("tiny", ""))
        stream = Stream(10.0)
        client._streams["r"] = (stream, 0)
        client._hear((kind, name, words), client._generation)
        with pytest.raises(ApiError) as caught:
            await stream.take()
        assert caught.value.status == 500 and "an id out of range" not in caught.value.message and not client.in_flight

    asyncio.run(heard())
