"""Truth-tellers and liars, chains of propositions, and orders tracked through swaps.

liars  "A is honest . B says A lies . C says B lies . is C honest ?"    steps "A yes . B lies no . C lies yes"
xor    "T xor F iff F ?"  (from left to right)                          steps "T xor F T iff F F"
order  "A B C . swap 1 2 . swap 2 3 . first ?"                          steps "A B C . 1 2 B A C . 2 3 B C A"

The first two are running parity in disguise and the third composes permutations: hard to answer at once for a
small network, easy as a chain of (operand, running state) steps. Difficulty is the number of statements, connectives
or swaps. Left out: puzzles that need search.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import Any

from shoestring.core.nouns import Problem
from shoestring.tasks._draw import Draft, Split, check_difficulty, draw, matches

VERSION = "1.0"
PLACES = ("first", "second", "third")
SWAPS = ((1, 2), (2, 3), (1, 3))


def make(seed: int, difficulty: int, split: Split = "train", kind: str | None = None) -> Problem:
    """The problem of `seed`; raises UserError for an unknown kind or an impossible difficulty (liars: at most 25)."""
    return draw("logic", VERSION, MAKERS, seed, difficulty, split, kind)


def grade(problems: Sequence[Problem], answers: Sequence[str], *, sandbox: Any = None) -> list[bool]:
    """True where the answer is exactly the gold word or letter."""
    return [matches(answer, problem.gold) for problem, answer in zip(problems, answers, strict=True)]


def _liars(rng: random.Random, difficulty: int) -> Draft:
    check_difficulty("liars", difficulty, len(string.ascii_uppercase) - 1)
    honest = rng.random() < 0.5
    asked = ["A is honest" if honest else "A lies"]
    steps = [f"A {_yes(honest)}"]
    for before, who in zip(string.ascii_uppercase, string.ascii_uppercase[1 : difficulty + 1], strict=False):
        praises = rng.random() < 0.5
        honest = praises == honest  # a true statement about the one before: honest; a false one: a liar
        claim = "is honest" if praises else "lies"
        asked.append(f"{who} says {before} {claim}")
        steps.append(f"{who} {claim.split()[-1]} {_yes(honest)}")
    asked.append(f"is {who} honest ?")
    return Draft(" . ".join(asked), _yes(honest), " . ".join(steps))


def _xor(rng: random.Random, difficulty: int) -> Draft:
    value = rng.random() < 0.5
    asked, steps = [_letter(value)], [_letter(value)]
    for _ in range(difficulty):
        operand, connective = rng.random() < 0.5, rng.choice(("xor", "iff"))
        value = (value != operand) if connective == "xor" else (value == operand)
        asked.append(f"{connective} {_letter(operand)}")
        steps.append(f"{connective} {_letter(operand)} {_letter(value)}")
    return Draft(f"{' '.join(asked)} ?", _letter(value), " ".join(steps))


def _order(rng: random.Random, difficulty: int) -> Draft:
    row = ["A", "B", "C"]
    rng.shuffle(row)
    asked, steps = [" ".join(row)], [" ".join(row)]
    for _ in range(difficulty):
        i, j = rng.choice(SWAPS)
        row[i - 1], row[j - 1] = row[j - 1], row[i - 1]
        asked.append(f"swap {i} {j}")
        steps.append(f"{i} {j} {' '.join(row)}")
    place = rng.randrange(len(PLACES))
    return Draft(f"{' . '.join(asked)} . {PLACES[place]} ?", row[place], " . ".join(steps))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _letter(value: bool) -> str:
    return "T" if value else "F"


MAKERS = {"liars": _liars, "xor": _xor, "order": _order}
KINDS = tuple(MAKERS)
