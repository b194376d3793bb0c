"""The asking side of a writer in a process of its own (`writer.py`): starts it, sends changes, hears their results."""

from __future__ import annotations

import asyncio
import marshal
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import shoestring
from shoestring.core.errors import UserError
from shoestring.data.claims import Op, Planned, Purse
from shoestring.data.store import Store
from shoestring.data.writer import PLAN, VERSION, Frames, frame, packed

START = "import sys; sys.path.append(sys.argv.pop(1)); from shoestring.data.writer import main; main(sys.argv[1:])"
AHEAD = 1  # chunks of questions that may wait for their turn
Heard = Callable[[list[int] | BaseException, int], None]  # answers or an error, and to how many claims


class Far(asyncio.Protocol):
    """A writer of `store`, which this process only reads while it lives."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._frames = Frames()
        self._ending = False
        self._planning = 0  # chunks that it has not said to have planned
        self._link, theirs = socket.socketpair()
        budget = store.budget
        limits = marshal.dumps((budget.pico, budget.tokens, budget.answers), VERSION).hex()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", START, str(Path(shoestring.__file__).parent.parent),
                 str(store.file.resolve()), str(theirs.fileno()), str(os.getpid()), str(store.worker), limits],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip

    def plan(self, planned: Sequence[Planned], how: int, job: int) -> None:
        """Have it do `Store.plan` while the next chunk is made, before `listen`. Raises what an earlier one came to."""
        try:
            self._link.sendall(frame((PLAN, [tuple(one) for one in planned], how, job)))
        except OSError:
            raise UserError(f"{self._why()}.") from None
        self._planning += 1
        self.planned(leave=AHEAD)

    def planned(self, *, leave: int = 0) -> None:
        """Wait until all but `leave` chunks are on disk."""
        while self._planning > leave:
            try:
                data = self._link.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                raise UserError(f"{self._why()}.")
            for _, answer, _ in self._frames.feed(data):
                self._planning -= 1
                if isinstance(answer, bytes):
                    raise pickle.loads(answer)

    def quit(self) -> None:
        """End it before `listen`."""
        self._link.close()
        self._process.wait()

    async def listen(self, heard: Heard, died: Callable[[str], None]) -> None:
        """Call `heard` for each commit, and `died` (why) when the process ends before it is told to."""
        self._heard, self._died = heard, died
        loop = asyncio.get_running_loop()
        self._over = loop.create_future()
        transport, _ = await loop.create_connection(lambda: self, sock=self._link)
        self._transport = transport

    def write(self, ops: Sequence[Op]) -> None:
        """Have `ops` written, in the next commit; nothing when the process is dead."""
        if not self._transport.is_closing():
            self._transport.write(packed(ops))

    async def end(self) -> None:
        """Wait until all is on disk and the process has ended."""
        self._ending = True
        if not self._transport.is_closing():
            self._transport.write_eof()
        await self._over
        await asyncio.to_thread(self._process.wait)

    def data_received(self, data: bytes) -> None:
        for claims, answers, purse in self._frames.feed(data):
            if purse is not None:
                self._store.purse = Purse(*purse)
            self._heard(pickle.loads(answers) if isinstance(answers, bytes) else answers, claims)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._over.done():
            self._over.set_result(None)
        if not self._ending:
            self._died(self._why())

    def _why(self) -> str:
        """Of a death that nobody asked for."""
        try:
            code: Any = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        how = f"was killed (signal {-code})" if code and code < 0 else "ended"
        return f"the process that writes the store {how}; what is kept is kept, and the same command goes on"
