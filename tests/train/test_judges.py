"""Reward, examination and curation judge alike: what looks right and is not earns nothing from any of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shoestring.core.nouns import Completion, FinishReason, Rollout, Sampling
from shoestring.data.traces import TraceStore
from shoestring.evals.runner import evaluate
from shoestring.rewards import _contract, correct
from shoestring.teachers.engine import EngineTeacher
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.answering import _ask_batch
from shoestring.train.configs import AskStage, TaskMix

CASES = {
    **{f"right {number}: {reason}": (text, reason) for number, text in enumerate(_contract.RIGHT)
       for reason in ("stop", "length", "cancelled")},
    **{what: (text, "stop") for what, text in _contract.WRONG.items()},
}  # fmt: skip


class Says:
    """A model that says one thing."""

    def __init__(self, text: str, reason: FinishReason) -> None:
        self.completion = Completion(text, [3] * 4, [-0.5] * 4, reason)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        return [[self.completion] * sampling.n for _ in prompts]

    def score(self, token_ids: Any, *, temperature: float = 1.0) -> Any:
        raise NotImplementedError

    def update_weights(self, model: Any) -> None:
        raise NotImplementedError

    def let_go(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("case", CASES)
def test_all_judges_say_the_same(case: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    text, reason = CASES[case]
    model: Any = Says(text, reason)
    problem, grade = _contract.PROBLEM, _contract.exact_grade
    rewarded = correct.reward([Rollout(problem, [0], model.completion)], grade=grade)[0] == 1.0
    (row,) = evaluate(model, tokenizer, [problem], Sampling(n=2, seed=0), grade).rows
    stage = AskStage(name="ask", inputs={"teacher": "x"}, mix=(TaskMix(task="questions"),), samples=2)
    teacher = EngineTeacher(model, tokenizer, name="t", licence="own model")
    judge: Any = grade  # a function where a stage has a Grader
    store = TraceStore(tmp_path / "traces")
    _ask_batch(stage, [problem], 0, teacher, list, judge, store, lambda groups: 0.0)
    kept = [trace.correct for trace in store.read()]
    assert rewarded is (case.startswith("right") and reason == "stop")
    assert row["right"] == kept == [rewarded] * 2
    assert row["cons"] == float(rewarded)
