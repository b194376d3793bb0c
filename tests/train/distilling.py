"""What tests of distillation share: a kept answer, a stage of four steps, its run and weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shoestring.core.nouns import Trace
from shoestring.core.run import Run
from shoestring.road import run_recipe
from shoestring.train import distill
from shoestring.train.configs import Compute, DistillStage, Optim, Recipe

COMPUTE = Compute(dtype="float32", experts="bmm")
OPTIM = Optim(lr=3e-3, warmup_steps=0, schedule="constant", weight_decay=0.0)


def trace_of(number: int, problem: Any, voice: str = "long", **changes: Any) -> Trace:
    solution = problem.voices[voice]
    trace = Trace(
        id=f"t{number}", teacher="book", teacher_reported="book",
        messages=[{"role": "user", "content": problem.prompt}],
        thinking=solution.thinking, answer=solution.answer, prompt_ids=None, token_ids=None, finish_reason="stop",
        task=problem.task, problem_id=problem.id, correct=True, decoding={"temperature": 1.0, "sample": number},
        usage={"prompt_tokens": 1, "completion_tokens": 1}, cost_usd=0.0,
        licence="MIT", date="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return replace(trace, **changes)


def stage_of(student: Path, **given: Any) -> DistillStage:
    inputs = {"model": str(student)} | {role: str(path) for role, path in given.pop("inputs").items()}
    common: dict[str, Any] = {"steps": 4, "optim": OPTIM, "row_tokens": 192, "examples_per_step": 4,
                              "compute": COMPUTE, "checkpoint_every": 2}  # fmt: skip
    return DistillStage(name="distilled", inputs=inputs, **common | given)


def run_stage(stage: Any, root: Path, *before: Any) -> Run:
    return run_recipe(Recipe(name="x", stages=(*before, stage)), root, quiet=True).runs[stage.name]


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    latest = run.latest_checkpoint()
    assert latest is not None
    return load_file(latest[1] / "model.safetensors")


def killed_and_resumed(
    stage: Any, root: Path, monkeypatch: pytest.MonkeyPatch, deaths: tuple[int, ...] = (4,), loop: Any = distill
) -> Run:  # fmt: skip
    """The run of a stage that dies at these updates (counted over all attempts) and is begun again each time."""
    real, count = loop.train_step, 0

    def dying(*args: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count in deaths:
            raise KeyboardInterrupt
        return real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dying)
        for _ in deaths:
            with pytest.raises(KeyboardInterrupt):
                run_stage(stage, root)
        return run_stage(stage, root)
