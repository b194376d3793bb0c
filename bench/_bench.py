"""What every benchmark shares: contestants in processes of their own, taken in turn; medians, a table, one JSON line.

A contestant is `python bench/NAME.py --serve WHO --options JSON`, run by this environment's Python (ours) or by that
of `.venv-peers` (theirs). It says when it is ready and then does one step each time it is asked, so that all of them
share the same minutes of the same machine, and each one's memory is its own. Messages are JSON lines on the process's
standard output, which libraries cannot reach: what they print goes to standard error. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
NO_PEERS = "no .venv-peers here: `make peers` makes it"


# ---- in the contestant's process
def peak_mb() -> float:
    """The most memory this process has held, in MB. VmHWM: ru_maxrss also counts the process it was forked from."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class Channel:
    """The contestant's end: `ready` once, then `ask` waits for a step and `answer` reports it."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    def _say(self, message: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def ready(self, **facts: Any) -> None:
        self._say({"ready": True, "start_mb": peak_mb(), **facts})

    def ask(self) -> dict[str, Any] | None:
        """The next request; None when there are no more."""
        line = sys.stdin.readline()
        return json.loads(line) if line.strip() else None

    def answer(self, seconds: float, cpu_seconds: float, **facts: Any) -> None:
        self._say({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak_mb(), **facts})

    def serve(self, step: Callable[[], Mapping[str, Any]], **facts: Any) -> None:
        """Be ready, then do one timed `step` for each request."""
        self.ready(**facts)
        while self.ask() is not None:
            clock = Clock()
            found = step()
            self.answer(*clock.read(), **found)


class Clock:
    """Wall and processor seconds (all threads) since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


# ---- in the benchmark's process
class Failed(Exception):
    """A contestant that did not start or died, with its last words."""


@dataclass
class Contestant:
    """A contestant's process. Opens it on entry; raises Failed when it cannot get ready."""

    name: str
    script: Path
    who: str
    options: Mapping[str, Any]
    threads: int
    python: str = sys.executable
    facts: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> Contestant:
        if not Path(self.python).exists():
            raise Failed(NO_PEERS)
        threads = str(self.threads)
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [self.python, str(self.script), "--serve", self.who, "--options", json.dumps(self.options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | offline | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )  # fmt: skip
        self._words: deque[str] = deque(maxlen=200)
        self._listener = Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            self.facts = self._hear()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(timeout=5)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def _listen(self) -> None:
        """Keep the end of what it prints, so that a full pipe never stops it and a failure can be explained."""
        assert self._process.stderr is not None
        with contextlib.suppress(ValueError):
            self._words.extend(self._process.stderr)

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._listener.join(timeout=5)
            if code < 0:  # out of memory, for one: its last words say nothing about that
                raise Failed(f"{self.name} stopped: killed by signal {-code}")
            spoken = [word.strip() for word in self._words if word.strip()]
            raise Failed(f"{self.name} stopped: {spoken[-1] if spoken else f'exit code {code}'}")
        found: dict[str, Any] = json.loads(line)
        return found

    def step(self, *, keep: bool = True) -> dict[str, Any]:
        """One step, timed in its own process. `keep` False: a warm-up."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write('{"step": true}\n')
            self._process.stdin.flush()
        except OSError as error:
            raise Failed(f"{self.name} stopped: {error}") from error
        found = self._hear()
        self.steps.append(found | {"kept": keep})
        return found

    def kept(self, value: str = "seconds") -> list[float]:
        return [step[value] for step in self.steps if step["kept"]]

    @property
    def peak_mb(self) -> float:
        return max(step["peak_mb"] for step in self.steps)


def interleave(contestants: Sequence[Contestant], *, warm_up: int, repeats: int, turn: float = 0.0) -> None:
    """All contestants in turn, `repeats` times; every other round backwards, so that nobody always follows the same.

    A turn lasts `turn` seconds at least: who is done sooner steps again, and all its steps count. Else a fast
    contestant among slow ones is always timed after a long sleep, out of which a machine wakes slowly.
    """
    for round_ in range(warm_up + repeats):
        for contestant in contestants if round_ % 2 == 0 else reversed(contestants):
            until = time.monotonic() + turn
            contestant.step(keep=round_ >= warm_up)
            while time.monotonic() < until:
                contestant.step(keep=round_ >= warm_up)
        done = ", ".join(f"{c.name} {c.steps[-1]['seconds']:.3f} s" for c in contestants)
        print(f"round {round_ + 1} of {warm_up + repeats}: {done}", file=sys.stderr, flush=True)


def scout(candidates: Iterable[Contestant], *, warm_up: int, repeats: int) -> tuple[list[Contestant], dict[str, str]]:
    """Each candidate alone, one after the other, fastest first; and the reason of each that could not run."""
    ran, reasons = [], {}
    for candidate in candidates:
        try:
            with candidate:
                interleave([candidate], warm_up=warm_up, repeats=repeats)
            ran.append(candidate)
        except Failed as reason:
            reasons[candidate.name] = str(reason)
            print(f"{candidate.name}: {reason}", file=sys.stderr, flush=True)
    return sorted(ran, key=lambda c: statistics.median(c.kept())), reasons


@contextlib.contextmanager
def opened(contestants: Sequence[Contestant]) -> Iterator[list[Contestant]]:
    """All of them at once, ready."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contestant) for contestant in contestants]


# ---- the command line and what is printed
def parser(doc: str, *, repeats: int) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--peers", default="all", help="all, none, or names separated by commas")
    found.add_argument("--repeats", type=int, default=repeats, help=f"timed rounds (default {repeats})")
    found.add_argument("--warm-up", type=int, default=2, help="rounds before them (default 2)")
    found.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every contestant (default: all)")
    found.add_argument("--small", action="store_true", help="tiny sizes: does it run, not how fast")
    found.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of our products")
    found.add_argument("--peer-python", default=str(PEER_PYTHON), help="the interpreter that has the peers")
    found.add_argument("--serve", help=argparse.SUPPRESS)
    found.add_argument("--options", type=json.loads, default={}, help=argparse.SUPPRESS)
    return found


def wanted(peers: str, known: Sequence[str]) -> list[str]:
    """The peers asked for; "bf16" asks for every name that contains it. Exits with a sentence for what is unknown."""
    if peers == "none":
        return []
    chosen = [name for name in known if peers == "all" or any(part.strip() in name for part in peers.split(","))]
    if not chosen:
        raise SystemExit(f'no peer matches "{peers}"; known: {", ".join(known)}')
    return chosen


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median [least, most]."""
    if not values:
        return "-"
    low, mid, high = min(values), statistics.median(values), max(values)
    return f"{mid:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, aligned."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def result(
    name: str, metric: str, unit: str, ours: float, peers: Mapping[str, float], *, limit: float | None = None,
    versions: Mapping[str, str], small: bool = False, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """One entry of the JSON line. Less is better in every metric here: `ratio` is the best peer's value over ours,
    `share_of_limit` is the limit over ours."""
    best = min(peers, key=lambda peer: peers[peer]) if peers else None
    return {
        "name": name, "metric": metric, "unit": unit, "ours": ours, "peers": dict(peers), "best_peer": best,
        "ratio": peers[best] / ours if best is not None else None, "limit": limit,
        "share_of_limit": limit / ours if limit is not None else None, "machine": machine(), "versions": dict(versions),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "small": small, **more,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory, system: nothing that names the machine."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return {"cpu": cpu, "cores": cores, "memory_gb": memory, "os": platform.system(), "load": os.getloadavg()[0]}


def versions(*packages: str) -> dict[str, str]:
    """Of Python and the named packages where this runs; those that are absent are left out."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
