"""Who goes to the engine next: a bounded number of answers at once, and keys in turn.

First come, first served would let one client with a thousand requests keep everybody else waiting; here each key has
a line of its own and the lines are served in rotation. The lines are bounded in requests and in tokens: what does not
fit is refused at once (503 with Retry-After from the measured pace), and so is what waited too long.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque

from shoestring.serve.errors import ApiError

PACE = 32  # departures that the estimate of the wait looks back on


class Place:
    """One call's place: `wait` for the turn, `leave` when done. Leaving twice is harmless."""

    def __init__(self, line: FairQueue, key: str, weight: int, tokens: int) -> None:
        self._line = line
        self.key = key
        self.weight = weight  # answers it occupies
        self.tokens = tokens
        self.entered = time.monotonic()
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.running = False
        self.left = False

    async def turned(self, seconds: float) -> bool:
        """Whether it is this call's turn, within `seconds`. Raises ApiError when the line was closed."""
        await asyncio.wait((self.turn,), timeout=seconds)
        if self.turn.done():
            self.turn.result()
        return self.turn.done()

    def pace(self) -> float:
        """Seconds after which trying again makes sense."""
        return self._line.pace()

    def leave(self) -> None:
        if not self.left:
            self.left = True
            self._line._leave(self)


class FairQueue:
    """The line of one model. `max_running` answers run at once; a call with more choices than that runs alone."""

    def __init__(self, *, max_running: int, max_queue: int, max_queue_tokens: int) -> None:
        self._max_running = max_running
        self._max_queue = max_queue
        self._max_tokens = max_queue_tokens
        self._lines: OrderedDict[str, deque[Place]] = OrderedDict()
        self._departures: deque[float] = deque(maxlen=PACE)
        self.running = 0
        self.waiting = 0
        self.waiting_tokens = 0

    def enter(self, key: str, *, weight: int, tokens: int) -> Place:
        """Take a place. Raises ApiError 503 when the lines are full."""
        place = Place(self, key, weight, tokens)
        if self._fits(place) and not self.waiting:
            self._start(place)
            return place
        full = self.waiting >= self._max_queue or self.waiting_tokens + tokens > self._max_tokens
        if full:
            message = f"the server is full: {self.waiting} requests are waiting; try again later."
            raise ApiError(503, message, code="queue_full", retry_after=self.pace())
        self._lines.setdefault(key, deque()).append(place)
        self.waiting += 1
        self.waiting_tokens += tokens
        return place

    def pace(self) -> float:
        """Seconds until a place in the line is likely to be free, from how fast calls left lately."""
        if len(self._departures) < 2:
            return 1.0
        seconds = (time.monotonic() - self._departures[0]) / len(self._departures)
        return min(60.0, max(1.0, seconds * max(1, self.waiting // 4)))

    def _fits(self, place: Place) -> bool:
        return self.running == 0 or self.running + place.weight <= self._max_running

    def _start(self, place: Place) -> None:
        self.running += place.weight
        place.running = True
        place.turn.set_result(None)

    def _leave(self, place: Place) -> None:
        if place.running:
            self.running -= place.weight
            self._departures.append(time.monotonic())
        elif not place.turn.done():
            self._lines[place.key].remove(place)
            self._forget(place)
        self._advance()

    def close(self, error: ApiError) -> None:
        """Send away whoever waits."""
        for line in list(self._lines.values()):
            for place in list(line):
                line.remove(place)
                self._forget(place)
                place.turn.set_exception(error)

    def _forget(self, place: Place) -> None:
        self.waiting -= 1
        self.waiting_tokens -= place.tokens
        if not self._lines.get(place.key, True):
            del self._lines[place.key]

    def _advance(self) -> None:
        """Let those in whose turn it is: one of each key, then round again."""
        while self._lines:
            key, line = next(iter(self._lines.items()))
            if not self._fits(line[0]):
                return
            place = line.popleft()
            self._lines.move_to_end(key)
            self._forget(place)
            self._start(place)
