"""One candidate's process, from the fork to its end. All of it belongs to the candidate: trust nothing it says.

`run` replies on a pipe: one JSON line per test in function mode, the raw standard output in stdin mode. It never
returns. Whatever the candidate does to this code while it runs can only change its own replies.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any, NoReturn

from .settings import EXITS, Kind, Settings

REPLY_FD = 3


def run(job: bytes, reply_fd: int, settings: Settings) -> NoReturn:
    """Become the candidate of `job`."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    spare = os.dup2(reply_fd, 100)  # out of the way while 0 to 3 are laid
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.dup2(spare, REPLY_FD)
    os.closerange(REPLY_FD + 1, 1024)  # the protocol pipes are gone from here on
    os.chdir(settings.scratch)
    task = json.loads(job)
    if not task["entry"]:
        _lay_stdin(task["stdin"])
    _limit(settings)
    status = _call(task) if task["entry"] else _script(task)
    os._exit(status)


def _lay_stdin(text: str) -> None:
    """An unlinked file as standard input: no process has to feed it."""
    with open("stdin", "w") as file:
        file.write(text)
    fd = os.open("stdin", os.O_RDONLY)
    os.unlink("stdin")
    os.dup2(fd, 0)
    os.close(fd)


def _limit(settings: Settings) -> None:
    cpu = settings.cpu_seconds
    for what, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, settings.memory, settings.memory),
        (resource.RLIMIT_NPROC, settings.processes, settings.processes),
        (resource.RLIMIT_FSIZE, settings.file_size, settings.file_size),
        (resource.RLIMIT_NOFILE, settings.open_files, settings.open_files),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        _, most = resource.getrlimit(what)
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(what, (soft, hard))


def _call(task: dict[str, Any]) -> int:
    """Define the program, then call its entry once for each test."""
    space: dict[str, Any] = {"__name__": "candidate", "__builtins__": __builtins__}
    try:
        exec(compile(task["source"], "<candidate>", "exec"), space)
        entry = space[task["entry"]]
    except BaseException as error:
        lost = isinstance(error, KeyError) and task["entry"] not in space
        kind: Kind = "missing" if lost else _kind(error)
        _reply({"error": kind, "detail": _detail(error)})
        return EXITS[kind]
    for index, arguments in enumerate(task["arguments"]):
        try:
            value = entry(*arguments)
        except BaseException as error:
            _reply({"test": index, "error": _kind(error), "detail": _detail(error)})
            continue
        try:
            _reply({"test": index, "value": value})
        except BaseException as error:
            _reply({"test": index, "error": "output", "detail": _detail(error)})
    return 0


def _script(task: dict[str, Any]) -> int:
    """Run the program whole, with standard input and output of its own."""
    os.dup2(REPLY_FD, 1)
    os.close(REPLY_FD)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    try:
        exec(compile(task["source"], "<candidate>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    except SystemExit as error:
        sys.stdout.flush()
        return 0 if error.code in (None, 0) else EXITS["exception"]
    except BaseException as error:
        return EXITS[_kind(error)]
    sys.stdout.flush()
    return 0


def _reply(message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(REPLY_FD, data) :]


def _kind(error: BaseException) -> Kind:
    if isinstance(error, SyntaxError):
        return "syntax"
    return "memory" if isinstance(error, MemoryError) else "exception"


def _detail(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except BaseException:  # an exception of the candidate's own making
        return "unprintable"
