"""The page: self-contained, whole with whatever is there, and safe with whatever a model wrote."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from shoestring.core.atomic import read_lines
from shoestring.core.run import Run, runs_tree
from shoestring.report import words
from shoestring.report.curves import averaged, log_ticks, nice_ticks, smoothed
from shoestring.report.drawing import road_svg
from shoestring.report.page import _results_caption, page, style, write_report
from shoestring.report.samples import choose, pairs_of
from shoestring.report.spec import read_spec
from shoestring.train.configs import Recipe

GAP = "\u00a0"
VOID = {"meta", "br", "path", "rect", "link", "img"}
HOSTILE = "</style></title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>\u202e\x00&lt;"


class Tags(HTMLParser):
    """Which tags and attributes a page has, and whether every one is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: set[str] = set()
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another"


def parsed(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    tags.close()
    assert tags.open == []
    return tags


def test_one_file_without_scripts_or_anything_from_elsewhere(road, tmp_path):
    recipe, runs, root = road
    path = write_report(recipe, runs, root, tmp_path / "report.html")
    text = path.read_text()
    tags = parsed(text)
    assert not tags.seen & {"script", "link", "img", "iframe", "object", "form"}
    assert not re.search(r"https?://|url\((?!#)|@import|src=", text)
    assert len(tags.ids) == len(set(tags.ids))
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert len(text) < 600_000


def test_everything_the_recipe_asks_for_is_on_it(road):
    recipe, runs, root = road
    text = page(recipe, runs, root)
    for stage in recipe.stages:
        assert stage.name in text
    for heading in ("Claims", "The road", "Results", "Curves", "Answers, side by side", "The bill", "How it was made"):
        assert f"<h2>{heading}</h2>" in text
    assert '<th scope="col">of them sampled</th>' in text
    assert "Pass rate in training" in text and "Problems before “teacher RL”" in text
    assert text.count('<b class="yes">✓ reached</b>') + text.count('<b class="no">✗ missed</b>') == 5
    assert recipe.report["note"] in text and "{teacher" not in text
    assert "Not whole yet" not in text


def test_what_models_and_recipes_say_is_text(road, tmp_path):
    recipe, runs, root = road
    report = recipe.report | dict.fromkeys(("title", "note", "finding", "command"), HOSTILE)
    report["curves"] = {HOSTILE: "teacher-rl"}
    report["claims"] = [report["claims"][0] | {"text": HOSTILE}]
    changed = Recipe.from_dict(recipe.to_dict() | {"report": report})
    copy = _copy_of(runs["eval-teacher-rl"], tmp_path / "eval")
    rows = read_lines(copy.path / "samples" / "answers.jsonl")
    for row in rows:
        row |= {"texts": [f"<think>{HOSTILE}</think>{HOSTILE}"], "prompt": HOSTILE, "gold": HOSTILE, "kind": HOSTILE}
    (copy.path / "samples" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page(changed, runs | {"eval-teacher-rl": copy}, root)
    tags = parsed(text)
    assert not tags.seen & {"script", "img"} and not {name for name in tags.attributes if name.startswith("on")}
    assert "&lt;script&gt;alert(1)" in text and "\x00" not in text and "\u202e" not in text


@pytest.mark.parametrize("kept", [0, 1, 4, 9, 13])
def test_a_road_half_gone_is_a_page_that_says_so(road, kept):
    recipe, runs, root = road
    some = dict(list(runs.items())[:kept])
    text = page(recipe, some, root)
    parsed(text)
    assert f"{len(runs) - kept} of {len(runs)} stages have not finished" in text and "cannot be decided yet" in text


def test_an_unfinished_run_and_damaged_files_do_not_stop_it(road, tmp_path):
    recipe, runs, _ = road
    stage = next(stage for stage in recipe.stages if stage.name == "teacher-rl")
    begun = Run.open(tmp_path, stage="teacher-rl", recipe="quickstart", config=stage)
    with begun.attempt():
        begun.metric(1, reward=0.5, loss=float("nan"), length=7)
    damaged = _copy_of(runs["eval-distill"], tmp_path / "damaged")
    (damaged.path / "result.json").write_text("{")
    (damaged.path / "samples" / "answers.jsonl").write_text('{"problem_id": 1}\n')
    text = page(recipe, runs | {"teacher-rl": begun, "eval-distill": damaged}, tmp_path)
    parsed(text)
    assert "teacher-rl (interrupted)" in text and "result.json unreadable" in text


def test_what_is_no_number_is_said_beside_its_curve(road, tmp_path):
    """A line that is not there must not look like one that was never drawn."""
    recipe, runs, root = road
    found = [_copy_of(runs[name], tmp_path / name) for name in ("teacher-rl", "student-pretrain")]
    for run, metric, every in zip(found, ("entropy", "loss"), (2, 1), strict=True):
        rows = [row | ({metric: "nan"} if i % every == 0 else {}) for i, row in enumerate(run.metrics())]
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page(recipe, runs | {"teacher-rl": found[0], "student-pretrain": found[1]}, root)
    parsed(text)
    count = len(found[1].metrics())
    assert f"no number at {count} of {count} steps, first at" in text
    assert text.count("no number at") == 2 and "no number at" not in page(recipe, runs, root)


def test_a_recipe_without_a_report_still_has_a_page(road):
    recipe, runs, root = road
    text = page(Recipe.from_dict(recipe.to_dict() | {"report": {}}), runs, root)
    parsed(text)
    assert "The bill" in text and "Results" not in text


def test_the_same_problem_stands_on_both_sides_and_failures_are_shown(road):
    recipe, _, _ = road
    pair, _ = pairs_of(read_spec(recipe))
    left = {str(i): {"task": "t" if i < 3 else "u", "right": [i == 0]} for i in range(6)}
    right = {str(i): {"task": "t" if i < 3 else "u", "right": [i in (0, 2)]} for i in range(1, 7)}
    assert choose(left, right, pair) == ["2", "3", "1"]  # improved in t; nothing fits in u; the first still wrong


def test_of_several_seeds_the_first_is_drawn(road):
    recipe, runs, root = road
    entries = [entry | {"seed": int(entry["of"] == "student")} for entry in recipe.report["evals"]]
    changed = Recipe.from_dict(recipe.to_dict() | {"report": recipe.report | {"evals": entries, "claims": []}})
    drawn = road_svg(changed, read_spec(changed), runs)
    assert "teacher-rl" in drawn and "tokenizer" in drawn and "student-rl" not in drawn
    text = page(changed, runs, root)
    assert text.count("first of 2 seeds") == 3  # the road, the curves, the answers
    assert "over seeds where" not in text  # each row has one seed of its own
    assert "student-rl" in road_svg(recipe, read_spec(recipe), runs)


def test_an_arrow_is_firm_where_the_manifest_names_the_parent(road):
    recipe, runs, _ = road
    whole = road_svg(recipe, read_spec(recipe), runs)
    assert "arrow planned" not in whole and whole.count('class="arrow"') == 11
    without = {name: run for name, run in runs.items() if name != "distill"}
    assert road_svg(recipe, read_spec(recipe), without).count("arrow planned") == 2


def test_drawing_numbers():
    assert nice_ticks(0.53, 0.97) == [0.4, 0.6, 0.8, 1.0]
    for low, high in ((0.0, 1.0), (3e-7, 4e-7), (-2.0, 13.0), (5.0, 5.0), (0.0, 0.0), (1e9, 1.1e9)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low <= high <= ticks[-1] and 2 <= len(ticks) <= 8
        assert all(a < b for a, b in itertools.pairwise(ticks))
    assert log_ticks(0.29, 3.1) == [0.2, 0.5, 1.0, 2.0, 5.0] and log_ticks(1.0, 1.0) == [1.0, 2.0]
    line = [(float(i), 2.0 * i) for i in range(1000)]
    assert smoothed(line)[500] == pytest.approx((500.0, 1000.0))
    thin = averaged(line, 160)
    assert len(thin) <= 160 and thin[0] == line[0] and thin[-1] == line[-1]


def test_a_curve_begins_where_its_run_began(road, tmp_path):
    """A steep start is neither in its line nor beside its title averaged away."""
    recipe, runs, root = road
    run = _copy_of(runs["teacher-pretrain"], tmp_path / "run")
    rows = [{"step": i + 1, "loss": 6.0 if i == 0 else 2.0 if i < 50 else 0.5} for i in range(900)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page(recipe, {"teacher-pretrain": run}, root)
    assert "6 → 0.5" in text
    assert averaged(smoothed([(row["step"], row["loss"]) for row in rows]), 160)[0] == (1, 6.0)


def test_a_row_of_one_seed_beside_others_says_what_its_error_is_over():
    caption = _results_caption([{"seeds": 3}, {"seeds": 1}])
    assert "over seeds where a row names them, elsewhere over the problems" in caption
    assert "standard error over seeds (the" in _results_caption([{"seeds": 3}, {"seeds": 0}])
    assert "standard error over problems (the" in _results_caption([{"seeds": 1}])


def test_it_names_the_command_that_was_typed(road):
    """A recipe's name need be no command: quickstart at size=smoke is called quickstart-smoke."""
    recipe, runs, root = road
    typed = page(recipe, runs, root, "shoestring run mine --set size=smoke")
    assert typed.count("shoestring run mine --set size=smoke") == 2 and "<dt>Command</dt>" in typed
    plain = page(recipe, runs, root)
    assert "shoestring run" not in plain and "<dt>Command</dt>" not in plain and f"shoestring · {recipe.name}" in plain


@pytest.mark.parametrize(
    ("value", "count", "flops"),
    [(12e12, "12.0 T", "12.0 TFLOP"), (1e6, "1.00 M", "1.00 MFLOP"), (446e9, "446 G", "446 GFLOP"),
     (999_960_000, "1.00 G", "1.00 GFLOP"), (12, "12", "12 FLOP")],
)  # fmt: skip
def test_numbers_keep_three_digits(value, count, flops):
    assert (words.count(value), words.flops(value)) == (count.replace(" ", GAP), flops.replace(" ", GAP))


def test_a_number_on_an_axis_is_short():
    assert [words.tick(value) for value in (20_000, 1e6, 200)] == [f"20{GAP}k", f"1{GAP}M", "200"]


def test_the_stylesheet_is_part_of_the_package():
    assert style().count("{") == style().count("}") and "http" not in style()


def _copy_of(run: Run, folder: Path) -> Run:
    return Run.load(shutil.copytree(run.path, folder))


def test_the_runs_on_disk_give_the_same_page(road):
    recipe, runs, root = road
    loaded = {run.manifest["stage"]: run for run in runs_tree(root)}
    again = Recipe.from_json(recipe.to_json())
    assert page(again, {name: loaded[name] for name in runs}, root) == page(recipe, runs, root)
