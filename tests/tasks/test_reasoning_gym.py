"""The reasoning-gym adapter: no seed overlap, no crumbs, no evaluated answers; its own scorers decide the rest."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoestring.core.errors import UserError
from shoestring.core.nouns import Problem

pytest.importorskip("reasoning_gym")

from shoestring.tasks import _contract, _gym, reasoning_gym
from shoestring.tasks._aside import Late


def grade(problem: Problem, *answers: Any) -> list[bool]:
    return reasoning_gym.grade([problem] * len(answers), answers)


def make(kind: str, seed: int = 0, difficulty: int = 1) -> Problem:
    return reasoning_gym.make(seed, difficulty, "train", kind)


def test_the_trap_is_real_and_avoided() -> None:
    from reasoning_gym.factory import create_dataset

    zero, one = (list(create_dataset("chain_sum", seed=seed, size=50)) for seed in (0, 1))
    shared = {item["question"] for item in zero} & {item["question"] for item in one}
    assert len(shared) >= 49, "seed 1 is seed 0 moved by one"
    train = {reasoning_gym.make(seed, 3, "train", "chain_sum").prompt for seed in range(300)}
    test = {reasoning_gym.make(seed, 3, "test", "chain_sum").prompt for seed in range(300)}
    assert not train & test and len(train) > 250


def test_no_crumbs() -> None:
    problem = make("chain_sum")
    gold = problem.gold
    assert grade(problem, gold, f" {gold}\n", f"{gold}.0") == [True, True, False]
    crumbs = [f"the answer is {gold}", f"1{gold}", f"{gold} {gold}", "0 1 2 3 4 5 6 7 8 9", "", None, problem.prompt]
    assert grade(problem, *crumbs) == [False] * len(crumbs)


def test_several_answers_can_be_right() -> None:
    problem = make("countdown")
    assert grade(problem, problem.gold, f"({problem.gold}) * 1", f"  ({problem.gold})") == [True, False, True]
    assert grade(problem, str(_target(problem)), f"{problem.gold} = {_target(problem)}") == [False, False]


def test_nothing_is_evaluated(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for kind in reasoning_gym.ALPHABETS:
        problem = make(kind)
        attacks = [f"__import__('os').system('touch {mark}')", f"open({str(mark)!r}, 'w')", "x.__class__", 'S("1")']
        attacks += [f"exec(\"open('{mark}','w')\")", "[c for c in ().__class__.__mro__]"]
        attacks += ["9**9**9**9", "(9**99)**99", "'a'*10**10"]
        assert grade(problem, *attacks) == [False] * len(attacks)
        assert all(not reasoning_gym.ALPHABETS[kind].fullmatch(attack) for attack in attacks)
    assert not mark.exists()


def test_the_alphabet_takes_no_time() -> None:
    for text in ("1" * 5000 + "!", "(" * 5000, "**" * 2500, "a " * 2500 + "!"):
        assert not reasoning_gym.EXPRESSION.fullmatch(text + "!")


def test_an_unknown_letter_is_no_constant() -> None:
    problem = make("simple_integration")
    letter = "X" if "X" not in problem.gold else "Y"
    assert grade(problem, problem.gold, f"{problem.gold} + {letter}**2") == [True, False]


def test_a_late_or_failing_score_is_wrong_and_a_late_item_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make("countdown")

    def judge(what: str, *_: object, seconds: float) -> str:
        if what in failing:
            raise failing[what]
        return problem.prompt

    monkeypatch.setattr(reasoning_gym, "_judge", lambda owner: judge)
    failing: dict[str, Exception] = {"score": Late()}
    assert grade(problem, "1 + 1") == [False]
    failing = {"score": ValueError("the scorer's own")}
    assert grade(problem, "1 + 1") == [False]
    failing = {"question": Late()}
    with pytest.raises(Late):
        grade(problem, "1 + 1")


def test_another_release_is_told() -> None:
    problem = replace(make("countdown"), prompt="another question")
    with pytest.raises(UserError, match="another of it"):
        grade(problem, "1 + 1")


def test_users_mistakes() -> None:
    with pytest.raises(UserError, match='Did you mean "chain_sum"'):
        make("chain_sums")


def test_levels_raise_difficulty_and_end() -> None:
    lengths = [sum(len(make("chain_sum", seed, level).prompt) for seed in range(20)) for level in (1, 3)]
    assert lengths[0] < lengths[1]
    assert make("caesar_cipher", 0, 9).prompt and make("survo", 0, 9).prompt


@pytest.mark.slow
@pytest.mark.parametrize("kind", reasoning_gym.KINDS)
def test_every_kind_keeps_the_contract(kind: str) -> None:
    failures = list(_contract.check_kind(reasoning_gym, kind, None, few=True))
    if kind == "n_queens":  # another board's solution may solve this one
        failures = [failure for failure in failures if "another problem's gold" not in failure]
    assert not failures
    problem = make(kind)
    assert _gym.score(kind, 1, problem.meta["item_seed"], problem.gold) == 1.0


@pytest.mark.slow
def test_items_repeat_in_other_processes() -> None:
    """Whatever the order of Python's sets; a set that fails here must leave KINDS."""
    code = (
        "import json, sys\nfrom shoestring.tasks import _gym\n"
        "for kind in sys.argv[1:]:\n"
        "    for seed in (2, 77, 10**6):\n"
        "        print(json.dumps([kind, _gym.question(kind, 1, seed), _gym.gold(kind, 1, seed)]), flush=True)"
    )
    kinds = [kind for kind in reasoning_gym.KINDS if kind != "tsumego"]  # which has no item for some seeds
    outputs = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", code, *kinds]
        outputs.append(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert outputs[0] == outputs[1]


def _target(problem: Problem) -> int:
    with contextlib.suppress(KeyError):
        return int(_gym.item("countdown", 1, problem.meta["item_seed"])[1]["metadata"]["target"])
    raise AssertionError("no target")
