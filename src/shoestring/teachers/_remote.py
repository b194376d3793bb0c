"""A provider's files and batches over HTTP: made once, waited for, read piece by piece.

What fails on the way (no connection, a 5xx, half a reply) is tried again a few times: making a batch begins with a
look whether the last try made it. Results are read a line at a time, for 50,000 answers may be gigabytes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from itertools import islice
from time import monotonic
from typing import Any, TypeVar

import aiohttp

from shoestring.teachers._wire import Trouble, refusal

ENDED = ("completed", "failed", "expired", "cancelled")
TOGETHER = 1000  # rows settled in one transaction
TOGETHER_BYTES = 16 << 20  # or as many as so much text holds
TRIES = 6
PAGES = 100  # of the list of batches, 100 a page
LARGEST_LINE = 64 << 20  # bytes of one row's answer
NO_JSON = "not JSON"

T = TypeVar("T")


class Remote:
    """The provider's files and batches."""

    def __init__(self, session: aiohttp.ClientSession, base: str, poll_s: float, patience_s: float) -> None:
        self._session, self._base, self._poll_s, self._patience_s = session, base, poll_s, patience_s

    async def make(self, lines: bytes, mark: str) -> str:
        """Upload `lines` and make a batch of them, unless one with this mark is there; its id. Raises Trouble."""
        return await self._patiently(lambda: self._make(lines, mark))

    async def _make(self, lines: bytes, mark: str) -> str:
        async for batch in self._batches():
            metadata = batch.get("metadata")
            if isinstance(metadata, dict) and metadata.get("shoestring") == mark:
                return _id(batch)
        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        form.add_field("file", lines, filename=f"{mark}.jsonl", content_type="application/jsonl")
        file = _id(await self._call("POST", "/files", data=form))
        return _id(await self._call("POST", "/batches", json={
            "input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h",
            "metadata": {"shoestring": mark},
        }))  # fmt: skip

    async def _batches(self) -> AsyncIterator[dict[str, Any]]:
        """All of the account's batches, the newest first."""
        after, seen = "", set[str]()
        for _ in range(PAGES):
            page = await self._call("GET", f"/batches?limit=100{after}")
            rows = page.get("data")
            found = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
            for row in found:
                yield row
            last = str(found[-1].get("id")) if found else ""
            if page.get("has_more") is not True or not last or last in seen:
                return
            seen.add(last)
            after = f"&after={last}"

    async def wait(self, remote: str) -> dict[str, Any]:
        """The batch, once it has ended. A server that is away for a while is asked again.

        Raises Trouble for a refusal, and when for `patience_s` it told neither of the batch nor to wait.
        """
        heard = monotonic()
        while True:
            try:
                batch = await self._call("GET", f"/batches/{remote}")
                if batch.get("status") in ENDED:
                    return batch
                heard = monotonic()
            except (Trouble, aiohttp.ClientError, TimeoutError) as error:
                if isinstance(error, Trouble) and error.then in ("stop", "never"):
                    raise
                if isinstance(error, Trouble) and error.then == "pause":  # a word to wait is an answer
                    heard = monotonic()
                elif (silent := monotonic() - heard) > self._patience_s:
                    raise _gone(remote, silent, error) from error
            await asyncio.sleep(self._poll_s)

    async def results(self, file: Any) -> AsyncIterator[list[dict[str, Any] | None]]:
        """The rows of a file, some at a time; None for a line that is no row. Nothing when there is no file.

        A file whose reading breaks off is read again from its beginning. Raises Trouble.
        """
        if not file:
            return
        read = 0
        for attempt in range(TRIES):
            try:
                at = 0
                async for some in self._rows(f"/files/{file}/content"):
                    fresh, at = some[max(0, read - at) :], at + len(some)
                    if fresh:
                        read = at
                        yield fresh
                return
            except (Trouble, aiohttp.ClientError, TimeoutError) as error:
                await self._again(error, attempt)

    async def _rows(self, path: str) -> AsyncIterator[list[dict[str, Any] | None]]:
        async with self._session.get(f"{self._base}{path}") as response:
            if response.status != 200:
                raise refusal(response.status, response.headers, await response.read(), None)
            rows: list[dict[str, Any] | None] = []
            size, rest, kept = 0, list[bytes](), 0  # the line that is not whole yet, in pieces
            async for piece in response.content.iter_any():
                first, *lines = piece.split(b"\n")
                rest.append(first)
                kept += len(first)
                if kept > LARGEST_LINE:
                    raise Trouble("endless reply", f"a row of more than {LARGEST_LINE >> 20} MB came", "never")
                if lines:
                    lines, rest, size = [b"".join(rest), *lines[:-1]], [lines[-1]], size + kept + len(piece)
                    kept = len(rest[0])
                    rows += [_row(line) for line in lines if line.strip()]
                if len(rows) >= TOGETHER or size >= TOGETHER_BYTES:
                    yield rows
                    rows, size = [], 0
            if last := b"".join(rest).strip():
                rows.append(_row(last))
            yield rows

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        for attempt in range(TRIES):
            try:
                return await ask()
            except (Trouble, aiohttp.ClientError, TimeoutError) as error:
                await self._again(error, attempt)
        raise AssertionError("the last try raises")

    async def _again(self, error: Exception, attempt: int) -> None:
        """Wait for another try. Raises Trouble where there is none."""
        lasting = isinstance(error, Trouble) and error.then in ("stop", "never")
        if lasting or attempt == TRIES - 1:
            if isinstance(error, Trouble):
                raise error
            raise Trouble("no connection", str(error) or type(error).__name__) from error
        wait = error.wait if isinstance(error, Trouble) else None
        await asyncio.sleep(self._poll_s * 2**attempt / 8 if wait is None else wait)

    async def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        async with self._session.request(method, f"{self._base}{path}", allow_redirects=False, **options) as response:
            body = await response.read()
            if response.status not in (200, 201):
                raise refusal(response.status, response.headers, body, None)
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            raise Trouble(NO_JSON, f"{path.partition('?')[0]} answers no JSON") from None
        if not isinstance(found, dict):
            raise Trouble(NO_JSON, f"{path.partition('?')[0]} answers no object")
        return found


def batched(values: Iterable[T], count: int) -> Iterator[list[T]]:
    """Lists of so many of `values`."""
    left = iter(values)
    while some := list(islice(left, count)):
        yield some


def _gone(remote: str, silent: float, error: Exception) -> Trouble:
    last = str(error) or type(error).__name__
    return Trouble(
        "no answer",
        f"nothing was heard of {remote} for {silent / 60:.0f} minutes (the last try: {last}); it is kept, and the same "
        "command goes on waiting for it",
    )


def _id(found: dict[str, Any]) -> str:
    if not isinstance(found.get("id"), str):
        raise Trouble("not a reply", "what was made has no id")
    return str(found["id"])


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
