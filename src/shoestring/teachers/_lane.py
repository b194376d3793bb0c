"""What a session of asking is told and tells: its lanes (one way of asking one teacher each), and what came of them."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, fields

from shoestring.data.claims import Row
from shoestring.teachers._pace import Pace
from shoestring.teachers._price import Rate
from shoestring.teachers._send import Sender
from shoestring.teachers._wire import Body


@dataclass(slots=True)
class Lane:
    """One way of asking one teacher."""

    name: str
    how: int
    sender: Sender
    body: Body
    pace: Pace
    rate: Rate
    model: str
    max_tokens: int
    n: int = 1  # samples of a question in one request
    stream: bool = False
    tries: int = 5  # attempts at a row that fails in a way worth repeating
    drop_cut: bool = False  # answers that were cut off are not kept
    patience_s: float = 600.0  # how long to wait for a server that is gone
    fresh: deque[Row] = field(default_factory=deque)
    last: int = 0  # the last row handed out
    drained: bool = False
    down_since: float | None = None
    heard: bool = False  # it has answered something in this session
    misses: int = 0  # replies that were final errors, with no answer before them


@dataclass(slots=True)
class Told:
    """What a session did, for people and JSON; money in pico-dollars."""

    answers: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cached: int = 0
    pico: int = 0
    truncated: int = 0
    filtered: int = 0
    failed: int = 0
    estimated: int = 0  # replies whose token counts were missing or absurd: billed at their worst
    over_estimate: int = 0  # replies that used more than was asked for
    errors: Counter[str] = field(default_factory=Counter)
    other_models: Counter[str] = field(default_factory=Counter)
    asked_longer: int = 0  # answers to questions whose first one was cut off, asked with more tokens
    whole_longer: int = 0  # those of them that were not cut off again
    graded: int = 0  # answers of the sample that is graded while they come
    right: int = 0  # those of them that are right
    stopped: str | None = None  # why before the end; None: all was asked
    mistake: bool = False  # and that is the user's to mend

    @property
    def accepted(self) -> float | None:
        """The share of answers that are right, of a sample; where questions bring no gold, of those that ended by
        themselves. None before there is any."""
        if self.graded:
            return self.right / self.graded
        came = self.answers + self.failed
        return max(0, self.answers - self.truncated - self.filtered) / came if self.answers and came else None

    def add(self, other: Told) -> None:
        """Add what another session did."""
        for one in fields(self):
            if one.name not in ("stopped", "mistake"):
                setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))
        self.stopped, self.mistake = self.stopped or other.stopped, self.mistake or other.mistake
