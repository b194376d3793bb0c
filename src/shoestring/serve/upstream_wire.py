"""What comes over the wire from another provider: whole bodies, events, refusals; every one of them bounded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

from shoestring.serve.errors import ApiError

LARGEST, LARGEST_EVENT = 64 << 20, 8 << 20  # bytes of an answer, and of one event of a stream
LONGEST_WAIT = 86400.0
UNREADABLE = (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError)  # of JSON of another shape
_log = logging.getLogger("shoestring.serve")


@dataclass(frozen=True, slots=True)
class Most:
    """Until when an answer may go on (the event loop's clock), how many bytes, and in how many pieces of text."""

    deadline: float
    size: int
    pieces: int | None


async def read_body(response: httpx.Response, most: int = LARGEST) -> bytes:
    """A whole body, of bounded size. Raises ApiError 502."""
    pieces, size = [], 0
    try:
        async for piece in response.aiter_bytes():
            size += len(piece)
            if size > most:
                raise _endless(most)
            pieces.append(piece)
    finally:
        await response.aclose()
    return b"".join(pieces)


def _endless(limit: int) -> ApiError:
    return ApiError(502, f"the upstream's answer is larger than {limit} bytes.", code="upstream_broken", retry=False)


async def events(response: httpx.Response, most: Most) -> AsyncIterator[bytes]:
    """Server-sent events without their blank lines; half an event at the end is no event. Raises TimeoutError."""
    buffer, pieces, size = b"", response.aiter_bytes(), 0
    while True:
        async with asyncio.timeout_at(most.deadline):  # around what is waited for alone: not around what is yielded
            piece = await anext(pieces, b"")
        if not piece:
            return
        size += len(piece)
        if size > most.size:
            raise _endless(most.size)
        buffer = (buffer + piece).replace(b"\r\n", b"\n")
        while (place := buffer.find(b"\n\n")) >= 0:
            event, buffer = buffer[:place], buffer[place + 2 :]
            if event:
                yield event
        if len(buffer) > LARGEST_EVENT:
            raise _endless(LARGEST_EVENT)


async def refusal(response: httpx.Response) -> ApiError:
    """What the upstream said, in our shape; its own faults are 502, its being busy stays 429 or 503. Where it repeats
    the key it was sent, that goes neither into the log nor to a client."""
    data = await read_body(response)
    key = response.request.headers.get("authorization", "").removeprefix("Bearer ")
    message, code = f"the upstream answered {response.status_code}.", None
    with contextlib.suppress(*UNREADABLE):
        said = json.loads(data)
        inner = said.get("error", said)
        message = str(inner.get("message") or message) if isinstance(inner, dict) else str(inner)
        code = inner.get("code") if isinstance(inner, dict) else None
        message = message.replace(key, "…") if key else message
    status = response.status_code
    if status in (401, 402, 403):  # our key there, not the client's key here
        _log.error("the upstream refuses the key it was given: %s", message)
        return ApiError(502, "the upstream refuses this server's key or credit.", code="upstream_refused", retry=False)
    kept = status if 400 <= status < 500 or status == 503 else 502  # a redirect is not followed: it is no answer
    return ApiError(kept, message, code=str(code) if code else None, retry_after=_wait(response.headers))


def _wait(headers: httpx.Headers) -> float | None:
    """Seconds of Retry-After, in either of its forms."""
    said = headers.get("retry-after", "")
    try:
        seconds = float(said) if said[:1].isdecimal() else parsedate_to_datetime(said).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT)


def unreachable(error: Exception) -> ApiError:
    """No answer, or half of one: 502, or 504 where it was too slow."""
    late = isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout)
    message = f"the upstream {'took too long' if late else 'cannot be reached or broke off'} ({type(error).__name__})."
    return ApiError(504 if late else 502, message, code="upstream_unreachable", retry_after=5)
