"""A function in a process beside ours that can be killed: time limits that work in any thread.

Graders of other people's making may hang on what a model wrote, and their own time limits are alarms, which only the
main thread may set. Here the function runs in a process of its own: late, it is killed and a fresh one takes its
place. Arguments and results are JSON values, one line each. This protects time and memory, not secrets: what could
execute code has to be refused before it gets here.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from typing import Any

from shoestring.core.errors import UserError

START_SECONDS = 120.0  # some graders import half of mathematics
MEMORY = 4 * 2**30


class Late(Exception):
    """The function did not answer in time."""


class Aside:
    """`function` ("package.module:name") in its own process, started by the first call and killed when it is late."""

    def __init__(self, function: str) -> None:
        self._function = function
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any, seconds: float) -> Any:
        """The function's result within `seconds`.

        Raises Late; UserError for a missing package; ValueError for what the function raised itself; RuntimeError
        when the process dies.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                reply = self._ask(json.dumps(arguments).encode() + b"\n", seconds)
            except BaseException:
                self.close()
                raise
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["result"]

    def close(self) -> None:
        """End the process. The next call starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> None:
        self.close()
        command = [sys.executable, "-c", "from shoestring.tasks._aside import serve; serve()", self._function]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        try:
            reply = self._ask(b"", START_SECONDS)
        except BaseException:
            self.close()
            raise
        if "missing" in reply:
            self.close()
            raise UserError(f'the package "{reply["missing"]}" is not installed; pip install "shoestring[tasks]".')

    def _ask(self, line: bytes, seconds: float) -> dict[str, Any]:
        assert self._process and self._process.stdin and self._process.stdout
        self._process.stdin.write(line)
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        deadline, data = time.monotonic() + seconds, b""
        while not data.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise Late(f"{self._function} took longer than {seconds} s.")
            part = os.read(self._process.stdout.fileno(), 65536)
            if not part:
                raise RuntimeError(f"the process of {self._function} ended.")
            data += part
        reply: dict[str, Any] = json.loads(data)
        return reply


def serve() -> None:
    """The other side: answer every line until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the function prints is not a reply
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    module, _, name = sys.argv[1].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        reply: dict[str, Any] = {}
    except ModuleNotFoundError as error:
        reply = {"missing": error.name}
    print(json.dumps(reply), file=replies, flush=True)
    for line in sys.stdin:
        try:
            reply = {"result": function(*json.loads(line))}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(reply), file=replies, flush=True)
