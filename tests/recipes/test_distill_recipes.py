"""The distillation recipes: R1's hyperparameters in one command on a Qwen2.5-shaped student, and the study's arms."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.data.textbook import problems, solved
from shoestring.data.traces import TraceStore
from shoestring.models import checkpoint
from shoestring.models.dense import Dense, DenseConfig
from shoestring.recipes import distill_r1, quickstart, study_distill
from shoestring.road import resolve_recipe, run_recipe
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import DistillStage


@pytest.mark.parametrize(
    ("billions", "lr"), [(1.5, 1e-4), (7.6, 8e-5), (8.03, 5e-5), (14.8, 7e-5), (32.8, 6e-5), (70, 2e-5)]
)
def test_learning_rates_are_r1s(billions: float, lr: float) -> None:
    assert distill_r1.rate(billions * 1e9) == lr


def test_one_command_distils_r1_style_traces_into_a_qwen_shaped_student(tmp_path: Path) -> None:
    worked = list(islice(solved(quickstart.LEARN, 5, 1.0), 64))
    texts = [" ".join((p.prompt, p.voices[v].thinking, p.voices[v].answer)) for p, v in worked]
    tokenizer = Tokenizer.train(texts, 400)
    config = DenseConfig(
        model_type="qwen2", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    checkpoint.save(Dense(config, generator=torch.Generator().manual_seed(0)), tokenizer, tmp_path / "qwen")
    TraceStore(tmp_path / "traces").append(
        Trace(
            id=f"r1-{i}", teacher="deepseek-reasoner", teacher_reported="deepseek-reasoner", finish_reason="stop",
            messages=[{"role": "user", "content": p.prompt}], thinking=p.voices[v].thinking, answer=p.voices[v].answer,
            prompt_ids=None, token_ids=None, task=p.task, problem_id=p.id, correct=True, decoding={"temperature": 0.6},
            usage={"prompt_tokens": 9, "completion_tokens": 30}, cost_usd=0.0, licence="MIT",
            date="2025-01-20T00:00:00+00:00",
        )
        for i, (p, v) in enumerate(worked)
    )  # fmt: skip
    recipe = resolve_recipe(
        "distill-r1", [f"student={tmp_path / 'qwen'}", f"traces={tmp_path / 'traces'}", "samples=256", "row_tokens=256"]
    )
    (stage,) = recipe.stages
    assert isinstance(stage, DistillStage)
    assert (stage.steps, stage.examples_per_step, stage.optim.lr) == (8, 64, 1e-4)
    assert (stage.optim.schedule, stage.optim.final_ratio) == ("cosine", 0.1)
    run = run_recipe(recipe, tmp_path / "runs", quiet=True).runs["student"]
    rows = run.metrics()
    assert rows[-1]["loss"] < rows[0]["loss"] and run.manifest["facts"]["licences"] == ["MIT"]


def test_r1_needs_its_two_inputs() -> None:
    with pytest.raises(UserError, match="needs a student and traces"):
        resolve_recipe("distill-r1", [])


def test_the_study_has_every_way_at_equal_updates_and_controls_at_equal_flops() -> None:
    recipe = study_distill.recipe(seeds=2)
    arms = {stage.name: stage for stage in recipe.stages if stage.name.startswith("arm-")}
    budgets = len(study_distill.BUDGETS["full"])
    assert len(arms) == 2 * budgets * (len(study_distill.WAYS) + 3)
    distilled = [stage for stage in arms.values() if isinstance(stage, DistillStage)]
    assert len({stage.steps for stage in distilled}) == budgets
    assert {stage.way for stage in distilled} == {"text", "offline", "forward_kl", "reverse_kl", "on_policy"}
    assert arms["arm-rl-only-s1"].inputs["budget"] == arms["arm-textbook-only-s1"].inputs["budget"] == "arm-text-s1"
    assert recipe.runs_as == quickstart.recipe().name  # so that teacher, base and traces are made once


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_study_runs_whole_at_smoke_size(tmp_path: Path) -> None:
    result = run_recipe(study_distill.recipe("smoke", seeds=1), tmp_path, quiet=True)
    assert all(run.finished for run in result.runs.values())
    assert result.report_path is not None and result.report_path.exists()


def test_three_ways_one_after_another(tmp_path: Path) -> None:
    """Text, logits, the student's own text: each stage begins with the student before it, and can be left out."""
    book = [problem.voices["short"] for problem in islice(problems(quickstart.LEARN, 3), 12)]
    tokenizer = Tokenizer.train((f"{s.thinking} {s.answer}" for s in book), 300)
    sizes: dict[str, Any] = {
        "model_type": "qwen2", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.1,
        "vocab_size": tokenizer.vocab_size,
    }  # fmt: skip
    for name, seed in (("student", 0), ("teacher", 1)):
        made = Dense(DenseConfig(**sizes), generator=torch.Generator().manual_seed(seed))
        checkpoint.save(made, tokenizer, tmp_path / name)
    asked = list(islice(problems(quickstart.LEARN, 3), 12))
    lines = [
        {"messages": [{"role": "user", "content": p.prompt},
                      {"role": "assistant", "content": p.voices["short"].answer}]} for p in asked
    ]  # fmt: skip
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [f"{role}={tmp_path / role}" for role in ("student", "teacher")] + [f"traces={tmp_path / 'traces.jsonl'}"]
    steps = ["text=2", "logits=3", "on_policy=2", "max_new_tokens=8", "row_tokens=128"]
    recipe = resolve_recipe("distill-ways", [*given, *steps])
    assert [stage.name for stage in recipe.stages] == ["text", "logits", "on-policy"]
    runs = run_recipe(recipe, tmp_path / "runs", quiet=True).runs
    assert [len(runs[name].metrics()) for name in ("text", "logits", "on-policy")] == [2, 3, 2]
    assert runs["logits"].manifest["parents"]["model"]["digest"] == runs["text"].manifest["digest"]
    assert runs["on-policy"].metrics()[-1]["sampled_tokens"] > 0
    short = resolve_recipe("distill-ways", [*given, "logits=0"])
    assert [stage.inputs["model"] for stage in short.stages] == [str(tmp_path / "student"), "text"]
    with pytest.raises(UserError, match="all 0 steps"):
        resolve_recipe("distill-ways", [*given, "text=0", "logits=0", "on_policy=0"])
    with pytest.raises(UserError, match="needs a student, a teacher and traces"):
        resolve_recipe("distill-ways", [])
