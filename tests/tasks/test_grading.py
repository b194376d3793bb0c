"""The Grader: mixtures of tasks, one sandbox when it is needed, versions, a user's own task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shoestring.core.errors import UserError
from shoestring.core.registry import load_part
from shoestring.tasks import logic, programs, questions
from shoestring.tasks.grading import Grader

OWN = '''
"""Echo."""
from shoestring.core.nouns import Problem
VERSION, KINDS = "1", ("echo",)
def make(seed, difficulty, split="train", kind=None):
    return Problem("echo", VERSION, str(seed), f"say {seed}", str(seed), difficulty, seed)
def grade(problems, answers, *, sandbox=None):
    return [answer == problem.gold for problem, answer in zip(problems, answers)]
'''


def test_a_mixture_keeps_its_order() -> None:
    problems = [module.make(seed, 3) for seed in range(6) for module in (programs, questions, logic)]
    answers = [problem.gold if index % 2 else "no answer" for index, problem in enumerate(problems)]
    with Grader(workers=1) as grader:
        verdicts = grader(list(zip(problems, answers, strict=True)))
        assert verdicts == [bool(index % 2) for index in range(len(problems))]
        assert grader.layer in ("bwrap", "namespaces")
        assert grader([(problems[0], problems[0].gold)]) == [True]
        assert grader([]) == []


def test_no_sandbox_where_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from shoestring.tasks import grading

    monkeypatch.setattr(grading.Sandbox, "open", lambda *_, **__: pytest.fail("a sandbox was opened"))
    grader = Grader()
    problem = questions.make(1, 3)
    assert grader([(problem, problem.gold)]) == [True]
    assert grader.layer is None
    grader.close()


@pytest.mark.parametrize("version", ["0.9", "9.0"])
def test_problems_of_another_version_are_refused(version: str) -> None:
    problem = replace(questions.make(1, 3), version=version)
    with pytest.raises(UserError, match=f"version {version} of task questions"):
        Grader()([(problem, "1")])


def test_an_unknown_task_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="question"):
        Grader()([(replace(questions.make(1, 3), task="question"), "1")])


def test_data_cannot_name_a_file_to_be_run(tmp_path: Path) -> None:
    """A problem comes with traces from anywhere; only who grades may name a file of his own."""
    path = tmp_path / "own.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name in (str(path), str(path.with_suffix("")), "tasks/questions.py"):
        with pytest.raises(UserError, match="names its task by a file"):
            Grader()([(replace(questions.make(1, 3), task=name), "1")])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("by", [str, lambda path: load_part("tasks", str(path))])
def test_a_task_of_ones_own(tmp_path: Path, by: Callable[[Path], object]) -> None:
    path = tmp_path / "echo.py"
    path.write_text(OWN)
    problem = load_part("tasks", str(path)).make(5, 1)
    grader = Grader(tasks={"echo": by(path)})  # type: ignore[dict-item]
    assert grader([(problem, "5"), (problem, "6")]) == [True, False]
