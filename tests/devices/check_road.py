"""Every kind of stage on the pretended device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.core.run import runs_tree
from shoestring.road import run_recipe
from shoestring.train.configs import Compute, DistillStage, Recipe
from shoestring.train.machine import gemm_rate

from ..train import every_stage
from .pretend import NAME, pretending

COMPUTE = Compute(device=NAME, experts="bmm")
FEW = {"steps": 2, "checkpoint_every": 1, "examples_per_step": 4, "problems": 6, "problems_per_step": 2}


def stages() -> list[Any]:
    """All of every_stage.py, and the ways to distil that it leaves out."""
    taught = {"model": "prune", "teacher": "rl", "traces": "reject"}
    more = [
        DistillStage(name=name, inputs=taught, row_tokens=192, **every_stage.SLOWLY, **given)
        for name, given in {
            "online": {"way": "jsd", "hidden_states": {}, "text_weight": 0.1},
            "across": {"way": "universal_logit"},
            "spans": {"way": "span_likelihood"},
        }.items()
    ]
    found = []
    for stage in [*every_stage.recipe().stages, *more]:
        change: dict[str, Any] = {name: value for name, value in FEW.items() if hasattr(stage, name)}
        found.append(stage.model_copy(update={**change, "compute": COMPUTE}))
    return found


@pytest.mark.slow
def test_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoestring.train.machine.gemm_rate", lambda *_, **__: 1e11)
    with pretending() as counts:
        run_recipe(Recipe(name="there", stages=tuple(stages())), tmp_path, quiet=True)
        assert counts["from the CPU"] > 0
    assert {run.manifest["status"] for run in runs_tree(tmp_path)} == {"finished"}


def test_the_rate_of_products_is_measured() -> None:
    with pretending():
        assert gemm_rate(torch.float32, NAME, size=64, repeats=2) > 0
