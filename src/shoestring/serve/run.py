"""Start the server, and stop it well.

On SIGTERM or Ctrl-C: /health says 503 and new requests are refused, what is running goes on for `drain_seconds`, then
the streams that are left end with an error event. A second signal ends at once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from shoestring.core.errors import UserError
from shoestring.serve.app import build_app
from shoestring.serve.settings import ServeConfig

BACKLOG = 4096
LOOK_SECONDS = 0.05
_log = logging.getLogger("shoestring.serve")


class Server(uvicorn.Server):
    """uvicorn's, with a drain before the end."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_seconds: float) -> None:
        super().__init__(config)
        self._app, self._drain_seconds = app, drain_seconds
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started and sockets:
            name = sockets[0].getsockname()
            scheme = "https" if self.config.is_ssl else "http"
            host = f"[{name[0]}]" if ":" in name[0] else name[0]
            print(f"Serving on {scheme}://{host}:{name[1]}", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        service = self._app.state.service
        if service.draining or self._loop is None or not self.started:
            self.should_exit = self.force_exit = True
            return
        service.draining = True
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._drain = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        service = self._app.state.service
        print("Draining: no new requests; what is running may finish.", file=sys.stderr, flush=True)
        until = asyncio.get_running_loop().time() + self._drain_seconds
        while service.busy and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(LOOK_SECONDS)
        if service.busy:
            service.break_off()
            await asyncio.sleep(4 * LOOK_SECONDS)  # for the error events to be sent
        self.should_exit = True


def serve(config: ServeConfig) -> int:
    """Serve until told to stop; the exit code. Raises UserError for what cannot be served or a port in use."""
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    _check_exposure(config)
    listener = _listen(config)
    app = build_app(config)
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=2, ssl_certfile=config.tls_cert, ssl_keyfile=config.tls_key, backlog=BACKLOG,
        http=_fastest_http(), lifespan="on", ws="none",
    )  # fmt: skip
    server = Server(settings, app, config.drain_seconds)
    failure: list[BaseException] = []
    _keep_reason(app, failure)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(server.serve(sockets=[listener]))
    except SystemExit:  # how uvicorn ends when the start fails
        if not failure:
            raise
    finally:
        listener.close()
    if failure:
        raise failure[0]
    return 0 if server.started else 1


def _keep_reason(app: FastAPI, failure: list[BaseException]) -> None:
    """Uvicorn swallows what went wrong at the start; the sentence is for the user."""
    start = app.state.service.start

    async def told() -> None:
        try:
            await start()
        except UserError as error:
            failure.append(error)
            raise

    app.state.service.start = told
    logging.getLogger("uvicorn.error").addFilter(lambda record: not failure)


def _check_exposure(config: ServeConfig) -> None:
    if not config.loopback and not config.require_keys:
        raise UserError(
            f"{config.host} can be reached by others and no keys are required; give --store FILE --require-keys "
            "(make keys by `shoestring keys create NAME --store FILE`), or serve on 127.0.0.1."
        )


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # inherited by connections: one that acknowledges nothing is closed
        milliseconds = int(2000 * config.reader_seconds)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    try:
        listener.bind((config.host, config.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(
            f"{config.host}:{config.port} cannot be served on: {error.strerror}; choose another --port."
        ) from error
    return listener


def _fastest_http() -> Any:
    """Httptools reads requests in C where it is installed; h11 does the same in Python."""
    try:
        import httptools  # noqa: F401
    except ImportError:
        return "h11"
    return "httptools"


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
