"""One POST over a kept-alive connection, with the limits that keep a bad server from holding a job.

total_s: of the whole request. idle_s: since the last byte that is not a keep-alive (blank lines, or comments of an
event stream; DeepSeek sends them for up to 30 minutes under load). largest: bytes of a reply. Redirects are not
followed: they would drop the question or send the key elsewhere. Measured against httpx: docs/asking.md.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoestring.core.errors import UserError
from shoestring.teachers._pace import seconds_of
from shoestring.teachers._wire import Trouble, refusal

if TYPE_CHECKING:
    import aiohttp

IDLE_SOCKET_S = 4.0  # uvicorn closes a connection after 5 s of silence; one closed under us costs a doubt


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds and bytes."""

    total_s: float = 1800.0
    idle_s: float = 300.0
    connect_s: float = 20.0
    largest: int = 64 << 20


class Sender:
    """Sends bodies to one URL. An async context manager."""

    def __init__(self, url: str, *, key: str | None, limits: Limits, most: int, stream: bool = False) -> None:
        try:
            import aiohttp
        except ModuleNotFoundError:
            raise UserError('asking over HTTP needs aiohttp: pip install "shoestring[ask]".') from None
        from yarl import URL

        self._http = aiohttp
        self._url = URL(url)
        self._most, self._stream = most, stream
        self.limits = limits
        self.users = 0  # workers that share it
        silence = limits.idle_s if stream else None  # without a stream nothing comes until the whole answer does
        self._timeout = aiohttp.ClientTimeout(total=limits.total_s, sock_connect=limits.connect_s, sock_read=silence)
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    async def __aenter__(self) -> Sender:
        connector = self._http.TCPConnector(limit=self._most, keepalive_timeout=IDLE_SOCKET_S)
        self._session = self._http.ClientSession(
            connector=connector, cookie_jar=self._http.DummyCookieJar(), timeout=self._timeout,
            headers=self._headers, auto_decompress=True, trust_env=bool(os.environ.get("HTTPS_PROXY")),
        )  # fmt: skip
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def post(self, body: bytes, idempotency_key: str) -> tuple[Mapping[str, str], bytes]:
        """(headers, body) of a complete 200. Raises Trouble for everything else."""
        http = self._http
        try:
            async with self._session.post(
                self._url, data=body, headers={"Idempotency-Key": idempotency_key}, allow_redirects=False
            ) as response:
                content = await self._read(response)
        except (http.ClientConnectorError, http.ConnectionTimeoutError) as error:
            raise Trouble(
                "no connection", f"{self._url.origin()} cannot be reached ({_short(error)})", "down"
            ) from error
        except TimeoutError as error:
            raise Trouble("timeout", f"no answer within {self.limits.total_s:.0f} s", doubt=True) from error
        except (http.ClientPayloadError, http.ServerDisconnectedError, http.ClientOSError) as error:
            raise Trouble("connection lost", _short(error), doubt=True) from error
        except http.ClientError as error:
            raise Trouble("not HTTP", _short(error), doubt=True, turn=True) from error
        if response.status != 200:
            date = response.headers.get("Date")
            wait = seconds_of(response.headers.get("Retry-After"), date)
            if milliseconds := response.headers.get("retry-after-ms"):
                wait = (seconds_of(milliseconds) or 0.0) / 1000
            raise refusal(response.status, response.headers, content, wait)
        return response.headers, content

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        """The whole body; keep-alives do not count as signs of life."""
        length = response.headers.get("Content-Length")
        if length is not None and length.isdigit() and int(length) <= 1 << 20:
            return await response.read()
        pieces: list[bytes] = []
        size = 0
        alive = asyncio.get_running_loop().time()
        while True:
            left = alive + self.limits.idle_s - asyncio.get_running_loop().time()
            try:
                piece = await asyncio.wait_for(response.content.readany(), max(left, 0.001))
            except TimeoutError:
                told = f"no part of an answer for {self.limits.idle_s:.0f} s"
                raise Trouble("timeout", told, doubt=True) from None
            if not piece:
                return b"".join(pieces)
            size += len(piece)
            if size > self.limits.largest:
                raise Trouble("endless reply", f"more than {self.limits.largest >> 20} MB came", "never", doubt=True)
            pieces.append(piece)
            if _alive(piece):
                alive = asyncio.get_running_loop().time()
            elif self._stream is False and len(pieces) > 64:
                pieces = [b"".join(pieces).lstrip()]


def _alive(piece: bytes) -> bool:
    """Whether a piece holds more than blank lines and comments."""
    return any(line.strip() and not line.startswith(b":") for line in piece.split(b"\n"))


def _short(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text.split(" [")[-1].rstrip("]")[:200] if "[" in text else text[:200]


def check_url(url: str, wanted: str = "chat/completions") -> str:
    """The address of `wanted` for what a user gave. Raises UserError for what is no address."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f'"{url}" is no address; give one like https://api.deepseek.com/v1.')
    base = url.rstrip("/")
    if base.endswith("/chat/completions"):
        return base.removesuffix("chat/completions") + wanted
    return f"{base}/{wanted}" if parts.path.strip("/") else f"{base}/v1/{wanted}"


def is_local(url: str) -> bool:
    """Whether the address is this machine."""
    from urllib.parse import urlsplit

    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def key_from(variable: str | None, environ: Mapping[str, Any] = os.environ) -> str | None:
    """The API key in an environment variable; keys are never given on the command line. Raises UserError."""
    if variable is None:
        return None
    value = environ.get(variable, "").strip()
    if not value:
        raise UserError(f"the environment variable {variable} holds no key; export {variable}=… and ask again.")
    return value
