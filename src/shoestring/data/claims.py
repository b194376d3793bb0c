"""What a traces store is told and answers: planned questions, rows, claims and what comes of them, purse and budget."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple


class Planned(NamedTuple):
    """A question to put: its hash, its messages as JSON, the user's id, the problem behind it as JSON, trace ids."""

    hash: str
    messages: str
    ref: str | None
    problem: str | None
    traces: list[str]  # one a sample


class Row(NamedTuple):
    """A planned row, as it is handed out for sending."""

    id: int
    trace: str
    sample: int
    attempts: int
    turn: int
    question: int
    messages: str


class Claim(NamedTuple):
    """Ask to send `ids` in one request that costs `pico` and takes `tokens` at worst."""

    ids: tuple[int, ...]
    pico: int
    tokens: int


class Answer(NamedTuple):
    """One row's answer."""

    row: int
    finish: str
    tokens_in: int
    tokens_out: int
    pico: int
    date: str
    body: str


class Settled(NamedTuple):
    """A claim came back: answers, what they cost, and rows that got none and are planned again."""

    claim: Claim
    answers: list[Answer]
    back: tuple[int, ...]
    pico: int
    tokens: int
    cut: tuple[int, ...] = ()  # rows whose answer was cut off and is not kept: paid for, and never asked again


class Returned(NamedTuple):
    """A claim failed: perhaps billed (`doubt`), under a new key the next time (`turn`), for good (`final`)."""

    claim: Claim
    doubt: bool
    turn: bool
    final: bool
    kind: str
    told: str


Op = Claim | Settled | Returned
CUT = "cut off"  # the kind of failure of a row in `Settled.cut`
GRANTED, POOR, TAKEN = range(3)  # what a claim is answered


@dataclass(slots=True)
class Purse:
    """Totals of the store. Money in pico-dollars. `doubt` is counted as spent wherever a limit is held."""

    spent: int = 0
    reserved: int = 0
    doubt: int = 0
    tokens: int = 0
    tokens_reserved: int = 0
    tokens_doubt: int = 0
    answers: int = 0
    in_flight: int = 0
    sends: int = 0
    doubts: int = 0  # rows that were perhaps billed without an answer, counted each time

    def settle(self, op: Settled | Returned) -> None:
        """Free what was reserved for a claim that came back, and count what it cost or may have cost."""
        self.reserved -= op.claim.pico
        self.tokens_reserved -= op.claim.tokens
        self.in_flight -= len(op.claim.ids)
        if type(op) is Settled:
            self.spent += op.pico
            self.tokens += op.tokens
            self.answers += len(op.answers)
        elif type(op) is Returned and op.doubt:
            self.doubt += op.claim.pico
            self.tokens_doubt += op.claim.tokens
            self.doubts += len(op.claim.ids)


PURSE = tuple(field.name for field in fields(Purse))


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits over the store's whole life; None is none."""

    pico: int | None = None
    tokens: int | None = None
    answers: int | None = None

    def allows(self, purse: Purse, claim: Claim) -> bool:
        """Whether everything spent, in doubt and in flight stays within the limits with `claim` on top."""
        if self.pico is not None and purse.spent + purse.reserved + purse.doubt + claim.pico > self.pico:
            return False
        used = purse.tokens + purse.tokens_reserved + purse.tokens_doubt
        if self.tokens is not None and used + claim.tokens > self.tokens:
            return False
        return self.answers is None or purse.answers + purse.in_flight + len(claim.ids) <= self.answers


def decide(
    budget: Budget, purse: Purse, claims: Sequence[Claim], taken: Collection[int] = ()
) -> tuple[list[int], list[Claim]]:
    """(what each claim is answered, those granted), their worst case reserved in `purse`; rows of `taken` are gone."""
    answers, granted = [], []
    for claim in claims:
        if taken and any(row in taken for row in claim.ids):
            answers.append(TAKEN)
        elif budget.allows(purse, claim):
            answers.append(GRANTED)
            granted.append(claim)
            purse.reserved += claim.pico
            purse.tokens_reserved += claim.tokens
            purse.in_flight += len(claim.ids)
            purse.sends += 1
        else:
            answers.append(POOR)
    return answers, granted
