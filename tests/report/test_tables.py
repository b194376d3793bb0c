"""The tables against numbers computed by hand from the same evaluations."""

from __future__ import annotations

import json
import statistics

import pytest

from shoestring.core.config import Config
from shoestring.core.errors import UserError
from shoestring.core.run import Run
from shoestring.evals.paired import compare
from shoestring.report.findings import RESAMPLES
from shoestring.report.spec import read_spec
from shoestring.report.tables import bill_table, claims, result_table
from shoestring.train.configs import Recipe


def with_report(recipe: Recipe, **changes) -> Recipe:
    return Recipe.from_dict(recipe.to_dict() | {"report": recipe.report | changes})


def result(runs: dict[str, Run], stage: str) -> dict:
    return json.loads((runs[stage].path / "result.json").read_text())


def scores(runs: dict[str, Run], stage: str) -> dict[str, float]:
    return {row["problem_id"]: row["correct"] / row["samples"] for row in result(runs, stage)["rows"]}


def test_a_row_a_label_with_the_numbers_of_its_evaluation(road):
    recipe, runs, _ = road
    rows = result_table(recipe, runs)
    assert [(row["of"], row["label"]) for row in rows] == [(e["of"], e["label"]) for e in recipe.report["evals"]]
    row, told = rows[1], result(runs, "eval-teacher-rl")
    assert row["pass@1"] == told["overall"]["pass@1"]
    assert row["pass@1 stderr"] == told["overall"]["pass@1_stderr"]
    assert row["task: logic"] == told["by_task"]["logic"]["pass@1"]
    assert {"pass@4", "cons@4", "mean_tokens", "task: questions", "task: programs"} <= set(row)
    assert row["seeds"] == 1 and row["missing"] is None


def test_training_flops_follow_the_weights_and_the_asking_of_their_traces(road):
    recipe, runs, _ = road
    spent = {name: run.manifest["cost"]["train_flops"] for name, run in runs.items()}
    by_label = {row["label"]: row["train flops"] for row in result_table(recipe, runs)}
    line = ("teacher-pretrain", "teacher-sft", "teacher-rl")
    assert by_label["after RL"] == pytest.approx(sum(spent[name] for name in line))
    assert by_label["distilled"] == pytest.approx(sum(spent[n] for n in ("student-pretrain", "ask", "distill")))


def test_claims_are_paired_differences_and_ratios_of_the_same_problems(road):
    recipe, runs, _ = road
    adds, more, longer, keeps, beats = claims(recipe, runs)
    a, b = scores(runs, "eval-teacher-rl"), scores(runs, "eval-teacher-sft")
    paired = compare(a, b, resamples=RESAMPLES)
    assert adds["value"] == pytest.approx(paired.difference)
    assert adds["stderr"] == pytest.approx(paired.stderr, rel=1e-6)
    c = scores(runs, "eval-teacher-more-sft")
    assert more["value"] == pytest.approx(statistics.fmean(a.values()) - statistics.fmean(c.values()))
    d = scores(runs, "eval-distill")
    assert keeps["value"] == pytest.approx(statistics.fmean(d.values()) / statistics.fmean(a.values()))
    assert longer["unit"] == "times" and longer["value"] > 2.5
    assert [row["reached"] for row in (adds, longer)] == [True, True]
    assert beats["reached"] is (beats["value"] >= 0.35)


def test_several_seeds_are_averaged_and_give_the_error_over_seeds(road):
    recipe, runs, _ = road
    stages = ["eval-teacher-rl", "eval-distill", "eval-student-rl"]
    entries = [{"of": "m", "label": "x", "stage": s, "seed": seed} for seed, s in enumerate(stages)]
    entries += [{"of": "m", "label": "base", "stage": "eval-teacher-sft", "seed": seed} for seed in range(2)]
    x, base = {"of": "m", "label": "x"}, {"of": "m", "label": "base"}
    claim = {"text": "x beats base", "minuend": x, "subtrahend": base, "at_least": 0.0}
    changed = with_report(recipe, evals=entries, claims=[claim], finding="")
    values = [result(runs, stage)["overall"]["pass@1"] for stage in stages]
    row = result_table(changed, runs)[0]
    assert row["seeds"] == 3 and row["pass@1"] == pytest.approx(statistics.fmean(values))
    assert row["pass@1 stderr"] == pytest.approx(statistics.stdev(values) / 3**0.5)
    (judged,) = claims(changed, runs)
    zero = result(runs, "eval-teacher-sft")["overall"]["pass@1"]
    gaps = [value - zero for value in values[:2]]  # the base has two seeds only
    assert judged["seeds"] == 2 and judged["value"] == pytest.approx(statistics.fmean(gaps))
    assert judged["stderr"] == pytest.approx(statistics.stdev(gaps) / 2**0.5)


def test_what_is_not_there_is_told_and_decides_nothing(road):
    recipe, runs, _ = road
    fewer = {name: run for name, run in runs.items() if name != "eval-teacher-rl"}
    row = result_table(recipe, fewer)[1]
    assert row["pass@1"] is None and "eval-teacher-rl: not begun" in row["missing"]
    assert claims(recipe, fewer)[0]["reached"] is None


def test_the_bill_adds_up(road):
    recipe, runs, root = road
    rows = bill_table(recipe, runs, root)
    stages, totals = [r for r in rows if r["kind"] != "total"], {r["stage"]: r for r in rows if r["kind"] == "total"}
    assert [row["stage"] for row in stages] == [stage.name for stage in recipe.stages]
    for key in ("seconds", "tokens", "sampled_tokens", "flops", "usd"):
        assert totals["headline"][key] == pytest.approx(sum(row[key] for row in stages if row["headline"]))
        assert totals["everything"][key] == pytest.approx(sum(row[key] for row in stages))


def test_other_runs_in_the_folder_are_in_a_total_of_their_own(road, tmp_path):
    recipe, runs, root = road
    few = {name: runs[name] for name in ("tokenizer", "teacher-pretrain")}
    names = [row["stage"] for row in bill_table(recipe, few, root) if row["kind"] == "total"]
    assert names == ["headline", "everything", "all that was tried in this folder"]


P, Q = {"of": "teacher", "label": "after RL"}, {"of": "teacher", "label": "after SFT"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"evals": [{"of": "a", "label": "b", "stage": "eval-teacher-r"}], "claims": []}, "Did you mean"),
        ({"claims": [{"text": "t", "minuend": P, "at_least": 0.1}]}, "give minuend and subtrahend"),
        ({"claims": [{"text": "t", "minuend": P, "subtrahend": Q}]}, "at_least or at_most"),
        ({"claims": [{"text": "t", "minuend": P, "subtrahend": Q, "ratio_of": P, "at_least": 1}]}, "give minuend"),
        ({"claims": [{"text": "t", "ratio_of": P | {"label": "after"}, "to": Q, "at_least": 1}]}, "there is no"),
        ({"finding": "{teacher/nothing}"}, "finding"),
        ({"curve": {}}, 'unknown key "curve"'),
        ({"samples": {"before": "teacher-rl"}}, "samples"),
    ],
)
def test_a_mistake_in_the_report_is_one_sentence(road, changes, told):
    recipe, _, _ = road
    with pytest.raises(UserError, match=told) as caught:
        read_spec(with_report(recipe, **changes))
    assert "\n" not in str(caught.value)


def test_the_spec_is_strict_json(road):
    recipe, _, _ = road
    spec: Config = read_spec(recipe)
    assert type(spec).from_dict(spec.to_dict()) == spec
