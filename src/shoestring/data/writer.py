"""The process that writes a store for one that asks (`far.py` starts it): changes in, answers to claims out.

A frame is four bytes of length and a marshalled value. In: (claims, settled, returned), or before all of those (PLAN,
questions, how, job). Out: (how many claims, their answers or an error, the purse). It ends when the other end of the
socket is closed, after what was sent is on disk; so too when the process that asks was killed. Until then it holds a
lock that whoever opens the store next waits for. Signals are the business of the process that asks. Imports little: its
start is paid by every large job.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shoestring.core.errors import UserError
from shoestring.data.claims import PURSE, Answer, Budget, Claim, Op, Planned, Returned, Settled
from shoestring.data.commits import Commits
from shoestring.data.store import Store

LOCK = 1 << 40  # the byte of the store's lock file that a writer holds, far behind those of workers
LARGEST_TAKEN = 1 << 22  # bytes of changes taken into one transaction, at most and one frame
PLAN = "plan"
VERSION = 2  # of marshal: without references, which would be looked for in vain


class Frames:
    """Values out of a stream of bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Those that are whole with `data`."""
        buffer, found, start = self._buffer, [], 0
        buffer += data
        while len(buffer) - start >= 4:
            end = start + 4 + int.from_bytes(buffer[start : start + 4], "little")
            if len(buffer) < end:
                break
            found.append(marshal.loads(memoryview(buffer)[start + 4 : end]))
            start = end
        if start:
            del buffer[:start]
        return found


def frame(value: Any) -> bytes:
    """`value` for the other side."""
    data = marshal.dumps(value, VERSION)
    return len(data).to_bytes(4, "little") + data


def packed(ops: Sequence[Op]) -> bytes:
    """Changes as a frame."""
    claims, settled, returned = [], [], []
    for op in ops:
        if type(op) is Claim:
            claims.append(tuple(op))
        elif type(op) is Settled:
            claim, answers, *rest = op
            settled.append((tuple(claim), [tuple(answer) for answer in answers], *rest))
        elif type(op) is Returned:
            returned.append((tuple(op.claim), *op[1:]))
    return frame((claims, settled, returned))


def unpacked(value: Any) -> list[Op]:
    """The changes in the value of a frame."""
    claims, settled, returned = value
    ops: list[Op] = [
        Settled(Claim._make(claim), [Answer._make(one) for one in answers], *rest) for claim, answers, *rest in settled
    ]
    ops += [Returned(Claim._make(claim), *rest) for claim, *rest in returned]
    ops += [Claim._make(claim) for claim in claims]
    return ops


class Writer:
    """Takes frames from `link` and writes them through `commits`, until the link ends. parent: who asks."""

    def __init__(self, link: socket.socket, commits: Commits, parent: int) -> None:
        self._link, self._commits, self._parent = link, commits, parent
        self._frames = Frames()

    def run(self) -> None:
        """Write until the other side has closed."""
        while data := self._link.recv(1 << 18):
            self._commits.linger()
            while len(data) < LARGEST_TAKEN and (more := self._more()):
                data += more
            ops: list[Op] = []
            for value in self._frames.feed(data):
                if value[0] == PLAN:
                    self._plan(*value[1:])
                else:
                    ops += unpacked(value)
            if os.getppid() != self._parent:  # nobody is left who could send what would be claimed
                ops = [op for op in ops if type(op) is not Claim]
            if ops:
                self._commit(ops)

    def _more(self) -> bytes:
        try:
            return self._link.recv(1 << 18, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""

    def _plan(self, planned: list[tuple[Any, ...]], how: int, job: int) -> None:
        store = self._commits.store
        self._answer(0, lambda: store.plan([Planned._make(one) for one in planned], how, job))

    def _commit(self, ops: list[Op]) -> None:
        self._answer(sum(type(op) is Claim for op in ops), lambda: self._commits.commit(ops))

    def _answer(self, claims: int, work: Callable[[], list[int] | None]) -> None:
        answers: Any
        try:
            answers = work()
        except Exception as error:
            answers = carried(error)
        purse = self._commits.store.purse
        tell(self._link, (claims, answers, [getattr(purse, name) for name in PURSE]))


def tell(link: socket.socket, value: Any) -> None:
    """Send `value`, unless nobody listens any more: what came is kept all the same."""
    try:
        link.sendall(frame(value))
    except OSError:
        return


def carried(error: BaseException) -> bytes:
    """An error for the process that asks: a user's as it is, one of ours with where it happened."""
    if isinstance(error, UserError):
        return pickle.dumps(error)
    return pickle.dumps(RuntimeError(f"the process that writes the store failed:\n{traceback.format_exc()}"))


def main(arguments: Sequence[str]) -> None:
    """Write the store at the path in `arguments`; behind it: the socket, who asks, the worker's number, the budget."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    path, descriptor, parent, worker, budget = arguments
    with socket.socket(fileno=int(descriptor)) as link, open(Path(path).parent / ".lock", "a+b") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, LOCK)
            if os.getppid() != int(parent):
                return  # whoever waits for the lock could not know of this process before
            store = Store(path, worker=int(worker))
            store.budget = Budget(*marshal.loads(bytes.fromhex(budget)))
        except Exception as error:
            tell(link, (0, carried(error), None))
            return
        try:
            Writer(link, Commits(store), int(parent)).run()
        finally:
            store.close()


if __name__ == "__main__":
    main(sys.argv[1:])
