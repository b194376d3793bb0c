"""One call's way through the engine: its place in the line, its requests, their events, and the end of all that.

A call is one or more parts (a completion request may hold many prompts), each with n samples; choice = part * n +
sample. Whatever ends the call early (the client is gone, a limit, an error) cancels what is still running, so that
the engine's memory is free by its next step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from shoestring.core.nouns import Event, Sampling
from shoestring.serve.engine_client import EngineClient, Stream
from shoestring.serve.errors import ApiError
from shoestring.serve.fair_queue import Place

CROWD = 8  # requests in the engine from which on
JOIN_SECONDS = 0.02  # a stream is told at most this often: fewer chunks, less work for each token


@dataclass(frozen=True, slots=True)
class Part:
    """One prompt of a call."""

    ids: list[int]
    sampling: Sampling


@dataclass(slots=True)
class Tally:
    """What a call has used so far, whatever became of it."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    began: float = field(default_factory=time.monotonic)
    started: float | None = None  # given to the engine
    first: float | None = None  # first token
    last: float | None = None
    gaps: list[float] = field(default_factory=list)  # seconds between tokens
    finish: dict[int, str] = field(default_factory=dict)  # by choice
    answers: list[int] = field(default_factory=list)  # lengths

    def note(self, tokens: int, now: float) -> None:
        """Tokens of one choice have come."""
        if self.first is None:
            self.first = now
        elif self.last is not None and tokens:
            self.gaps.append(now - self.last)
        self.last = now
        self.completion += tokens


class Generation:
    """The engine's events of one call."""

    def __init__(
        self, engine: EngineClient, place: Place, parts: list[Part], tally: Tally, *,
        request_id: str, salt: str, queue_seconds: float, request_seconds: float, beat: float,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._place = place
        self._parts = parts
        self._ids = [f"{request_id}-{index}" for index in range(len(parts))]
        self._salt = salt
        self._queue_seconds = queue_seconds
        self._seconds = request_seconds
        self._beat = min(beat, queue_seconds, request_seconds)
        self.tally = tally

    async def batches(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """Lists of (choice, event) as they come; several tokens of a choice may be in one list under load.

        An empty list is a sign of life, every `beat` seconds without news. Raises ApiError: 400 refused by the
        engine, 503 no engine or no turn, 504 too slow.
        """
        left = sum(part.sampling.n for part in self._parts)
        cached: dict[int, int] = {}
        stream = Stream(self._beat)
        told = 0.0
        try:
            while not await self._place.turned(self._beat):
                self._check_queue()
                yield []
            self.tally.started = time.monotonic()
            self.tally.prompt = sum(len(part.ids) for part in self._parts)
            for index, part in enumerate(self._parts):
                self._engine.submit(stream, index, self._ids[index], part.ids, part.sampling, self._salt)
            while left:
                found, now = await stream.take(), time.monotonic()
                if now < told + JOIN_SECONDS and self._engine.in_flight > CROWD:
                    await asyncio.sleep(told + JOIN_SECONDS - now)
                    found, now = found + stream.rest(), time.monotonic()
                told = now
                batch = []
                for index, event in found:
                    if event.error is not None:
                        raise ApiError(400, event.error.replace("sampling.", ""), code="invalid_value")
                    choice = index * self._parts[index].sampling.n + event.sample
                    self.tally.note(len(event.token_ids), now)
                    cached[index] = max(cached.get(index, 0), event.cached_tokens)
                    left -= event.finish_reason is not None
                    batch.append((choice, event))
                self.tally.cached = sum(cached.values())
                self._check_time(now)
                yield batch
        finally:
            stream.close()
            for request_id in self._ids:
                if left:
                    self._engine.cancel(request_id)
                else:
                    self._engine.done(request_id)
            self._place.leave()

    def _check_queue(self) -> None:
        now = time.monotonic()
        waited = now - self._place.entered
        if waited > self._queue_seconds:
            message = f"waited {waited:.0f} s in the queue without a turn; try again later."
            raise ApiError(503, message, code="queue_timeout", retry_after=self._place.pace())
        self._check_time(now)

    def _check_time(self, now: float) -> None:
        if now - self.tally.began > self._seconds:
            message = f"the request took longer than {self._seconds:g} s; ask for fewer tokens or try again later."
            raise ApiError(504, message, code="request_timeout", retry=False)
