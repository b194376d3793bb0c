"""How far a stage is: a bar on a terminal, a plain line now and then elsewhere, nothing when quiet.

Both show the share done, ETA, tokens/s and the running cost. All of it goes to standard error: standard output
belongs to what a command reports.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar
    from rich.progress import TaskID


class Progress:
    """`with Progress(total, title="sft") as bar: bar.update(step, tokens=4096, loss=2.1)`.

    Args:
        total: what `update` counts up to, in `unit` (steps, problems, FLOPs ...).
        title: what is under way.
        unit: printed behind the count.
        usd_per_hour: the machine's price, for the running cost; 0 leaves it out.
        quiet: show nothing at all.
        every_s: seconds between plain lines where there is no terminal.
        stream: where to, standard error unless told.
        clock: seconds, monotonic (tests bring their own).
    """

    def __init__(
        self,
        total: float,
        *,
        title: str = "",
        unit: str = "steps",
        usd_per_hour: float = 0.0,
        quiet: bool = False,
        every_s: float = 15.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.title, self.unit = total, title, unit
        self.usd_per_hour, self.quiet, self.every_s = usd_per_hour, quiet, every_s
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._first: tuple[float, float, int] | None = None  # (time, done, tokens) at the first update
        self._bar: RichBar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._start = self._last_line = self._clock()
        if not self.quiet and self._stream.isatty():
            self._bar = _bar(self._stream)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, facts="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: float, *, tokens: int = 0, **metrics: float) -> None:
        """`done` of the total is done and `tokens` were processed, both counted from the stage's very beginning.

        Speed and ETA are taken from the first update on: a resumed stage begins its count further up.
        """
        now = self._clock()
        if self._first is None:
            self._first = (now, done, tokens)
        if self.quiet:
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, facts=self._facts(now, done, tokens, metrics))
        elif now - self._last_line >= self.every_s or done >= self.total:
            self._last_line = now
            share = 100 * done / self.total if self.total else 100.0
            line = f"{self.title}  {_count(done)}/{_count(self.total)} {self.unit} ({share:.0f}%)"
            self._say(f"{line}  {self._facts(now, done, tokens, metrics)}")

    def _say(self, line: str) -> None:
        """Print a line; where nobody reads any more (a closed pipe, a terminal that is gone) nothing from then on:
        what is under way is worth more than its display."""
        try:
            print(line, file=self._stream, flush=True)
        except OSError:
            self.quiet = True

    def _facts(self, now: float, done: float, tokens: int, metrics: dict[str, float]) -> str:
        assert self._first is not None
        seconds, more, more_tokens = now - self._first[0], done - self._first[1], tokens - self._first[2]
        facts = []
        if seconds > 0 and more > 0 and done < self.total:
            facts.append(f"{_duration(seconds * (self.total - done) / more)} left")
        if seconds > 0 and more_tokens > 0:
            facts.append(f"{_count(more_tokens / seconds)} tokens/s")
        if self.usd_per_hour:
            facts.append(f"${(now - self._start) / 3600 * self.usd_per_hour:.4f}")
        facts += [f"{name} {value:.4g}" for name, value in metrics.items()]
        return "  ".join(facts)


def _bar(stream: TextIO) -> RichBar:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn()]
    return Progress(*columns, TextColumn("{task.fields[facts]}"), console=Console(file=stream))


def _count(number: float) -> str:
    """Three digits and a unit: 950, 12.3k, 4.50M, 1.20e15."""
    for limit, unit in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "G")):
        if abs(number) < 0.9995 * limit:  # what would be rounded to 1000 is 1 of the next unit
            scaled = number / (limit / 1e3)
            return f"{scaled:.0f}" if not unit and number == int(number) else f"{scaled:.3g}{unit}"
    return f"{number:.2e}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
