"""One worker seen from outside: a fork server in a sandbox, a job in, a reply out."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from typing import NamedTuple

from shoestring.tasks.sandbox.inside.server import HEAD
from shoestring.tasks.sandbox.layers import Layer, start
from shoestring.tasks.sandbox.program import Limits, SandboxError

GRACE = 20.0  # seconds beyond the candidate's own limit before the server itself is given up


class Reply(NamedTuple):
    """How the candidate ended (EXITED, TIMEOUT, OUTPUT), its wait status, its time and what it wrote."""

    ending: int
    status: int
    seconds: float
    data: bytes


class Worker:
    """Starts on the first job and again after it was recycled. Not for several threads at once."""

    def __init__(self, layer: Layer, limits: Limits) -> None:
        self._layer: Layer = layer
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: str | None = None
        self._jobs = 0

    def run(self, job: bytes) -> Reply:
        """The reply to `job`. A worker that dies under it is replaced once; then SandboxError."""
        for last in (False, True):
            try:
                return self._try(job)
            except (OSError, SandboxError) as error:
                log = self.close()
                if last:
                    raise SandboxError(f"the {self._layer} sandbox failed: {error} {log}".strip()) from error
        raise AssertionError("unreachable")

    def close(self) -> str:
        """End the worker and everything in it; what it said on standard error."""
        process, self._process = self._process, None
        if process is None:
            return ""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin and process.stdout
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        self._remove_folder()
        self._log.seek(0)
        with self._log:
            return " ".join(self._log.read(2000).decode(errors="replace").split())

    def _try(self, job: bytes) -> Reply:
        if self._process is None:
            self._start()
        assert self._process and self._process.stdin and self._process.stdout
        deadline = time.monotonic() + self._limits.wall_seconds + GRACE
        out = self._process.stdin.fileno()
        view = memoryview(struct.pack("=I", len(job)) + job)
        while view:
            view = view[os.write(out, view) :]
        fd = self._process.stdout.fileno()
        ending, status, recycle, seconds, length = HEAD.unpack(_read(fd, HEAD.size, deadline))
        reply = Reply(ending, status, seconds, _read(fd, length, deadline))
        self._jobs += 1
        if self._jobs == 1 and self._layer == "namespaces":
            self._remove_folder()  # the root moved away from it: gone now, it cannot outlive a killed grader
        if recycle or self._jobs >= self._limits.jobs_per_worker:
            self.close()
        return reply

    def _remove_folder(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self) -> None:
        started = start(self._layer, self._limits)
        self._folder, self._jobs = started.folder, 0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(  # in a session of its own: killing the group ends all of it
            started.command,
            env=started.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
            start_new_session=True,
            cwd="/",
            user=started.user,
            group=started.user,
            extra_groups=None if started.user is None else [],
        )


def _read(fd: int, count: int, deadline: float) -> bytes:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    data = b""
    while len(data) < count:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise SandboxError("the server did not answer in time.")
        part = os.read(fd, count - len(data))
        if not part:
            raise SandboxError("the server ended.")
        data += part
    return data
