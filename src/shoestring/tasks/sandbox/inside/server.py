"""The fork server: one process per worker that forks a fresh candidate for every job and cleans up after it.

Protocol, on standard input and output: a job is its length (4 bytes) and its bytes; a reply is HEAD and the bytes the
candidate wrote. The server never decodes a job and overwrites both buffers before the next fork, so that no candidate
finds in its own memory what an earlier one was asked or answered. In a pid namespace the server is process 1: the
kernel lets no candidate signal it, and killing "everyone" after a job really is everyone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import struct
import sys
import time

from . import candidate, filter
from .settings import Settings

HEAD = struct.Struct("=BiBdI")  # ending, wait status, recycle, seconds, length of the reply
EXITED, TIMEOUT, OUTPUT = range(3)
MAX_JOB = 2**22
WARM = (  # imported once here, so that a candidate that needs one does not pay for it
    "bisect collections copy dataclasses datetime decimal enum fractions functools heapq itertools json math operator "
    "random re statistics string typing"
)


def main() -> None:
    """Serve until standard input ends."""
    settings = Settings(**json.loads(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if settings.uid is not None:
        os.setgroups([])
        os.setresgid(settings.uid, settings.uid, settings.uid)
        os.setresuid(settings.uid, settings.uid, settings.uid)
    filter.install(reaper=not settings.isolated)
    for name in WARM.split():
        importlib.import_module(name)
    sys.path[:] = [path for path in sys.path if not os.path.isdir(os.path.join(path, "inside"))]
    gc.freeze()
    jobs, replies = bytearray(MAX_JOB), bytearray(settings.output)
    while (length := _receive(jobs)) is not None:
        _serve(memoryview(jobs)[:length], memoryview(replies), settings)


def _receive(buffer: bytearray) -> int | None:
    """Read one job into `buffer`; its length, or None at the end of input."""
    head = os.read(0, 4)
    if len(head) < 4:
        return None
    length: int = struct.unpack("=I", head)[0]
    view, got = memoryview(buffer)[:length], 0
    while got < length:
        count = os.readv(0, [view[got:]])
        if count == 0:
            return None
        got += count
    return length


def _serve(job: memoryview, reply: memoryview, settings: Settings) -> None:
    started = time.monotonic()
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            candidate.run(bytes(job), write_fd, settings)
        finally:
            os._exit(80)  # whatever happens, a candidate never comes back into the server
    os.close(write_fd)
    job[:] = bytes(len(job))
    ending, length = _watch(pid, read_fd, reply, started + settings.wall_seconds)
    status, clean = _end(pid, settings)
    if ending == EXITED:  # every writer is dead: what is left in the pipe is all there will be
        ending, length = _drain(read_fd, reply, length)
    os.close(read_fd)
    recycle = ending == TIMEOUT or not clean or not _sweep(settings.scratch)
    _send(HEAD.pack(ending, status, recycle, time.monotonic() - started, length))
    _send(reply[:length])
    reply[:length] = bytes(length)


def _watch(pid: int, read_fd: int, reply: memoryview, deadline: float) -> tuple[int, int]:
    """Collect what the candidate writes until it exits, writes too much or runs out of time."""
    os.set_blocking(read_fd, False)
    exit_fd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(read_fd, select.POLLIN)
    poll.register(exit_fd, select.POLLIN)
    poll.register(0, 0)  # only the hang-up: the grader is gone
    length = 0
    try:
        while (left := deadline - time.monotonic()) > 0:
            ready = dict(poll.poll(left * 1000))
            if 0 in ready:
                os._exit(0)
            if read_fd in ready:
                count = _read_some(read_fd, reply[length:])
                length += count or 0
                if length == len(reply):
                    return OUTPUT, length
                if count == 0:
                    poll.unregister(read_fd)
            if exit_fd in ready:
                return EXITED, length
        return TIMEOUT, length
    finally:
        os.close(exit_fd)


def _read_some(fd: int, view: memoryview) -> int | None:
    """Bytes read, 0 at the end, None when there is nothing now."""
    try:
        return os.readv(fd, [view])
    except BlockingIOError:
        return None


def _drain(read_fd: int, reply: memoryview, length: int) -> tuple[int, int]:
    while count := _read_some(read_fd, reply[length:]):
        length += count
        if length == len(reply):
            return OUTPUT, length
    return EXITED, length


def _end(pid: int, settings: Settings) -> tuple[int, bool]:
    """Kill the candidate and all it left; (its wait status, whether nothing of it remains)."""
    status, deadline = 0, time.monotonic() + 2
    while time.monotonic() < deadline:
        for victim in (-1,) if settings.isolated else _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                status = ended[1] if ended[0] == pid else status
        except ChildProcessError:
            return status, True
        time.sleep(0.0002)
    return status, False


def _children() -> list[int]:
    """Without a pid namespace: the children, orphans of the candidate among them (the server is their reaper)."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def _sweep(scratch: str) -> bool:
    """Empty the scratch folder; False when something stays, and the worker has to start afresh."""
    if os.listdir(scratch):
        for entry in os.scandir(scratch):
            with contextlib.suppress(OSError, RecursionError):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
    return not os.listdir(scratch)


def _send(data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]
