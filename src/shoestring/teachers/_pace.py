"""How fast to ask: as many at once as the teacher bears (AIMD), never faster than the limits it states.

Additive increase, multiplicative decrease: one more request at a time for each that succeeds until the first setback,
then one more for each round of them; three quarters of it after a 429, a 5xx or answers four times slower than usual,
at most once for the requests that were under way together. `Retry-After` and exhausted rate-limit headers stop all
sending for as long as they say. Only a monotonic clock is used: a clock that is set back or forth changes nothing.
Source: Chiu and Jain 1989; the constants are those of tools in the field (docs/asking.md).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import isfinite

START = 16  # requests at once to begin with
CUT = 0.75
SLOWER = 4.0  # times the usual seconds an output token, and
NEVER_SLOW_S = 1.0  # a request faster than this is not slow
DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d*)?)s)?(?:(\d+(?:\.\d*)?)ms)?", re.ASCII)


class Pace:
    """Admits requests. `most` at once at most; `rpm` requests and `tpm` tokens a minute, 0 for no limit.

    One event loop only. `clock`: monotonic seconds (tests bring their own).
    """

    def __init__(
        self, most: int, *, rpm: float = 0, tpm: float = 0, start: int = START,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.most, self.rpm, self.tpm = most, rpm, tpm
        self.limit = float(min(most, start))
        self.in_flight = 0
        self.cuts = 0
        self._clock = clock
        self._slow_start = True
        self._last_cut = -1.0
        self._until = 0.0  # nothing is sent before
        self._next_request = self._next_token = 0.0  # the limits' virtual clocks (GCRA)
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._usual: float | None = None  # the least mean seconds an output token so far
        self._window: list[tuple[float, float]] = []

    def try_enter(self, tokens: int) -> bool:
        """Take a place now if there is one."""
        if self.in_flight >= self.limit or (self._until and self._delay() > 0):
            return False
        if (self.rpm or self.tpm) and not self._debit(tokens):
            return False
        self.in_flight += 1
        return True

    async def enter(self, tokens: int) -> None:
        """Wait for a place and take it."""
        while not self.try_enter(tokens):
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            delay = self._delay()
            timer = asyncio.get_running_loop().call_later(delay, self._wake_one) if delay > 0 else None
            try:
                await future
            finally:
                if timer is not None:
                    timer.cancel()

    def leave(self) -> None:
        """Free a place."""
        self.in_flight -= 1
        self._wake()

    def succeeded(self, started: float, tokens_out: int) -> None:
        """An answer came to a request sent at `started`."""
        if self.limit < self.most:
            self.limit = min(float(self.most), self.limit + (1.0 if self._slow_start else 1.0 / self.limit))
        self._watch(started, tokens_out)

    def pushed_back(self, started: float) -> None:
        """A 429, a 5xx or a slow answer to a request sent at `started`: go slower, once for all of that time."""
        if started >= self._last_cut:
            self._last_cut = self._clock()
            self.limit = max(1.0, self.limit * CUT)
            self._slow_start = False
            self.cuts += 1

    def pause(self, seconds: float) -> None:
        """Send nothing for so long."""
        self._until = max(self._until, self._clock() + seconds)

    def heed(self, headers: Mapping[str, str]) -> None:
        """Stop until the reset when the headers say that nothing remains of a limit."""
        for what in ("requests", "tokens"):
            if headers.get(f"x-ratelimit-remaining-{what}") == "0":
                self.pause(seconds_of(headers.get(f"x-ratelimit-reset-{what}")) or 1.0)

    def release_all(self) -> None:
        """Let everyone who waits go: the job is over."""
        self.most = self.limit = 1 << 30
        self.rpm = self.tpm = self._until = 0
        while self._waiting:
            self._wake_one()

    def now(self) -> float:
        return self._clock()

    def _delay(self) -> float:
        """Seconds until the clock lets a request through; 0 when it does, or when only a place is missing."""
        now = self._clock()
        if self._until and now >= self._until:
            self._until = 0.0
        wait = self._until - now if self._until else 0.0
        if self.rpm:
            wait = max(wait, self._next_request - now)
        if self.tpm:
            wait = max(wait, self._next_token - now)
        return max(0.0, wait)

    def _debit(self, tokens: int) -> bool:
        if self._delay() > 0:
            return False
        now = self._clock()
        if self.rpm:
            self._next_request = max(now, self._next_request) + 60 / self.rpm
        if self.tpm:
            self._next_token = max(now, self._next_token) + tokens * 60 / self.tpm
        return True

    def _wake(self) -> None:
        for _ in range(min(len(self._waiting), max(0, int(self.limit) - self.in_flight))):
            self._wake_one()

    def _wake_one(self) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                return

    def _watch(self, started: float, tokens_out: int) -> None:
        """Means over as many answers as are in flight at once: is it much slower than it was at its best?"""
        seconds = self._clock() - started
        self._window.append((seconds, max(1, tokens_out)))
        if len(self._window) < max(8, self.limit):
            return
        whole, tokens = (sum(part) for part in zip(*self._window, strict=True))
        mean, per_token = whole / len(self._window), whole / tokens
        self._window.clear()
        self._usual = per_token if self._usual is None else min(self._usual, per_token)
        if mean > NEVER_SLOW_S and per_token > SLOWER * self._usual:
            self.pushed_back(started)


def seconds_of(text: str | None, date: str | None = None) -> float | None:
    """Seconds in a header: "2", "1.5", "6m0s", "20ms", or an HTTP date, counted from the reply's own `date` so that
    a clock that is wrong here does no harm; None when it says nothing."""
    if not text:
        return None
    text = text.strip()
    try:
        seconds = float(text)
        return max(0.0, seconds) if isfinite(seconds) else None
    except ValueError:
        pass
    match = DURATION.fullmatch(text)
    if match and any(match.groups()):
        hours, minutes, seconds, millis = (float(part or 0) for part in match.groups())
        return 3600 * hours + 60 * minutes + seconds + millis / 1000
    try:
        when = parsedate_to_datetime(text)
        now = parsedate_to_datetime(date) if date else datetime.now(when.tzinfo or UTC)
        return max(0.0, (when - now).total_seconds())
    except (ValueError, TypeError):
        return None
