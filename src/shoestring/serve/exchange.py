"""One admitted call from its place in the line to its bill: the same road for streams and for whole answers."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shoestring.core.nouns import Event
from shoestring.serve.errors import ApiError
from shoestring.serve.generation import Generation
from shoestring.serve.hooks import Call
from shoestring.serve.limits import Reservation
from shoestring.serve.served import Served
from shoestring.serve.shape import Shape
from shoestring.serve.shapes import KEEP_ALIVE

if TYPE_CHECKING:
    from shoestring.serve.meter import Meter

JSON, SSE = "application/json", "text/event-stream"
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
GONE = 499  # nginx's number for a client that went away
_log = logging.getLogger("shoestring.serve")


@dataclass(slots=True)
class Reply:
    """An answer of 200 on its way: headers, and the body in pieces."""

    content_type: str
    frames: AsyncIterator[bytes]
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


class Exchange:
    """`open` waits for the first sign of life, so that what fails at once is an error and not a broken stream."""

    def __init__(
        self, call: Call, served: Served, shape: Shape, generation: Generation, held: Reservation | None, meter: Meter
    ) -> None:
        self._call, self._served, self._shape, self._meter, self._held = call, served, shape, meter, held
        self._batches = generation.batches()
        self._first: list[tuple[int, Event]] = []

    async def open(self) -> Reply:
        """Raises ApiError, with everything settled."""
        try:
            self._first = await anext(self._batches)
            if not self._call.stream:
                return Reply(JSON, _one(await self._whole()))
        except BaseException as error:
            await self._close(_status(error))
            raise
        return Reply(SSE, await begun(self._frames()), dict(STREAM_HEADERS))

    async def _whole(self) -> bytes:
        tally = self._call.tally
        batch = self._first
        while True:
            for index, event in batch:
                self._shape.fold(index, event, tally)
            try:
                batch = await anext(self._batches)
            except StopAsyncIteration:
                break
        found = self._shape.whole(tally)
        await self._close(200)
        return json.dumps(found, ensure_ascii=False).encode()

    async def _frames(self) -> AsyncGenerator[bytes, None]:
        tally, status = self._call.tally, GONE
        try:
            yield b""  # for `begun`
            yield self._shape.opening(tally)
            batch = self._first
            while True:
                piece = b"".join([self._shape.feed(index, event, tally) for index, event in batch])
                if piece or not batch:
                    yield piece or KEEP_ALIVE
                batch = await anext(self._batches)
        except StopAsyncIteration:
            status = 200
        except ApiError as error:
            status = error.status
            yield self._shape.broken(error)
        except Exception as error:
            _log.exception("request %s failed", self._call.request_id)
            status = 500
            yield self._shape.broken(unexpected(error))
        finally:
            await self._close(status)
        if status == 200:
            yield self._shape.closing(tally)

    async def _close(self, status: int) -> None:
        await self._batches.aclose()  # type: ignore[attr-defined]
        self._call.tally.answers = [len(text) for text in self._shape.writer.texts()]
        usd = self._served.cost(self._call.tally)
        await self._meter.finish(self._call, status, usd, self._held, self._shape.writer.texts())


async def begun(frames: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """The frames, their first one, which is empty, taken. A generator that never ran ends without its `finally`: a
    client that leaves before the first byte would keep its place, and what was reserved for it, for good."""
    await anext(frames)
    return frames


def unexpected(error: Exception) -> ApiError:
    """A fault of the server's own: said so, without its insides."""
    return ApiError(500, f"the server failed ({type(error).__name__}); it has been logged.", code="internal_error")


def _status(error: BaseException) -> int:
    if isinstance(error, ApiError):
        return error.status
    return GONE if isinstance(error, asyncio.CancelledError | GeneratorExit) else 500


async def _one(body: bytes) -> AsyncIterator[bytes]:
    yield body
