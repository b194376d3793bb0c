"""questions, logic, programs: repeatable, right, disjoint, and worked as an independent oracle works them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.core.errors import UserError
from shoestring.core.nouns import Problem
from shoestring.tasks import logic, programs, questions
from shoestring.tasks.sandbox import Sandbox

from . import oracles
from .conftest import LIMITS

TASKS: dict[str, ModuleType] = {"questions": questions, "logic": logic, "programs": programs}
KINDS = [(task, kind) for task, module in TASKS.items() for kind in module.KINDS]
# The shortest chains are so few that none of them may be a test problem; that is said, and tested elsewhere.
HOW = st.tuples(st.integers(1, 16), st.just("train")) | st.tuples(st.integers(4, 16), st.just("test"))


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox.open(workers=2, limits=LIMITS) as sandbox:
        yield sandbox


def make(task: str, kind: str, seed: int, difficulty: int, split: str = "train") -> Problem:
    return TASKS[task].make(seed, difficulty, split, kind)


@pytest.mark.parametrize(("task", "kind"), KINDS)
@given(seed=st.integers(0, 2**40), how=HOW)
@settings(max_examples=150, deadline=None)
def test_steps_and_gold_are_the_oracles(task: str, kind: str, seed: int, how: tuple[int, str]) -> None:
    problem = make(task, kind, seed, *how)
    steps, answer = getattr(oracles, f"{task}_{kind}")(problem.prompt)
    assert problem.gold == answer
    assert problem.voices["long"].thinking == steps
    assert [voice.answer for voice in problem.voices.values()] == [answer, answer]
    assert problem.voices["short"].thinking == ""


@pytest.mark.parametrize(("task", "kind"), KINDS)
@given(seed=st.integers(0, 10**6), difficulty=st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_make_repeats_and_is_json(task: str, kind: str, seed: int, difficulty: int) -> None:
    problem = make(task, kind, seed, difficulty)
    assert make(task, kind, seed, difficulty) == problem
    assert json.loads(json.dumps(problem.meta)) == problem.meta
    assert (problem.task, problem.meta["kind"], problem.seed, problem.difficulty) == (task, kind, seed, difficulty)


def test_a_problem_never_changes() -> None:
    """Golden: a change of these is a change of the task's version."""
    assert {task: [make(task, kind, 7, 3).id for kind in module.KINDS] for task, module in TASKS.items()} == GOLDEN


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_train_and_test_are_disjoint(task: str, kind: str) -> None:
    difficulties = (4, 5, 8)
    train = [make(task, kind, seed, difficulty) for difficulty in difficulties for seed in range(1000)]
    test = [make(task, kind, seed, difficulty, "test") for difficulty in difficulties for seed in range(1000)]
    for what in ("id", "prompt"):
        assert not {getattr(problem, what) for problem in train} & {getattr(problem, what) for problem in test}


@pytest.mark.parametrize(("task", "kind"), [pair for pair in KINDS if pair != ("programs", "examples")])
def test_difficulty_is_variety_and_length(task: str, kind: str) -> None:
    lengths = []
    for difficulty in (2, 5, 10):
        problems = [make(task, kind, seed, difficulty) for seed in range(400)]
        lengths.append(sum(len(problem.prompt) for problem in problems))
    assert lengths == sorted(lengths)
    assert len({problem.id for problem in problems}) > 300


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_no_answer_can_be_guessed(task: str, kind: str) -> None:
    """The most frequent answer stays near chance, for train and for test problems."""
    for split in ("train", "test"):
        golds = Counter(make(task, kind, seed, 8, split).gold for seed in range(1000))
        classes = {"yes": 2, "odd": 2, "A B C": 6, "0": 10}
        chance = 1 / next((n for gold, n in classes.items() if gold in golds), 10)
        assert golds.most_common(1)[0][1] / 1000 < chance + 0.08


@pytest.mark.parametrize("task", TASKS)
def test_every_kind_is_drawn(task: str) -> None:
    module = TASKS[task]
    counts = Counter(module.make(seed, 4).meta["kind"] for seed in range(600))
    assert set(counts) == set(module.KINDS) and min(counts.values()) > 500 / len(module.KINDS)


@pytest.mark.parametrize("task", ["questions", "logic"])
@given(seed=st.integers(0, 10**6), other=st.integers(0, 10**6), pad=st.sampled_from(["", " ", "\n", "x", "0", ".0"]))
@settings(max_examples=200, deadline=None)
def test_only_the_gold_is_right(task: str, seed: int, other: int, pad: str) -> None:
    module = TASKS[task]
    problem, neighbour = module.make(seed, 4), module.make(other, 4)
    answers = [problem.gold, f" {problem.gold}\n", neighbour.gold, problem.gold + pad, pad + problem.gold]
    blank = not pad.strip()
    wanted = [True, True, neighbour.gold == problem.gold, blank, blank]
    assert module.grade([problem] * 5, answers) == wanted


def test_programs_are_right_by_what_they_do(box: Sandbox) -> None:
    problems = [programs.make(seed, 1 + seed % 9) for seed in range(150)]
    golds = [problem.gold for problem in problems]
    assert all(programs.grade(problems, golds, sandbox=box))
    shifted = golds[1:] + golds[:1]
    assert programs.grade(problems, shifted, sandbox=box) == [a == b for a, b in zip(golds, shifted, strict=True)]
    describe = programs.make(3, 4, kind="describe")
    a, b = map(int, re.findall(r"\d", describe.gold)[:2])
    other_forms = [
        f"def f(x):\n    y = x * {a}\n    y += {b}\n    return y % 10",
        f"g = lambda n: ({b} + n * {a + 10}) % 10\ndef f(number, *rest): return g(number)",
        f"def f(x): return sum([{b}] + [{a}] * x) % 10",
    ]
    assert programs.grade([describe] * 3, other_forms, sandbox=box) == [True] * 3
    wrong = [f"def f(x): return {a} * x + {b + 1}", "def f(x): return None", "def", "", "f", f"({a} * x + {b}) % 10"]
    assert programs.grade([describe] * 6, wrong, sandbox=box) == [False] * 6


def test_programs_run_equal_candidates_once(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    run = box.run
    monkeypatch.setattr(box, "run", lambda batch: counts.append(len(batch)) or run(batch))
    problem, other = programs.make(1, 3), programs.make(2, 3)
    right = programs.grade([problem] * 8 + [other], [problem.gold] * 7 + ["no"] + [other.gold], sandbox=box)
    assert counts == [2] and right == [True] * 7 + [False, True]


def test_programs_open_a_sandbox_of_their_own() -> None:
    problem = programs.make(1, 3)
    assert programs.grade([problem], [problem.gold]) == [True]


@pytest.mark.parametrize("task", TASKS)
def test_users_mistakes(task: str) -> None:
    module = TASKS[task]
    with pytest.raises(UserError, match="no kind"):
        module.make(0, 3, "train", "riddle")
    with pytest.raises(UserError, match="at least 1"):
        module.make(0, 0)
    with pytest.raises(UserError, match="train"):
        module.make(0, 3, "validation")
    with pytest.raises(UserError, match="goes up to"):
        logic.make(0, 26, kind="liars")


GOLDEN = {
    "questions": ["e93c047c4c3a903e", "2997bd6cd6fb6bce"],
    "logic": ["b48f66cea5566fff", "afc9b9d2190e41e3", "1bfbb11449474d39"],
    "programs": ["a6cf85fee6600073", "5aa53474209e02db"],
}
