"""Every kind of stage on the pretended device."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.core.run import runs_tree
from shoestring.data.textbook import solved
from shoestring.data.traces import TraceStore
from shoestring.models import checkpoint
from shoestring.recipes import quickstart
from shoestring.road import run_recipe
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import Compute, DistillStage, Recipe
from shoestring.train.machine import gemm_rate

from ..train import every_stage
from ..train.distilling import run_stage, stage_of, trace_of
from .check_training import dense
from .pretend import NAME, pretending

COMPUTE = Compute(device=NAME, experts="bmm")
FEW = {"steps": 2, "checkpoint_every": 1, "examples_per_step": 4, "problems": 6, "problems_per_step": 2}


def stages() -> list[Any]:
    """All of every_stage.py, and a teacher beside its student."""
    online = DistillStage(
        name="online", inputs={"model": "prune", "teacher": "rl", "traces": "reject"}, way="jsd", hidden_states={},
        text_weight=0.1, row_tokens=192, **every_stage.SLOWLY,
    )  # fmt: skip
    found = []
    for stage in [*every_stage.recipe().stages, online]:
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


@pytest.mark.slow
@pytest.mark.parametrize("way", ["universal_logit", "span_likelihood"])
def test_across_tokenizers(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoestring.train.machine.gemm_rate", lambda *_, **__: 1e11)
    book = list(islice(solved(quickstart.LEARN, 5, 1.0), 6))
    tokenizer = Tokenizer.train([p.prompt + p.voices[v].thinking + p.voices[v].answer for p, v in book] * 5, 300)
    store = TraceStore(tmp_path / "traces")
    store.append([trace_of(i, p, v) for i, (p, v) in enumerate(book)])
    folder = checkpoint.save(dense(vocab_size=300, max_position_embeddings=256), tokenizer, tmp_path / "m")
    inputs = {"teacher": folder, "traces": tmp_path / "traces"}
    stage = stage_of(folder, way=way, inputs=inputs, compute=COMPUTE, steps=1, checkpoint_every=1)
    with pretending():
        assert run_stage(stage, tmp_path / "runs").finished


def test_the_rate_of_products_is_measured() -> None:
    with pretending():
        assert gemm_rate(torch.float32, NAME, size=64, repeats=2) > 0
