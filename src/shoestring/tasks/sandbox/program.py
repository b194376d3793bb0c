"""What goes into the sandbox and what comes out: Program, Limits, Outcome, and the comparison made outside."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from shoestring.core.errors import UserError

ErrorKind = Literal["timeout", "memory", "crash", "output", "syntax", "exception", "missing"]
ERROR_KINDS: tuple[ErrorKind, ...] = ("timeout", "memory", "crash", "output", "syntax", "exception", "missing")


class SandboxError(RuntimeError):
    """The sandbox itself failed. Never a verdict on the program: nothing may be graded wrong because of it."""


@dataclass(slots=True, frozen=True)
class Limits:
    """What one candidate may use. Sizes are in bytes, times in seconds."""

    cpu_seconds: int = 2
    wall_seconds: float = 4.0
    memory: int = 512 * 2**20  # address space of each process
    processes: int = 8  # with the server and the candidate itself
    file_size: int = 2**20
    open_files: int = 32
    output: int = 2**16  # everything a candidate replies or prints
    scratch: int = 16 * 2**20
    jobs_per_worker: int = 2000  # then the worker starts afresh

    def __post_init__(self) -> None:
        for name in ("cpu_seconds", "wall_seconds", "memory", "output", "scratch", "jobs_per_worker", "file_size"):
            if not getattr(self, name) > 0:
                raise UserError(f"sandbox limit {name} is {getattr(self, name)}; it must be above 0.")
        if self.processes < 2 or self.open_files < 8:
            raise UserError("sandbox limits need at least 2 processes and 8 open files.")


@dataclass(slots=True, frozen=True)
class Program:
    """A candidate and its hidden tests.

    With `entry`, a test is (arguments, expected value) and `entry(*arguments)` is called; values are JSON values, and
    a tuple counts as a list. Without it, a test is ((standard input,), expected standard output) of a whole run.
    """

    source: str
    entry: str = ""
    tests: tuple[tuple[tuple[Any, ...], Any], ...] = ()

    def jobs(self) -> list[bytes]:
        """What is sent into the sandbox, in one or several jobs. Arguments only: no expected value."""
        if not self.tests:
            raise UserError("a program without tests cannot be judged; give at least one (arguments, expected) pair.")
        shared = {"source": self.source, "entry": self.entry}
        if self.entry:
            parts = [{**shared, "arguments": [list(arguments) for arguments, _ in self.tests]}]
        else:
            parts = [{**shared, "stdin": arguments[0] if arguments else ""} for arguments, _ in self.tests]
        try:
            return [json.dumps(part).encode() for part in parts]
        except (TypeError, ValueError) as error:
            raise UserError(f"test arguments must be JSON values: {error}.") from error


@dataclass(slots=True, frozen=True)
class Outcome:
    """`ok` when every test passed. `error` is the first thing that went wrong besides wrong values, if any;
    `detail` is the candidate's own word for it and as trustworthy as the candidate. `values` are what it answered
    (None also where it did not). `seconds` is wall time."""

    ok: bool
    passed: tuple[bool, ...]
    error: ErrorKind | None
    detail: str
    values: tuple[Any, ...]
    seconds: float


def same(value: Any, expected: Any) -> bool:
    """Equal as JSON values: no bool for a number, whole floats equal ints, floats to nine digits, tuple as list."""
    if isinstance(expected, bool) or isinstance(value, bool) or expected is None:
        return value is expected
    if isinstance(expected, (int, float)):
        if not isinstance(value, (int, float)):
            return False
        close = isinstance(expected, float) or isinstance(value, float)
        return value == expected or (close and _close(value, expected))
    if isinstance(expected, str):
        return isinstance(value, str) and value == expected
    if isinstance(expected, (list, tuple)):
        return isinstance(value, list) and len(value) == len(expected) and all(map(same, value, expected))
    if isinstance(expected, dict):
        keys = {str(key): item for key, item in expected.items()}
        return isinstance(value, dict) and value.keys() == keys.keys() and all(same(value[k], keys[k]) for k in keys)
    raise UserError(f"an expected value of type {type(expected).__name__} cannot be compared; use JSON values.")


def same_output(printed: str, expected: str) -> bool:
    """Equal text, spaces at line ends and empty lines at the end aside."""
    return _lines(printed) == _lines(expected)


def _close(a: float, b: float) -> bool:
    try:
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    except OverflowError:  # an int beyond every float
        return False


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
