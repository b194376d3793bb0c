"""Sandbox: chooses a layer, keeps its workers and turns their replies into outcomes."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any, Literal

from shoestring.core.errors import UserError, did_you_mean
from shoestring.tasks.sandbox.inside.server import EXITED, MAX_JOB, OUTPUT, TIMEOUT
from shoestring.tasks.sandbox.inside.settings import EXITS
from shoestring.tasks.sandbox.layers import SAFE_LAYERS, Layer, missing
from shoestring.tasks.sandbox.program import (
    ERROR_KINDS,
    ErrorKind,
    Limits,
    Outcome,
    Program,
    SandboxError,
    same,
    same_output,
)
from shoestring.tasks.sandbox.worker import Reply, Worker

NAMES: dict[int, ErrorKind] = {code: kind for kind, code in EXITS.items()}
# What a layer must show before it is trusted.
PROBE = """
import os, socket
def f(processes):
    told = {"it runs as root": os.getuid() == 0, "other processes are in reach": os.getppid() != 1}
    told["the system is in sight"] = os.path.exists("/etc/passwd") or os.path.exists("/home")
    told["the system can be written"] = os.access("/", os.W_OK)
    told["a network is in reach"] = {name for _, name in socket.if_nameindex()} > {"lo"}
    told["the limit on processes does not bind"] = True
    try:
        for _ in range(processes):
            os.fork() or os._exit(0)
    except OSError:
        told["the limit on processes does not bind"] = False
    return [what for what, wrong in told.items() if wrong]
"""


class Sandbox:
    """Runs programs on `workers` workers of one layer. A context manager; `close` ends everything it started."""

    def __init__(self, layer: Layer, workers: int, limits: Limits) -> None:
        if workers < 1:
            raise UserError(f"the sandbox needs at least one worker, not {workers}.")
        self.layer: Layer = layer
        self.limits = limits
        self._workers = [Worker(layer, limits) for _ in range(workers)]
        self._busy = threading.Lock()

    @classmethod
    def open(
        cls, layer: Literal["auto"] | Layer = "auto", *, workers: int = 2, limits: Limits | None = None
    ) -> Sandbox:
        """A sandbox of `layer`, tried before it is returned; "auto" takes the first safe one that works here.

        Raises UserError when none does, saying why. "unsafe" has to be asked for by name.
        """
        known = ("auto", *SAFE_LAYERS, "unsafe")
        if layer not in known:
            raise UserError(f'sandbox layer "{layer}" is unknown.{did_you_mean(layer, known)}')
        reasons = []
        for name in SAFE_LAYERS if layer == "auto" else (layer,):
            reason = missing(name)
            if reason is None:
                sandbox = cls(name, workers, limits or Limits())
                reason = sandbox._probe()
                if reason is None:
                    return sandbox
                sandbox.close()
            reasons.append(f"{name}: {reason}")
        raise UserError(
            f"no sandbox can be had here ({'; '.join(reasons)}); install bubblewrap, or ask for the layer "
            '"unsafe" if you trust the programs with this machine.'
        )

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        """The outcome of each program, in order. Raises SandboxError when the sandbox, not a program, fails."""
        jobs = [program.jobs() for program in programs]
        runs = [all(len(job) <= MAX_JOB for job in group) for group in jobs]
        with self._busy:
            replies = iter(self._run_jobs([job for group, run in zip(jobs, runs, strict=True) if run for job in group]))
        return [
            _outcome(program, [next(replies) for _ in group], self.limits) if run else _too_long(program)
            for program, group, run in zip(programs, jobs, runs, strict=True)
        ]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run_jobs(self, jobs: Sequence[bytes]) -> list[Reply]:
        """One thread a worker, this one included; the first failure stops them all and is raised."""
        replies: list[Reply] = [NO_REPLY] * len(jobs)
        todo, lock = iter(enumerate(jobs)), threading.Lock()
        failures: list[BaseException] = []

        def work(worker: Worker) -> None:
            while not failures:
                with lock:
                    index, job = next(todo, (0, None))
                if job is None:
                    return
                try:
                    replies[index] = worker.run(job)
                except BaseException as error:  # raised below, an interrupt from the keyboard included
                    failures.append(error)

        others = [threading.Thread(target=work, args=(worker,)) for worker in self._workers[1 : len(jobs)]]
        for thread in others:
            thread.start()
        work(self._workers[0])
        for thread in others:
            thread.join()
        if failures:
            raise failures[0]
        return replies

    def _probe(self) -> str | None:
        """Why this layer cannot be trusted or used here, or None."""
        try:
            outcome = self.run([Program(source=PROBE, entry="f", tests=(((self.limits.processes,), []),))])[0]
        except SandboxError as error:
            return str(error)
        if outcome.error is None and (outcome.ok or self.layer == "unsafe"):
            return None
        return f"its probe says: {outcome.error or ', '.join(outcome.values[0])} {outcome.detail}".strip()


NO_REPLY = Reply(TIMEOUT, 0, 0.0, b"")


def _outcome(program: Program, replies: Sequence[Reply], limits: Limits) -> Outcome:
    return (_of_calls if program.entry else _of_scripts)(program, replies, limits)


def _too_long(program: Program) -> Outcome:
    nothing = (None,) * len(program.tests)
    return Outcome(False, (False,) * len(nothing), "output", f"longer than {MAX_JOB} bytes", nothing, 0.0)


def _of_calls(program: Program, replies: Sequence[Reply], limits: Limits) -> Outcome:
    reply = replies[0]
    said = _parse(reply.data, len(program.tests))
    values = tuple(said.get(index, {}).get("value") for index in range(len(program.tests)))
    passed = tuple(
        "value" in said.get(index, {}) and same(values[index], expected)
        for index, (_, expected) in enumerate(program.tests)
    )
    error = _ending(reply, limits)
    complaint = next((line for line in said.values() if "error" in line), {})
    if error in (None, "exception") and complaint:
        error = complaint["error"] if complaint["error"] in ERROR_KINDS else "exception"
    if error is None and not all("value" in said.get(index, {}) for index in range(len(passed))):
        error = "missing"
    return Outcome(all(passed), passed, error, str(complaint.get("detail", ""))[:200], values, reply.seconds)


def _of_scripts(program: Program, replies: Sequence[Reply], limits: Limits) -> Outcome:
    errors = [_ending(reply, limits) for reply in replies]
    values = tuple(reply.data.decode(errors="replace") for reply in replies)
    passed = tuple(
        error is None and same_output(value, expected)
        for error, value, (_, expected) in zip(errors, values, program.tests, strict=True)
    )
    seconds = sum(reply.seconds for reply in replies)
    return Outcome(all(passed), passed, next((e for e in errors if e), None), "", values, seconds)


def _parse(data: bytes, count: int) -> dict[int, dict[str, Any]]:
    """The candidate's first line on each test (-1: on the whole program). Anything odd is no answer."""
    said: dict[int, dict[str, Any]] = {}
    for line in data.split(b"\n"):
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(message, dict):
            index = message.get("test", -1)
            if type(index) is int and -1 <= index < count:
                said.setdefault(index, message)
    return said


def _ending(reply: Reply, limits: Limits) -> ErrorKind | None:
    """What the way it ended says."""
    if reply.ending != EXITED:
        return "output" if reply.ending == OUTPUT else "timeout"
    if os.WIFSIGNALED(reply.status):
        number = os.WTERMSIG(reply.status)
        if number == signal.SIGXCPU or (number == signal.SIGKILL and reply.seconds >= limits.cpu_seconds):
            return "timeout"
        return "output" if number == signal.SIGXFSZ else "crash"
    code = os.WEXITSTATUS(reply.status)
    return None if code == 0 else NAMES.get(code, "crash")
