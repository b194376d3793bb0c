"""What the server is told at its start, and the exit codes by which a candidate names its own failure."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["syntax", "memory", "exception", "missing"]

EXITS: dict[Kind, int] = {"syntax": 81, "memory": 82, "exception": 83, "missing": 84}


class Settings(NamedTuple):
    """Limits of one candidate, and where it lives. `isolated`: the server is process 1 of its own pid namespace."""

    cpu_seconds: int
    wall_seconds: float
    memory: int
    processes: int
    file_size: int
    open_files: int
    output: int
    scratch: str
    isolated: bool
    uid: int | None  # become this user first; None: stay
