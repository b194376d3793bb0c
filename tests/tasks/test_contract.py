"""The contract of tasks sees what it is for: each broken task is told in a sentence what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoestring.core.registry import load_part
from shoestring.tasks import _contract

SOUND = '''
"""Adds two numbers."""
import random
from shoestring.core.errors import UserError
from shoestring.core.nouns import Problem, Solution
from shoestring.tasks._draw import problem_id, split_of

VERSION, KINDS = "1", ("add",)

def make(seed, difficulty, split="train", kind=None):
    rng = random.Random(f"{seed} {difficulty}")
    while True:
        a, b = rng.randrange(10**difficulty), rng.randrange(1000)
        prompt, gold = f"{a} + {b} ?", str(a + b)
        id = problem_id("add", VERSION, prompt)
        if split_of(id) == split:
            return Problem("add", VERSION, id, prompt, gold, difficulty, seed, {"short": Solution("", gold)}, {})

def grade(problems, answers, *, sandbox=None):
    return [answer.strip() == problem.gold for problem, answer in zip(problems, answers)]
'''
BROKEN = {
    "wrong gold": (
        ("answer.strip() == problem.gold", "answer.strip() == str(eval(problem.prompt[:-2]) + 1)"),
        "grades its own gold",
    ),
    "wrong voice": (('Solution("", gold)', 'Solution("", "7")'), "the answer of voice short, '7', as wrong"),
    "substring": (("answer.strip() == problem.gold", "problem.gold in answer"), "the gold inside something longer"),
    "first of several": (
        ("answer.strip() == problem.gold", "(answer.split() or [''])[0] == problem.gold"),
        "the gold and another answer",
    ),
    "any digits": (("answer.strip() == problem.gold", "answer.strip().isdigit()"), "another problem's gold"),
    "int": (
        (
            "answer.strip() == problem.gold",
            "len(answer) < 99 and answer.strip().isnumeric() and int(answer) == int(problem.gold)",
        ),
        "the digits of another script",
    ),
    "eval": (("answer.strip() == problem.gold", "str(eval(answer)) == problem.gold"), "raises"),
    "forgets the seed": (('random.Random(f"{seed} {difficulty}")', "random.Random()"), "another problem when it is"),
    "one pool": (("if split_of(id) == split:", "if True:"), "both in train and in test"),
    "other version": (('Problem("add", VERSION', 'Problem("add", "0"'), "says version 0"),
    "meta": (("gold)}, {})", "gold)}, {'tests': {1}})"), "no JSON value"),
    "empty gold": (("prompt, gold, difficulty", "prompt, '', difficulty"), "has an empty id, prompt or gold"),
    "no version": (("VERSION, KINDS = \"1\", (\"add\",)", "KINDS = (\"add\",)"), "VERSION is missing"),
    "no kinds": (('("add",)', "()"), "KINDS is missing"),
    "no docstring": (('"""Adds two numbers."""', ""), "no docstring"),
    "no grade": (("def grade(", "def judge("), "grade is missing"),
    "impossible": (("    rng = ", "    raise UserError('no')\n    rng = "), "makes no problem"),
}  # fmt: skip


def check(path: Path, source: str) -> list[str]:
    path.write_text(source)
    return _contract.check(load_part("tasks", str(path)), path)


def test_a_sound_task_passes(tmp_path: Path) -> None:
    assert check(tmp_path / "add.py", SOUND) == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_breach_is_named(tmp_path: Path, name: str) -> None:
    (old, new), sentence = BROKEN[name]
    assert old in SOUND
    failures = check(tmp_path / "add.py", SOUND.replace(old, new))
    assert any(sentence in failure for failure in failures), failures
    assert all(failure.startswith("add.py: ") and "\n" not in failure for failure in failures)
