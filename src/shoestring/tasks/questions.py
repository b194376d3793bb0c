"""Arithmetic and small word problems whose answer is the last digit of a running total.

sum    "last digit of 3 + 8 + 4 ?"                      steps "3 + 8 1 + 4 5"
story  "Ann has 3 . gets 8 . loses 4 . last digit ?"    steps "3 . gets 8 1 . loses 4 7"

Guessing the answer at once needs the whole sum modulo ten; in steps each (operand, running digit) pair needs one
line of an addition table. Difficulty is the number of operations. Every word, digit and sign is set off by spaces,
so that a tiny vocabulary of whole words covers the text. Left out: carries, numbers of several digits, units.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from shoestring.core.nouns import Problem
from shoestring.tasks._draw import Draft, Split, draw, matches

VERSION = "1.0"
NAMES = ("Ann", "Bob", "Cid", "Dee")


def make(seed: int, difficulty: int, split: Split = "train", kind: str | None = None) -> Problem:
    """The problem of `seed`; raises UserError for an unknown kind or a difficulty below 1."""
    return draw("questions", VERSION, MAKERS, seed, difficulty, split, kind)


def grade(problems: Sequence[Problem], answers: Sequence[str], *, sandbox: Any = None) -> list[bool]:
    """True where the answer is exactly the gold digit."""
    return [matches(answer, problem.gold) for problem, answer in zip(problems, answers, strict=True)]


def _sum(rng: random.Random, difficulty: int) -> Draft:
    total = rng.randrange(10)
    asked, steps = [str(total)], [str(total)]
    for _ in range(difficulty):
        operand = rng.randrange(10)
        total = (total + operand) % 10
        asked.append(f"+ {operand}")
        steps.append(f"+ {operand} {total}")
    return Draft(f"last digit of {' '.join(asked)} ?", str(total), " ".join(steps))


def _story(rng: random.Random, difficulty: int) -> Draft:
    total = rng.randrange(10)
    asked, steps = [f"has {total}"], [str(total)]
    for _ in range(difficulty):
        operand = rng.randrange(10)
        loses = operand <= total and rng.random() < 0.5  # nobody loses what she does not have
        total += -operand if loses else operand
        event = f"{'loses' if loses else 'gets'} {operand}"
        asked.append(event)
        steps.append(f"{event} {total % 10}")
    events = " . ".join(asked)
    return Draft(f"{_name(events)} {events} . last digit ?", str(total % 10), " . ".join(steps))


def _name(events: str) -> str:
    """The name follows from the events: otherwise a test problem could be a training problem with another name."""
    return NAMES[hashlib.sha256(events.encode()).digest()[0] % len(NAMES)]


MAKERS = {"sum": _sum, "story": _story}
KINDS = tuple(MAKERS)
