"""A recipe priced on rented chips: every stage, two totals, what cannot be priced said in a sentence."""

from __future__ import annotations

import json

import pytest

from shoestring import cli
from shoestring.cost.chips import parse_cluster
from shoestring.cost.models import named_shape
from shoestring.cost.stages import sft
from shoestring.road import resolve_recipe
from shoestring.train.configs import PretrainStage, Recipe
from shoestring.train.price import price


def test_totals_are_sums_and_the_headline_leaves_controls_out() -> None:
    found = price(resolve_recipe("quickstart", []), parse_cluster("1xH100"), usd_per_hour=2.0)
    by_name = {row["stage"]: row for row in found["stages"]}
    assert all(row["usd"]["mid"] > 0 for name, row in by_name.items() if name != "tokenizer")
    assert all(row["usd"]["mid"] == pytest.approx(2 * row["gpu_hours"]["mid"]) for row in found["stages"])
    headline = sum(row["gpu_hours"]["mid"] for row in found["stages"] if row["headline"])
    assert found["headline"]["gpu_hours"]["mid"] == pytest.approx(headline)
    assert found["everything"]["usd"]["mid"] > found["headline"]["usd"]["mid"] > 0
    assert not by_name["teacher-more-sft"]["headline"]
    assert "lower bound" in found["guesses"][-1]


def test_a_pretraining_stage_costs_its_flops() -> None:
    recipe = resolve_recipe("quickstart", [])
    stage = next(s for s in recipe.stages if isinstance(s, PretrainStage))
    bigger = stage.model_copy(update={"steps": stage.steps * 1000, "inputs": {"model": "big"}, "model": None})
    road = Recipe(name="r", about="", stages=(bigger,), report={})
    cluster, shape = parse_cluster("8xH100"), named_shape("llama-3.1-8b")
    found = price(road, cluster, known={"big": shape})
    tokens = bigger.steps * bigger.tokens_per_step
    assert found["everything"]["gpu_hours"]["mid"] == pytest.approx(sft(shape, cluster.chip, tokens).hours.mid)
    assert not any("lower bound" in guess for guess in found["guesses"])


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "quickstart", "--on", "8xH100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "quickstart"
    assert cli.main(["plan", "quickstart", "--on", "8xH100"]) == 0
    assert "not in the headline" in capsys.readouterr().out
    assert cli.main(["plan", "quickstart"]) == 2
    assert "--on" in capsys.readouterr().err
    assert cli.main(["plan", "deepseek-v3", "--on", "8xH100"]) == 2
    assert "--tokens" in capsys.readouterr().err
