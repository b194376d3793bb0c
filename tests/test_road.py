"""Roads: resolved with helpful sentences, run whole at smoke size, taken as they are the second time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoestring.core.errors import UserError
from shoestring.core.run import runs_tree, totals
from shoestring.road import command_line, plan_rows, resolve_recipe, run_recipe, stage_recipe
from shoestring.train.configs import Optim, Recipe, SftStage, TaskMix, Textbook, TokenizerStage


def test_sets_go_to_the_function_or_to_the_config() -> None:
    recipe = resolve_recipe("quickstart", ["size=smoke", "seed=3", "stages.teacher-rl.steps=2", "usd_per_hour=1.5"])
    stages = {stage.name: stage for stage in recipe.stages}
    assert recipe.name == "quickstart-smoke" and recipe.usd_per_hour == 1.5
    assert stages["teacher-rl"].steps == 2 and stages["teacher-pretrain"].seed == 3


@pytest.mark.parametrize(
    ("name", "sets", "sentence"),
    [
        ("quikstart", [], 'Did you mean "quickstart"'),
        ("quickstart", ["size=smok"], 'Did you mean "smoke"'),
        ("quickstart", ["sise=smoke"], 'Did you mean "size"'),
        ("quickstart", ["stages.teacher-rl.step=3"], 'Did you mean "steps"'),
        ("quickstart", ["stages.teacher-r.steps=3"], 'Did you mean "teacher-rl"'),
        ("quickstart", ["stages.teacher-rl.clip_low=-1"], "greater than 0"),
        ("quickstart", ["stages.teacher-rl.decoding.top_p=0.9"], "RL samples everything"),
        ("quickstart", ["stages.teacher-rl.mix.0.difficulty=[6, 5]"], "in order"),
        ("quickstart", ["seed=--1"], "whole number"),
        ("quickstart", ["size=3"], 'no size "3"'),
        ("study-quickstart", ["seeds=0"], "at least one"),
        ("stage", [], "verb of its own"),
        ("nowhere/recipe.py", [], "nowhere/recipe.py"),
    ],
)
def test_mistakes_are_said_in_a_sentence(name: str, sets: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        resolve_recipe(name, sets)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_budget_is_steps_or_flops_never_both() -> None:
    book, optim = Textbook(mix=(TaskMix(task="questions"),)), Optim(lr=1e-3)
    with pytest.raises(UserError, match="either steps or match_flops"):
        SftStage(name="x", textbook=book, optim=optim)
    with pytest.raises(UserError, match='match_flops names "budget"'):
        SftStage(name="x", textbook=book, optim=optim, match_flops=("budget",))


def test_an_input_that_is_nowhere_is_said_before_any_work(tmp_path: Path) -> None:
    recipe = resolve_recipe("quickstart", ["size=smoke", "stages.teacher-sft.inputs.model=teacher-pretrian"])
    with pytest.raises(UserError, match='Did you mean "teacher-pretrain"'):
        run_recipe(recipe, tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("teacher-rl.mix.0.task=question", 'Did you mean "questions"'),
        ('teacher-rl.rewards={"corect": 1.0}', 'Did you mean "correct"'),
        ("teacher-rl.rewards={}", "needs at least 1 item(s)"),
        ('ask.curate=["dedupe"]', 'Did you mean "dedup"'),
        ("teacher-pretrain.model.family=deepseak", 'Did you mean "deepseek"'),
        ("tokenizer.corpus.mix.0.task=absent.py", "There is no file absent.py"),
        ('teacher-rl.mix.0.kinds=["summ"]', 'stage "teacher-rl": task questions has no kind "summ"'),
        ("student-rl.mix.0.difficulty=[1,400]", "goes up to difficulty"),
        ("student-pretrain.model.config.hiden_size=3", 'Did you mean "hidden_size"'),
        ("teacher-pretrain.model.config.n_group=0", '"n_group" must be greater than or equal to 1'),
        ("student-rl.compute.device=gpu", 'compute.device is "gpu", which is not usable here'),
        ("eval-student-rl.compute.threads=99999", "must be less than or equal to 1024, not 99999"),
        ("teacher-rl.decoding.max_new_tokens=512", "is 512, and the model has 512 positions for prompt and answer"),
        ("ask.decoding.max_new_tokens=600", 'stage "ask": decoding.max_new_tokens is 600, and the model has 512'),
    ],
)
def test_unknown_parts_are_said_before_any_work(tmp_path: Path, change: str, sentence: str) -> None:
    """Wherever on the road they stand: not when their stage is reached."""
    with pytest.raises(UserError) as error:
        recipe = resolve_recipe("quickstart", ["size=smoke", f"stages.{change}"])
        run_recipe(recipe, tmp_path, quiet=True)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not runs_tree(tmp_path)


def test_the_command_of_a_report() -> None:
    assert command_line("quickstart", ["size=smoke", 'a={"b": 1}']) == (
        "shoestring run quickstart --set size=smoke --set 'a={\"b\": 1}'"
    )
    assert command_line("/home/me/my road.yaml", []) == "shoestring run 'my road.yaml'"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("corpus.long_share=2", '"stages.0.corpus.long_share" must be less than or equal to 1, not 2.'),
        ("corpus.mix=[]", '"stages.0.corpus.mix" needs at least 1 item(s), and has 0.'),
        ('corpus.files=["x"]', 'give that whole: corpus={"files": ...}.'),
        ('corpus={"files": []}', '"stages.0.corpus.files" needs at least 1 item(s), and has 0.'),
        ("model.famly=x", 'unknown key "stages.0.model.famly". Did you mean "family"?'),
        ("optim.betas=[0.9,1]", '"stages.0.optim.betas.1" must be less than 1, not 1.'),
        ("optim.decay_share=7", "must be less than or equal to 1"),
        ("optim.final_ratio=-3", "must be greater than or equal to 0"),
        ("name=a/b", "no slash"),
        ("name=..", "no dot in front"),
        ("name=", "part of a folder's name"),
    ],
)
def test_what_a_stage_cannot_be_told(change: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        stage_recipe("pretrain", [change], {"tokenizer": "x"})
    assert sentence in str(error.value) and "more)" not in str(error.value)


def test_runs_that_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recipe = resolve_recipe("quickstart", ["size=smoke"])
    for place in (tmp_path / "file", tmp_path / "file" / "runs", Path("/proc/runs")):
        with pytest.raises(UserError, match="--runs names another folder"):
            run_recipe(recipe, place, quiet=True)


def test_stage_verbs_ask_for_what_they_need() -> None:
    with pytest.raises(UserError, match="--from model=RUN"):
        stage_recipe("rl", [], {})
    with pytest.raises(UserError, match="--traces RUN"):
        stage_recipe("distill", [], {"model": "x"})
    with pytest.raises(UserError, match="distill needs an input: --student RUN"):
        stage_recipe("distill", [], {"teacher": "x", "traces": "y"})
    given = {"model": "x", "teacher": "y", "teacher2": "z", "traces": "t"}
    for sets in (["way=universal_logit", "teacher_pool=divergences"], ["teacher_pool=divergences", "way=jsd"]):
        assert stage_recipe("distill", sets, given).stages[0].teacher_pool == "divergences"  # type: ignore[union-attr]
    warm = stage_recipe("distill", ["way=on_policy", "temperature=0.9", "decoding.temperature=0.9"], given).stages[0]
    assert warm.decoding.temperature == warm.temperature == 0.9  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r'"reverse-kl"\. Did you mean "reverse_kl"\?$'):
        stage_recipe("distill", ["way=reverse-kl"], given)
    made = stage_recipe("rl", ["steps=7"], {"model": "somewhere"})
    assert made.stages[0].steps == 7  # type: ignore[union-attr]


def test_a_dry_run_prices_every_stage_and_loads_nothing(tmp_path: Path) -> None:
    rows = plan_rows(resolve_recipe("quickstart", []), tmp_path)
    assert [row["stage"] for row in rows][:3] == ["tokenizer", "teacher-pretrain", "teacher-sft"]
    trained = [row for row in rows if row["kind"] not in ("tokenizer",)]
    assert all(row["about_flops"] > 0 and row["about_usd"] > 0 for row in trained)
    # the bill of docs/quickstart.md, as it was measured
    flops = {row["stage"]: row["about_flops"] for row in rows}
    assert flops["teacher-pretrain"] == pytest.approx(1.04e13, rel=0.05)
    assert flops["student-pretrain"] == pytest.approx(1.79e12, rel=0.1)
    assert 1.27e12 < flops["teacher-rl"] < 2 * 1.27e12  # as if every group were trained on
    assert sum(row["about_seconds"] for row in rows) == pytest.approx(448, rel=0.25)
    study = plan_rows(resolve_recipe("study-quickstart", []), tmp_path)
    assert sum(row["about_seconds"] for row in study) < 60 * 60


@pytest.mark.timeout(400)
def test_the_whole_road_at_smoke_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a seed whose untrained teacher answers some problems with nothing (0, the resume tests' seed, has none)."""
    recipe = resolve_recipe("quickstart", ["size=smoke", "seed=1"])
    result = run_recipe(recipe, tmp_path, quiet=True)
    assert [row["stage"] for row in result.rows] == [stage.name for stage in recipe.stages]
    made = {run.manifest["stage"]: run.manifest for run in runs_tree(tmp_path)}
    for control, budget in (("teacher-more-sft", "teacher-rl"), ("student-more-textbook", "student-distilled")):
        spent = [row["flops"] for row in result.runs[control].metrics()]
        given = made[budget]["cost"]["train_flops"]
        assert spent[-1] >= given and all(flops < given for flops in spent[:-1])  # it stops at the step that reaches it
    asked = result.runs["ask"].metrics()[-1]
    assert 0 < asked["kept"] < asked["answers"]
    assert made["ask"]["facts"].keys() >= {"kernels"} and made["teacher-rl"]["facts"]["preflight"]["samples"] == 16
    weights = {
        name: next(o["sha256"] for o in manifest["outputs"] if o["path"].endswith("model.safetensors"))
        for name, manifest in made.items() if "model.safetensors" in json.dumps(manifest["outputs"])
    }  # fmt: skip
    assert len(set(weights.values())) == len(weights) == 9  # every stage that trains has changed its model
    for rl in ("teacher-rl", "student-rl"):
        assert max(row.get("ratio_error", 0.0) for row in result.runs[rl].metrics()) < 1e-5
    both = totals(tmp_path)
    assert 0 < both["headline"]["flops"] < both["everything"]["flops"]
    assert result.report_path is not None
    page = result.report_path.read_text(encoding="utf-8")
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "") and "teacher-rl" in page
    json.dumps(result.to_json())
    assert {row["label"] for row in result.tables["accuracy"]} >= {"after RL", "distilled"}
    # the second time everything is taken as it is
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = run_recipe(recipe, tmp_path, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    assert [row["value"] for row in again.rows] == [row["value"] for row in result.rows]


def test_a_tokenizer_stage_alone(tmp_path: Path) -> None:
    stage = TokenizerStage(name="t", corpus=Textbook(mix=(TaskMix(task="questions"),)), documents=50)
    result = run_recipe(Recipe(name="tiny", stages=(stage,)), tmp_path, quiet=True)
    assert result.report_path is None and result.rows[0]["value"] > 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_study_at_smoke_size(tmp_path: Path) -> None:
    """Its arms too; what was sampled for the rejection arm is inside the budget it shares with RL."""
    recipe = resolve_recipe("study-quickstart", ["size=smoke", "seeds=1"])
    result = run_recipe(recipe, tmp_path, quiet=True)
    cost = {name: run.manifest["cost"]["train_flops"] for name, run in result.runs.items()}
    spent = [row["flops"] for row in result.runs["teacher-reject-sft"].metrics()]
    budget = cost["teacher-rl"] - cost["teacher-reject"]
    assert 0 < cost["teacher-reject"] < cost["teacher-rl"]
    assert spent[-1] >= budget and all(flops < budget for flops in spent[:-1])
    rows = {row["label"]: row for row in result.tables["accuracy"] if row["of"] == "teacher"}
    after_rl, rejected = (rows[label]["train flops"] for label in ("after RL", "SFT on its own verified answers"))
    assert rejected == pytest.approx(after_rl, rel=0.3)  # the last step goes a little over
