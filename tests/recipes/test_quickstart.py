"""What the quickstart promises about itself, held without running it."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from shoestring.cost.hf import shape_from_hf
from shoestring.cost.shape import ModelShape
from shoestring.models.deepseek import Deepseek, DeepseekConfig
from shoestring.models.dense import Dense, DenseConfig
from shoestring.recipes import quickstart, study_quickstart
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import ModelSpec, Recipe, TrainBase
from shoestring.train.tokenize import _texts

RECIPES = [quickstart.recipe(), study_quickstart.recipe()]


TOLD = {"quickstart": r"(?:make|run) quickstart|^quickstart:", "study-quickstart": "run study-quickstart"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_stage_has_several_checkpoints_on_its_way(recipe: Recipe) -> None:
    """A kill costs a part of a stage, not all of it; the controls train about as long as what they stand against."""
    trained = [stage for stage in recipe.stages if isinstance(stage, TrainBase)]
    assert len(trained) > 6
    for stage in trained:
        steps = stage.steps or min(s.steps for s in trained if s.steps)
        assert steps / stage.checkpoint_every >= 3, stage.name


def shapes(vocabulary: int) -> tuple[ModelShape, ModelShape]:
    """Of teacher and student."""
    types = {"deepseek": "deepseek_v3", "dense": "qwen2"}

    def shape(spec: ModelSpec) -> ModelShape:
        return shape_from_hf({"model_type": types[spec.family], "vocab_size": vocabulary, **spec.config}, spec.family)

    return shape(quickstart.TEACHER), shape(quickstart.STUDENT)


def test_the_student_has_at_most_a_quarter_of_the_teachers_active_parameters() -> None:
    stage = quickstart.tokenizer()
    vocabulary = Tokenizer.train(
        islice(_texts(stage), stage.documents), stage.vocab_size
    ).vocab_size  # fewer are learnt
    teacher, student = shapes(vocabulary)
    assert student.params().total <= teacher.params().active / 4
    # and these are the models that are made
    made = [
        Deepseek(DeepseekConfig.from_dict({**quickstart.TEACHER.config, "vocab_size": vocabulary}), device="meta"),
        Dense(DenseConfig.from_dict({**quickstart.STUDENT.config, "vocab_size": vocabulary}), device="meta"),
    ]
    assert sum(p.numel() for p in made[1].parameters()) == student.params().total
    assert made[0].config.shape().params() == teacher.params()


def test_the_teacher_is_of_v3s_architecture() -> None:
    config = quickstart.TEACHER.config
    assert config["n_routed_experts"] >= 8 and config["n_shared_experts"] == 1
    assert config["num_nextn_predict_layers"] == 1 and config["kv_lora_rank"]
    pretrain = next(s for s in RECIPES[0].stages if s.name == "teacher-pretrain")
    assert isinstance(pretrain, TrainBase) and pretrain.mtp_lambda > 0 and pretrain.bias_gamma > 0


@pytest.mark.parametrize("make", [quickstart.recipe, study_quickstart.recipe])
def test_a_smoke_run_claims_nothing(make: Callable[..., Recipe]) -> None:
    assert len(make().report["claims"]) == 6 and "student" in make().report["finding"]
    small = make(size="smoke").report
    assert small["claims"] == [] and "no effect" in small["finding"] and small["evals"]


def test_what_was_sampled_for_an_arm_comes_off_its_budget() -> None:
    arm = next(s for s in RECIPES[1].stages if s.name == "teacher-reject-sft")
    assert isinstance(arm, TrainBase) and arm.match_flops == ("budget",) and arm.spent_flops == ("traces",)


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "places"),
    [
        ("quickstart", ("README.md", "Makefile", "docs/quickstart.md", "src/shoestring/recipes/quickstart.py")),
        ("study-quickstart", ("docs/quickstart.md", "src/shoestring/recipes/study_quickstart.py")),
    ],
)
def test_the_minutes_it_takes_are_the_same_wherever_they_are_told(command: str, places: tuple[str, ...]) -> None:
    told = {
        place: re.findall(rf"(?m)(?:{TOLD[command]}).*about (\d+) minutes", (ROOT / place).read_text())
        for place in places
    }
    assert all(told.values()) and len({minutes for found in told.values() for minutes in found}) == 1, told
