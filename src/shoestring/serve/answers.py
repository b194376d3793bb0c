"""Sending answers: a stream whose reader may leave or fall asleep, and answers that may be asked for again.

A client that goes away cancels its call. One that names its request with an `Idempotency-Key` does not: the answer is
finished and kept for a day, so that asking again gives the same bytes and is billed once. The same key with another
request is 409.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoestring.serve.alarm import Alarm
from shoestring.serve.errors import ApiError
from shoestring.serve.exchange import GONE, JSON, Reply, unexpected
from shoestring.serve.keys import KeyStore

KEPT_SECONDS = 86400.0
KEPT_ANSWERS = 256  # in memory
KEPT_BYTES = 1 << 20  # of one answer
T = TypeVar("T")
_log = logging.getLogger("shoestring.serve")


class ClientGone(Exception):
    """The client closed its connection before there was an answer."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancelled, and ClientGone, when the client goes away before."""
    job = asyncio.ensure_future(work)
    watch = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait((job, watch), return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientGone
        return await job
    finally:
        watch.cancel()
        if not job.done():
            job.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await job


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Streamed(Response):
    """A reply of many pieces. Ends, and closes its source, when the client leaves or stops reading."""

    def __init__(self, reply: Reply, headers: dict[str, str], reader_seconds: float) -> None:
        super().__init__(status_code=reply.status, headers=reply.headers | headers, media_type=reply.content_type)
        del self.headers["content-length"]
        self._frames = reply.frames
        self._reader_seconds = reader_seconds
        self._sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.create_task(self._write(send))
        watch = asyncio.create_task(_gone(receive))

        def asleep() -> None:
            if self._sending:
                writer.cancel()

        self._alarm = Alarm(self._reader_seconds, asleep)
        try:
            await asyncio.wait((writer, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._alarm.stop()
            watch.cancel()
            if not writer.done():
                writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writer

    async def _write(self, send: Send) -> None:
        async with contextlib.aclosing(self._frames) as frames:  # type: ignore[type-var]
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for frame in frames:
                self._alarm.touch()
                self._sending = True
                await send({"type": "http.response.body", "body": frame, "more_body": True})
                self._sending = False
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class Recording:
    """One answer while it is made, for any number of readers."""

    def __init__(self, body_hash: str) -> None:
        self.body_hash = body_hash
        self.at = time.time()
        self._pieces: list[bytes] = []
        self._news = asyncio.Condition()
        self._reply: Reply | None = None
        self._error: ApiError | None = None
        self.ended = False

    async def fill(self, work: Callable[[], Awaitable[Reply]]) -> tuple[str, bytes] | None:
        """Make the answer; (content type, body) when it is whole and fine."""
        try:
            reply = await work()
            await self._tell(reply=reply)
            async for piece in reply.frames:
                await self._tell(piece=piece)
        except ApiError as error:
            await self._tell(error=error)
            return None
        except Exception as error:
            _log.exception("a remembered request failed")
            await self._tell(error=unexpected(error))
            return None
        await self._tell(ended=True)
        body = b"".join(self._pieces)
        broken = reply.content_type != JSON and b'data: {"error"' in body
        return None if broken else (reply.content_type, body)

    async def _tell(
        self, *, reply: Reply | None = None, piece: bytes | None = None, error: ApiError | None = None,
        ended: bool = False,
    ) -> None:  # fmt: skip
        async with self._news:
            self._reply = self._reply or reply
            self._error = self._error or error
            self.ended = self.ended or ended or error is not None
            if piece is not None:
                self._pieces.append(piece)
            self._news.notify_all()

    async def reply(self) -> Reply:
        """The answer for one reader, from its beginning. Raises ApiError when there is none."""
        async with self._news:
            await self._news.wait_for(lambda: self._reply is not None or self._error is not None)
        if self._error is not None and self._reply is None:
            raise self._error
        assert self._reply is not None
        return Reply(self._reply.content_type, self._follow(), dict(self._reply.headers))

    async def _follow(self) -> AsyncIterator[bytes]:
        place = 0
        while True:
            async with self._news:
                while len(self._pieces) == place and not self.ended:
                    await self._news.wait()
                pieces, ended = self._pieces[place:], self.ended
            place += len(pieces)
            for piece in pieces:
                yield piece
            if ended:
                return


class Remembered:
    """Answers by (key, Idempotency-Key): those being made, and those of the last day."""

    def __init__(self, store: KeyStore | None, in_store: Callable[..., Awaitable[Any]]) -> None:
        self._store, self._in_store = store, in_store
        self._recordings: OrderedDict[tuple[str, str], Recording] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    async def reply(
        self, key_id: str, path: str, key: str, body: bytes, work: Callable[[], Awaitable[Reply]]
    ) -> Reply:  # fmt: skip
        """The answer to this request, made now or before. Raises ApiError 409 for another request of this key."""
        if not 0 < len(key) <= 255:
            raise ApiError(400, "an Idempotency-Key has 1 to 255 characters.", code="invalid_idempotency_key")
        name = f"{path}:{hashlib.sha256(key.encode()).hexdigest()}"
        digest, place = hashlib.sha256(body).hexdigest(), (key_id, name)
        recording = self._recordings.get(place)
        if recording is None and self._store is not None:
            kept = await self._in_store(self._store.remembered, key_id, name, time.time() - KEPT_SECONDS)
            if kept is not None:
                self._same(kept[0], digest)
                return Reply(kept[1], _whole(kept[2]), {"idempotency-replayed": "true"})
            recording = self._recordings.get(place)  # somebody may have begun while the store was asked
        if recording is not None and recording.at > time.time() - KEPT_SECONDS:
            self._same(recording.body_hash, digest)
            reply = await recording.reply()
            reply.headers["idempotency-replayed"] = "true"
            return reply
        recording = self._recordings[place] = Recording(digest)
        task = asyncio.create_task(self._make(place, recording, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await recording.reply()

    async def _make(self, place: tuple[str, str], recording: Recording, work: Callable[[], Awaitable[Reply]]) -> None:
        done = await recording.fill(work)
        if done is None or len(done[1]) > KEPT_BYTES:
            self._recordings.pop(place, None)
            return
        if self._store is not None:
            keep = time.time() - KEPT_SECONDS
            try:
                await self._in_store(self._store.remember, *place, recording.body_hash, *done, keep)
            except Exception:
                _log.exception("an answer could not be kept; it stays in memory")
            else:
                self._recordings.pop(place, None)
                return
        for old in [name for name, found in self._recordings.items() if found.ended][:-KEPT_ANSWERS]:
            del self._recordings[old]

    @staticmethod
    def _same(kept: str, digest: str) -> None:
        if kept != digest:
            message = "this Idempotency-Key was used for another request; use a new one."
            raise ApiError(409, message, code="idempotency_conflict", retry=False)

    async def settle(self, seconds: float) -> None:
        """Wait for what is being made; used when the server stops."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)


async def _whole(body: bytes) -> AsyncIterator[bytes]:
    yield body


__all__ = ["GONE", "ClientGone", "Remembered", "Streamed", "unless_gone"]
