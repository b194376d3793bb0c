"""Arithmetic and small word problems whose answer is the last digit of a running total.

sum    "sum of a 3 b 5 c 4 , last digit ?"                  steps "a 3 3 b 5 8 c 4 2"
story  "Ann has 3 Bob gives 5 Cid takes 4 , last digit ?"   steps "Ann has 3 3 Bob gives 5 8 Cid takes 4 4"

Guessing the answer at once needs the whole sum modulo ten; in steps, each (label, operand, running digit) needs one
look at the question and one line of an addition table. The labels (letters, names) are what the steps look up.
Difficulty is the number of operations. Every word and digit is set off by spaces, so that a tiny vocabulary of whole
words covers the text. Left out: carries, numbers of several digits, units.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Sequence
from typing import Any

from shoestring.core.nouns import Problem
from shoestring.tasks._draw import Draft, Split, check_difficulty, draw, matches

VERSION = "1.0"
NAMES = (
    "Ann",
    "Bob",
    "Cid",
    "Dee",
    "Eve",
    "Fay",
    "Gus",
    "Hal",
    "Ivy",
    "Jon",
    "Kay",
    "Lea",
    "Max",
    "Ned",
    "Oli",
    "Pam",
    "Rex",
)
OPERANDS = (1, 2, 3, 4, 5)  # what is added or taken after the first digit: a table of fifty lines


def make(seed: int, difficulty: int, split: Split = "train", kind: str | None = None) -> Problem:
    """The problem of `seed`; raises UserError for an unknown kind or an impossible difficulty (story: at most 16)."""
    return draw("questions", VERSION, MAKERS, seed, difficulty, split, kind)


def grade(problems: Sequence[Problem], answers: Sequence[str], *, sandbox: Any = None) -> list[bool]:
    """True where the answer is exactly the gold digit."""
    return [matches(answer, problem.gold) for problem, answer in zip(problems, answers, strict=True)]


def _sum(rng: random.Random, difficulty: int) -> Draft:
    check_difficulty("sum", difficulty, len(string.ascii_lowercase) - 1)
    total = 0
    asked: list[str] = []
    steps: list[str] = []
    for label in string.ascii_lowercase[: difficulty + 1]:
        operand = rng.choice(OPERANDS) if asked else rng.randrange(10)
        total = (total + operand) % 10
        asked.append(f"{label} {operand}")
        steps.append(f"{label} {operand} {total}")
    return Draft(f"sum of {' '.join(asked)} , last digit ?", str(total), " ".join(steps))


def _story(rng: random.Random, difficulty: int) -> Draft:
    check_difficulty("story", difficulty, len(NAMES) - 1)
    total = rng.randrange(10)
    events, totals = [f"has {total}"], [total]
    for _ in range(difficulty):
        operand = rng.choice(OPERANDS)
        takes = operand <= total and rng.random() < 0.5  # nobody takes what is not there
        total += -operand if takes else operand
        events.append(f"{'takes' if takes else 'gives'} {operand}")
        totals.append(total)
    told = [f"{name} {event}" for name, event in zip(_names(" ".join(events)), events, strict=False)]
    steps = [f"{event} {value % 10}" for event, value in zip(told, totals, strict=True)]
    return Draft(f"{' '.join(told)} , last digit ?", str(total % 10), " ".join(steps))


def _names(events: str) -> list[str]:
    """The names follow from the events: otherwise a test problem could be a training problem with other names."""
    return random.Random(hashlib.sha256(events.encode()).digest()).sample(NAMES, len(NAMES))


MAKERS = {"sum": _sum, "story": _story}
KINDS = tuple(MAKERS)
