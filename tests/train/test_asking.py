"""Asking and rejection sampling: distinct problems, honest totals whatever is killed, cut-off answers not right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoestring.core import ledger
from shoestring.core.errors import UserError
from shoestring.core.nouns import Problem
from shoestring.core.run import Run, runs_tree, totals
from shoestring.data.textbook import distinct_problems
from shoestring.data.traces import TraceStore
from shoestring.recipes.quickstart import COMPUTE
from shoestring.road import run_recipe
from shoestring.tasks.grading import Grader, gradable
from shoestring.train import answering
from shoestring.train.configs import AskStage, Decoding, Recipe, RejectStage, Stage, TaskMix
from shoestring.train.context import derived_seed

SMALL = (TaskMix(task="questions", kinds=("sum",), difficulty=(1, 1)),)
DECODING = Decoding(max_new_tokens=6)


class Killed(BaseException):
    """The death of the process."""


def ask(folder: Path, **options: Any) -> AskStage:
    values: dict[str, Any] = {"problems": 24, "problems_per_batch": 8, "curate": ("dedup",)} | options
    return AskStage(
        name="ask", inputs={"teacher": str(folder)}, mix=SMALL, decoding=DECODING, compute=COMPUTE, **values
    )


def road(stage: Stage, root: Path) -> Run:
    return run_recipe(Recipe(name="t", stages=(stage,)), root, quiet=True).runs[stage.name]


def test_problems_are_distinct_over_the_stage_and_too_many_are_refused() -> None:
    found = distinct_problems(SMALL, 3, 30)
    assert len({p.id for p in found}) == len({p.prompt for p in found}) == 30
    assert distinct_problems(SMALL, 3, 20) == found[:20]
    with pytest.raises(UserError, match=r"questions sum at difficulty \(1, 1\) has only about \d+ different train"):
        distinct_problems(SMALL, 3, 100)


def test_a_filter_of_a_batch_holds_over_the_stage(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The teacher knows one answer to everything; nothing is kept twice, and one a problem."""
    monkeypatch.setattr(Grader, "__call__", lambda self, pairs: [True] * len(pairs))
    monkeypatch.setattr("shoestring.teachers.engine.split_thinking", lambda text: ("", "7"))
    stage = RejectStage(
        name="reject", inputs={"model": str(folder)}, mix=SMALL, problems=24, samples=3, problems_per_batch=4,
        keep_per_problem=1, curate=("dedup",), decoding=DECODING, compute=COMPUTE,
    )  # fmt: skip
    traces = TraceStore(road(stage, tmp_path / "runs").path).read()
    assert len(traces) == len({t.problem_id for t in traces}) == len({str(t.messages) for t in traces}) == 24


def test_totals_run_on_and_a_killed_ask_is_on_the_bill(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    stage, root = ask(folder), tmp_path / "killed"
    whole = road(stage, tmp_path / "whole")
    real, batches = answering._ask_batch, 0

    def dying(*arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(answering, "_ask_batch", dying)
    with pytest.raises(Killed):
        road(stage, root)
    (cut,) = ledger.read(root)
    rows = runs_tree(root)[0].metrics()
    assert [row["problems"] for row in rows] == [8, 16]
    assert cut.tokens == cut.sampled_tokens == rows[-1]["tokens"] > 0 and cut.flops == rows[-1]["flops"] > 0
    run = road(stage, root)
    assert run.metrics() == whole.metrics()
    assert TraceStore(run.path).digest() == TraceStore(whole.path).digest()
    cost = run.manifest["cost"]
    assert {k: cost[k] for k in ("tokens", "flops")} == {k: whole.manifest["cost"][k] for k in ("tokens", "flops")}
    everything = totals(root)["everything"]
    assert everything["tokens"] == cost["tokens"] and everything["flops"] == pytest.approx(cost["flops"])


def test_a_prompt_is_priced_once_for_all_its_samples(folder: Path, tmp_path: Path) -> None:
    one, four = (road(ask(folder, samples=n), tmp_path / str(n)) for n in (1, 4))
    prompts = sum(t.usage["prompt_tokens"] for t in TraceStore(one.path).read())
    written = [sum(t.usage["completion_tokens"] for t in TraceStore(r.path).read()) for r in (one, four)]
    assert one.manifest["cost"]["tokens"] == prompts + written[0]
    assert four.manifest["cost"]["tokens"] <= prompts + 4 * 24 * DECODING.max_new_tokens
    assert four.manifest["cost"]["tokens"] >= prompts + written[1]  # what was dropped was written too


def test_an_answer_that_was_cut_off_is_not_graded(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[tuple[Problem, str]] = []

    def grade(self: Any, pairs: list[tuple[Problem, str]]) -> list[bool]:
        seen.extend(pairs)
        return [answer in ("7", problem.gold) for problem, answer in pairs]

    monkeypatch.setattr(Grader, "__call__", grade)
    monkeypatch.setattr("shoestring.teachers.engine.split_thinking", lambda text: ("", "7"))
    traces = TraceStore(road(ask(folder), tmp_path / "runs").path).read()
    assert {t.finish_reason for t in traces} >= {"length"}
    assert all(t.answer == "7" and t.correct is (t.finish_reason == "stop") for t in traces)
    assert (gradable("7", "stop"), gradable("7", "length"), gradable("7", "cancelled")) == ("7", "", "")


def test_the_sandbox_of_a_stage_that_had_nothing_left_to_grade_stays_noted(
    folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Killed between its last batch and its end: the next attempt runs no program, and must not say "none"."""
    monkeypatch.setattr(Grader, "layer", property(lambda self: "bubblewrap"))
    monkeypatch.setattr(Run, "finish", lambda *_, **__: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        road(ask(folder), tmp_path)
    monkeypatch.undo()
    run = road(ask(folder), tmp_path)
    assert run.manifest["attempts"] == 2 and run.manifest["sandbox"] == "bubblewrap"


def test_asks_what_the_seed_says(folder: Path, tmp_path: Path) -> None:
    traces = TraceStore(road(ask(folder, seed=5), tmp_path).path).read()
    expected = {p.id for p in distinct_problems(SMALL, derived_seed(5, 4), 24)}
    assert {t.problem_id for t in traces} <= expected
