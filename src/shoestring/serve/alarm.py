"""An alarm for what happens thousands of times a second and may one day not happen.

`asyncio.timeout` makes and cancels a timer each time: a tenth of what a streamed token costs the server. Here one timer
sleeps through; being touched is a note of the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Alarm:
    """Calls `ring` whenever `seconds` have gone by since the last touch, until it is stopped."""

    def __init__(self, seconds: float, ring: Callable[[], None]) -> None:
        self._seconds, self._ring = seconds, ring
        self._loop = asyncio.get_running_loop()
        self._touched = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._look)

    def touch(self) -> None:
        self._touched = self._loop.time()

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        left = self._touched + self._seconds - self._loop.time()
        if left <= 0:
            self.touch()
            self._ring()
        self._timer = self._loop.call_later(left if left > 0 else self._seconds, self._look)
