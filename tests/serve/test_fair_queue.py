"""The line before the engine: bounded, fair, and never leaking a place."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.serve.errors import ApiError
from shoestring.serve.fair_queue import FairQueue


def line(running: int = 2, queue: int = 100, tokens: int = 1000) -> FairQueue:
    return FairQueue(max_running=running, max_queue=queue, max_queue_tokens=tokens)


def alone(test):
    """Run an async test in a loop of its own."""

    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


def enter(found: FairQueue, key: str, weight: int = 1, tokens: int = 1):
    return found.enter(key, weight=weight, tokens=tokens)


@alone
async def test_one_client_does_not_block_the_others():
    found = line(running=1)
    first = enter(found, "a")
    greedy = [enter(found, "a") for _ in range(5)]
    modest = enter(found, "b")
    first.leave()
    greedy[0].leave()
    assert modest.running and not greedy[1].running


@alone
async def test_bounds():
    found = line(running=1, queue=2, tokens=10)
    enter(found, "a")
    enter(found, "a", tokens=4)
    with pytest.raises(ApiError) as error:
        enter(found, "b", tokens=7)
    assert error.value.status == 503 and error.value.retry_after >= 1
    enter(found, "b", tokens=6)
    with pytest.raises(ApiError):
        enter(found, "c", tokens=0)


@alone
async def test_a_call_larger_than_the_limit_runs_alone():
    found = line(running=2)
    large = enter(found, "a", weight=5)
    assert large.running
    small = enter(found, "a")
    assert not small.running
    large.leave()
    assert small.running and found.running == 1


@alone
async def test_closing_sends_everybody_away():
    found = line(running=1)
    running, waiting = enter(found, "a"), enter(found, "b")
    found.close(ApiError(503, "closing"))
    with pytest.raises(ApiError):
        await waiting.turned(1)
    waiting.leave()
    running.leave()
    assert (found.running, found.waiting, found.waiting_tokens) == (0, 0, 0)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.integers(0, 5)), max_size=40), st.randoms())
def test_nothing_leaks(calls, random):
    async def play() -> None:
        found = line(running=3, queue=10, tokens=50)
        places = []
        for key, weight, tokens in calls:
            with contextlib.suppress(ApiError):
                places.append(enter(found, key, weight, tokens))
            assert found.running == sum(p.weight for p in places if p.running and not p.left)
            assert found.running <= 3 or sum(p.running and not p.left for p in places) == 1
            if places and random.random() < 0.5:
                random.choice(places).leave()
        for place in random.sample(places, len(places)):
            place.leave()
            place.leave()
        assert (found.running, found.waiting, found.waiting_tokens) == (0, 0, 0)

    asyncio.run(play())
