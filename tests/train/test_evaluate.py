"""Evaluation batch by batch: killed anywhere it goes on, ends with the same result, and what it took is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoestring.core import ledger
from shoestring.core.atomic import read_lines
from shoestring.core.run import Run, runs_tree, totals
from shoestring.infer.engine import Engine
from shoestring.recipes import quickstart
from shoestring.road import run_recipe
from shoestring.train.configs import Decoding, EvalStage, Recipe, TaskMix
from shoestring.train.step import sampling_flops, scoring_flops

MIX = tuple(TaskMix(task=name, difficulty=(2, 4)) for name in ("questions", "logic"))


class Killed(BaseException):
    """The death of the process."""


def road(folder: Path, root: Path) -> Run:
    stage = EvalStage(
        name="eval", inputs={"model": str(folder)}, mix=MIX, problems=7, samples=2, rows_per_batch=8,
        decoding=Decoding(max_new_tokens=8), compute=quickstart.COMPUTE,
    )  # fmt: skip
    return run_recipe(Recipe(name="t", stages=(stage,)), root, quiet=True).runs["eval"]


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_evaluation_goes_on(folder: Path, tmp_path: Path, monkeypatch: Any, torn: bool) -> None:
    whole, root, calls = road(folder, tmp_path / "whole"), tmp_path / "killed", 0
    real = Engine.generate

    def dying(self: Engine, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        return real(self, *arguments)

    monkeypatch.setattr(Engine, "generate", dying)
    with pytest.raises(Killed):
        road(folder, root)
    (cut,) = ledger.read(root)
    assert cut.tokens == cut.sampled_tokens > 0 and cut.flops > 0
    answers = runs_tree(root)[0].path / "samples" / "answers.jsonl"
    assert len(read_lines(answers)) == 8
    if torn:  # the machine died while the second batch was being written
        answers.write_bytes(answers.read_bytes()[:-40])
    run = road(folder, root)
    assert calls == (6 if torn else 5)  # 14 problems, 4 a batch
    assert json.loads((run.path / "result.json").read_text()) == json.loads((whole.path / "result.json").read_text())
    assert answers.read_text() == (whole.path / "samples" / "answers.jsonl").read_text()
    assert run.metrics() == whole.metrics() and [row["step"] for row in run.metrics()] == [4, 8, 12, 14]
    spent = totals(root)["everything"]
    assert spent["tokens"] == whole.manifest["cost"]["tokens"] + (cut.tokens - run.metrics()[0]["tokens"]) * torn


def test_the_cost_is_that_of_what_was_read_and_written(folder: Path, tmp_path: Path, model: Any) -> None:
    run = road(folder, tmp_path)
    rows = read_lines(run.path / "samples" / "answers.jsonl")
    cost = run.manifest["cost"]
    assert cost["tokens"] == cost["sampled_tokens"] == sum(row["prompt_tokens"] + sum(row["tokens"]) for row in rows)
    assert cost["flops"] == pytest.approx(sampling_flops(model, [(r["prompt_tokens"], r["tokens"]) for r in rows]))
    assert cost["train_flops"] == 0


def test_flops_of_sampling(model: Any) -> None:
    """A sequence sampled alone costs what scoring it costs; a group reads its prompt once."""
    assert sampling_flops(model, [(10, [5])]) == pytest.approx(scoring_flops(model, [15]))
    assert sampling_flops(model, [(10, [5, 5])]) == pytest.approx(
        2 * scoring_flops(model, [15]) - scoring_flops(model, [10])
    )
    assert sampling_flops(model, []) == 0
    per_token = model.config.shape().flops_per_token(7, backward=False)
    assert scoring_flops(model, [7, 7]) == pytest.approx(14 * per_token)
