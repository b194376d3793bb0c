"""The server's side of the pipe: requests in, streams of events out, on the event loop.

Two threads per engine, because reading and writing a pipe may block: one takes what the engine sends and wakes the
loop once per message, the other sends. When the engine dies (killed, out of memory, NaN logits) every request it had
fails at once, and it is started again, once; a second death is final.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import queue
import threading
import time
from multiprocessing.connection import Connection
from typing import Any, Literal

from shoestring.core.nouns import Event, Sampling
from shoestring.serve.alarm import Alarm
from shoestring.serve.engine_process import EngineSpec, engine_main
from shoestring.serve.errors import ApiError

RESTARTS = 1
GIVE_UP_SECONDS = 10.0
State = Literal["starting", "ready", "restarting", "dead", "stopped"]
_log = logging.getLogger("shoestring.serve")


class Stream:
    """What one call hears from the engine: all that has come since it last asked, or an error."""

    def __init__(self, beat: float) -> None:
        self._events: list[tuple[int, Event]] = []
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._alarm = Alarm(beat, self._wake)

    def put(self, part: int, event: Event) -> None:
        self._events.append((part, event))
        if self._waiter is not None:
            self._wake()

    def fail(self, error: ApiError) -> None:
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> list[tuple[int, Event]]:
        """(part of the call, event) pairs that have arrived; [] after `beat` seconds without news. Raises ApiError."""
        if not self._events and self._error is None:
            self._alarm.touch()
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        found = self.rest()
        if not found and self._error is not None:
            raise self._error
        return found

    def rest(self) -> list[tuple[int, Event]]:
        """What has arrived by now."""
        found, self._events = self._events, []
        return found

    def close(self) -> None:
        self._alarm.stop()


class EngineClient:
    """One model's engine process."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.state: State = "starting"
        self.restarts = 0
        self.reason = ""  # of the last death
        self.facts: dict[str, Any] = {}
        self.stats: dict[str, Any] = {}
        self._streams: dict[str, tuple[Stream, int]] = {}
        self._process: multiprocessing.process.BaseProcess | None = None
        self._outbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._changed = asyncio.Event()
        self._generation = 0

    # ---- life
    async def start(self) -> None:
        """Start the process and wait until the model is loaded. Raises RuntimeError with its words when it cannot."""
        self._loop = asyncio.get_running_loop()
        self._spawn()
        await self._settled()
        if self.state != "ready":
            raise RuntimeError(self.reason or "the engine did not start")

    async def _settled(self) -> None:
        while self.state in ("starting", "restarting"):
            self._changed.clear()
            await self._changed.wait()

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(
            target=engine_main, args=(self.spec, theirs), name=f"engine-{self.spec.name}", daemon=True
        )
        self._process.start()
        theirs.close()
        self._generation += 1
        self._outbox = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._read, args=(ours, self._generation), daemon=True),
            threading.Thread(target=self._write, args=(ours, self._outbox), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, pipe: Connection, generation: int) -> None:
        try:
            while True:
                self._call(self._hear, pipe.recv(), generation)
        except (EOFError, OSError):
            self._call(self._died, None, generation)

    def _write(self, pipe: Connection, outbox: queue.SimpleQueue[tuple[Any, ...] | None]) -> None:
        try:
            while (message := outbox.get()) is not None:
                pipe.send(message)
        except OSError:
            return  # the reader sees the end as well and tells

    def _call(self, function: Any, *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return  # the loop is closed: the server is gone

    def _hear(self, message: tuple[Any, ...], generation: int) -> None:
        if generation != self._generation:
            return
        kind = message[0]
        if kind == "events":
            for event in message[1]:
                if (found := self._streams.get(event.request_id)) is not None:
                    found[0].put(found[1], event)
        elif kind == "stats":
            self.stats = message[1]
        elif kind == "refused" and message[1] in self._streams:
            self._streams.pop(message[1])[0].fail(
                ApiError(400, message[2].replace("sampling.", ""), code="invalid_value")
            )
        elif kind == "broken" and message[1] in self._streams:
            _log.error("the engine of %s could not take a request:\n%s", self.spec.name, message[2])
            error = ApiError(500, "the engine could not take this request; it has been logged.", code="internal_error")
            self._streams.pop(message[1])[0].fail(error)
        elif kind == "ready":
            self.facts = message[1]
            self._become("ready")
        elif kind == "failed":
            self.reason = message[1]
            if message[1].startswith("UserError") and self.state == "starting":
                return  # a mistake, not a fault: `start` tells it
            _log.error("the engine of %s failed:\n%s", self.spec.name, message[2])

    def _become(self, state: State) -> None:
        self.state = state
        self._changed.set()

    def _died(self, _: None, generation: int) -> None:
        if generation != self._generation or self.state == "stopped":
            return
        self._outbox.put(None)
        code = self._process.exitcode if self._process is not None else None
        self.reason = self.reason or f"the engine process ended (exit code {code})"
        was_ready = self.state == "ready"
        lost, self._streams = self._streams, {}
        again = was_ready and self.restarts < RESTARTS
        for stream, _part in lost.values():
            stream.fail(self._gone(again))
        self.stats = {}
        if self.state != "starting":
            _log.error(
                "the engine of %s died: %s%s", self.spec.name, self.reason, "; starting it again" if again else ""
            )
        if again:
            self.restarts += 1
            self._become("restarting")
            self._spawn()
        else:
            self._become("dead")

    def _gone(self, again: bool) -> ApiError:
        message = f'The engine of "{self.spec.name}" is not running' + (
            "; it is being started again." if again else "."
        )
        return ApiError(503, message, code="engine_dead", retry_after=5 if again else 60)

    async def stop(self) -> None:
        """End the process, gently first."""
        self._become("stopped")
        self._outbox.put(("stop",))
        self._outbox.put(None)
        process = self._process
        if process is None:
            return
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while process.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if process.is_alive():
            process.kill()
        process.join(timeout=GIVE_UP_SECONDS)

    # ---- requests
    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def in_flight(self) -> int:
        return len(self._streams)

    def check(self) -> None:
        """Raise ApiError 503 when nothing can be asked now."""
        if self.state != "ready":
            raise self._gone(self.state in ("starting", "restarting"))

    def submit(
        self, stream: Stream, part: int, request_id: str, prompt: list[int], sampling: Sampling, salt: str
    ) -> None:
        """Ask; what comes goes to `stream`. Raises ApiError 503 when the engine is not there."""
        self.check()
        self._streams[request_id] = (stream, part)
        self._outbox.put(("add", request_id, prompt, sampling, salt))

    def cancel(self, request_id: str) -> None:
        """Forget a request, in the engine too."""
        if self._streams.pop(request_id, None) is not None and self.state == "ready":
            self._outbox.put(("cancel", request_id))

    def break_off(self, error: ApiError) -> None:
        """End every call with an error."""
        for request_id, (stream, _part) in list(self._streams.items()):
            stream.fail(error)
            self.cancel(request_id)

    def done(self, request_id: str) -> None:
        """A request whose last event has been heard."""
        self._streams.pop(request_id, None)
