"""The road: a recipe resolved, priced, and run stage by stage, each from where it was left.

A stage's digest is made of its config, its parents' digests and its data, so a finished stage is taken as it is and a
changed one is made beside it. Everything a stage spent goes into its cost and the ledger.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoestring.core import ledger
from shoestring.core.again import since, through
from shoestring.core.config import read_mapping
from shoestring.core.errors import UserError, did_you_mean
from shoestring.core.manifest import run_digest
from shoestring.core.registry import load_part
from shoestring.core.run import Run, newest_run
from shoestring.cost.shape import ModelShape
from shoestring.report import tables
from shoestring.report.page import write_report
from shoestring.report.spec import read_spec
from shoestring.road_inputs import (
    Found,
    check_road,
    checkpoint_of,
    data_of,
    find_input,
    is_model,
    make_runs_dir,
    parents_of,
    positions_of,
)
from shoestring.train.configs import Recipe, Stage
from shoestring.train.estimate import ASSUMED_VOCAB, estimate, stage_shapes

STAGES = {
    "tokenizer": "tokenize", "pretrain": "pretrain", "sft": "sft", "rl": "rl", "reject": "reject", "ask": "ask",
    "capture": "capture", "prune": "prune", "distill": "distill", "eval": "evaluate",
}  # fmt: skip


@dataclass(slots=True)
class RoadResult:
    """What a road left: a row a stage, its runs by stage name, and the report."""

    recipe: Recipe
    runs: dict[str, Run]
    rows: list[dict[str, Any]]
    report_path: Path | None
    tables: dict[str, list[dict[str, Any]]]  # of a recipe that says what to report: accuracy, claims, bill

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1, "recipe": self.recipe.name, "rows": self.rows,
            "runs": {name: str(run.path) for name, run in self.runs.items()},
            "report": None if self.report_path is None else str(self.report_path), "tables": self.tables,
        }  # fmt: skip


# ---- which road ---------------------------------------------------------------------------------------------------


def resolve_recipe(name_or_path: str, sets: Sequence[str]) -> Recipe:
    """A recipe by name, by the path of a .py, .json or .yaml file, with `--set` applied.

    A set whose key is an argument of the recipe's function (size=smoke) goes to the function, any other changes the
    config it returns. Raises UserError for an unknown recipe, key or value.
    """
    if name_or_path.endswith((".json", ".yaml", ".yml")):
        return Recipe.from_dict(read_mapping(name_or_path), where=name_or_path).with_sets(sets)
    module = load_part("recipes", name_or_path)
    if name_or_path == "stage":
        raise UserError("a single stage has a verb of its own: shoestring pretrain, sft, rl, ... --help.")
    if not hasattr(module, "recipe"):
        raise UserError(f"{name_or_path} defines no recipe() function that returns a Recipe.")
    known = inspect.signature(module.recipe).parameters
    arguments, changes = {}, []
    for text in sets:
        key, given, value = text.partition("=")
        if given and key in known:
            arguments[key] = _argument(text, value, known[key])
        elif given and "." not in key and key not in Recipe.model_fields:
            raise UserError(f'--set {text}: "{key}" is no argument of recipe {name_or_path}.'
                            f"{did_you_mean(key, [*known, *Recipe.model_fields])}")  # fmt: skip
        else:
            changes.append(text)
    made: Recipe = module.recipe(**arguments)
    return made.with_sets(changes)


def command_line(name_or_path: str, sets: Sequence[str]) -> str:
    """What a person types to run this again; of a path its last part, for a report names no folder of the machine."""
    return shlex.join(["shoestring", "run", Path(name_or_path).name, *(word for s in sets for word in ("--set", s))])


def _argument(text: str, value: str, parameter: inspect.Parameter) -> str | int:
    """The value of a recipe's argument, of the type its default has."""
    if not isinstance(parameter.default, int):
        return value
    if not re.fullmatch(r"-?\d+", value):
        raise UserError(f"--set {text}: {parameter.name} must be a whole number.")
    return int(value)


def stage_recipe(kind: str, sets: Sequence[str], inputs: Mapping[str, str]) -> Recipe:
    """A road of one stage: the defaults of recipe "stage" for that kind, its inputs, and `--set key=value` on it."""
    module = load_part("recipes", "stage")
    recipe: Recipe = module.recipe(kind, dict(inputs))
    return recipe.with_sets(f"stages.{recipe.stages[0].name}.{text}" for text in sets)


# ---- what it would cost -------------------------------------------------------------------------------------------


def plan_rows(recipe: Recipe, runs_dir: Path) -> list[dict[str, Any]]:
    """A row a stage: what would run, and its tokens, FLOPs, seconds and dollars, estimated without running anything.

    Models that are there are priced by their config.json. Raises UserError as `run_recipe` does before its work.
    """
    read_spec(recipe)
    inputs = check_road(recipe, Path(runs_dir), download=False)
    bills = {name: run.manifest["cost"] for name, run in inputs.items() if isinstance(run, Run)}
    spent = {name: float(bill.get("train_flops", 0.0)) for name, bill in bills.items()}
    return estimate(recipe, _shapes(recipe, inputs), spent)


def parameters_of(recipe: Recipe, runs_dir: Path) -> dict[str, float]:
    """Parameters of the models that are there, and of what each stage would leave, by name; from shapes alone."""
    shapes = stage_shapes(recipe, _shapes(recipe, check_road(recipe, Path(runs_dir), download=False)))
    return {name: float(shape.params().total) for name, shape in shapes.items() if shape is not None}


def _shapes(recipe: Recipe, inputs: Mapping[str, Found]) -> dict[str, ModelShape]:
    """Of the models among a recipe's inputs, by their config.json."""
    named = {value for stage in recipe.stages for role, value in stage.inputs.items() if is_model(role)}
    return {name: _shape(inputs[name], name) for name in sorted(named & inputs.keys())}


def _shape(found: Found, name: str) -> ModelShape:
    from shoestring.models._counted import config_shape

    folder = checkpoint_of(found)
    assert folder is not None  # check_road saw it
    return config_shape(folder, name)


# ---- running it ---------------------------------------------------------------------------------------------------


def run_recipe(
    recipe: Recipe, runs_dir: Path, *, again: bool = False, quiet: bool = False, command: str = ""
) -> RoadResult:  # fmt: skip
    """Run every stage that is not finished, in order, then write the report; `command` is what it says it is from.

    Raises UserError before any work when an input does not exist; a stage that fails leaves a run that resumes.
    """
    from shoestring.train.context import Context
    from shoestring.train.machine import Machine

    runs_dir = Path(runs_dir)
    read_spec(recipe)  # a misspelt stage in what is to be reported is said now, not at the end
    outside = check_road(recipe, runs_dir)
    _check_models_and_devices(recipe, outside)
    make_runs_dir(runs_dir)
    moment = since(runs_dir, recipe.digest()) if again else False
    machine, done = Machine(runs_dir), dict[str, Run]()
    for stage in recipe.stages:
        inputs = {role: done[value] if value in done else outside[value] for role, value in stage.inputs.items()}
        run = Run.open(
            runs_dir, stage=stage.name, recipe=recipe.runs_as or recipe.name, config=stage, seed=stage.seed,
            headline=stage.headline, parents=parents_of(inputs), data=data_of(stage), again=moment,
        )  # fmt: skip
        if not run.finished:
            _run_stage(stage, Context(run, inputs, machine, recipe.usd_per_hour, quiet))
        done[stage.name] = run
    if again:
        through(runs_dir, recipe.digest())
    if not recipe.report:
        return RoadResult(recipe, done, result_rows(recipe, done), None, {})
    made = {
        "accuracy": tables.result_table(recipe, done), "claims": tables.claims(recipe, done),
        "bill": tables.bill_table(recipe, done, runs_dir),
    }  # fmt: skip
    path = report_recipe(recipe, runs_dir, done, command)
    return RoadResult(recipe, done, result_rows(recipe, done), path, made)


def _check_models_and_devices(recipe: Recipe, outside: Mapping[str, Found]) -> None:
    """What a later stage would stumble over, said before the first begins; needs torch, so no dry run does it."""
    from shoestring.train.state import checked_device, described_model

    room: dict[str, Any] = {name: positions_of(found) for name, found in outside.items()}
    for stage in recipe.stages:
        checked_device(stage.compute.device)
        sampled = stage.inputs.get("model") or stage.inputs.get("teacher", "")
        room[stage.name] = room.get(sampled)
        if (spec := getattr(stage, "model", None)) is not None:
            _, config = described_model(spec, vocab_size=ASSUMED_VOCAB)
            room[stage.name] = getattr(config, "max_position_embeddings", None)
        _check_length(stage, room[stage.name])


def _check_length(stage: Stage, room: Any) -> None:
    """Whether the model that a stage samples has positions for a prompt and the answer."""
    samples = stage.stage in ("rl", "reject", "ask", "eval") or getattr(stage, "way", "") == "on_policy"
    decoding = getattr(stage, "decoding", None)
    if samples and decoding is not None and isinstance(room, int) and decoding.max_new_tokens >= room:
        raise UserError(
            f'stage "{stage.name}": decoding.max_new_tokens is {decoding.max_new_tokens}, and the model has {room} '
            "positions for prompt and answer together; lower it, or raise the model's max_position_embeddings."
        )


def _run_stage(stage: Stage, ctx: Any) -> None:
    """One attempt at one stage, its cost counted over all attempts."""
    from shoestring.train.machine import threads

    module = importlib.import_module(f"shoestring.train.{STAGES[stage.stage]}")
    run, started = ctx.run, time.perf_counter()
    with run.attempt(usd_per_hour=ctx.usd_per_hour), threads(stage.compute.threads):
        # read inside: a killed attempt gets its line when the next one begins
        earlier = sum(entry.seconds for entry in ledger.read(run.path.parent) if entry.run == run.name)
        peak = ctx.machine.peak_flops(stage.compute.device)
        run.note(chip=ctx.machine.key)
        outcome = module.run(stage, ctx)
        seconds = earlier + time.perf_counter() - started
        run.finish(
            outputs=outcome.outputs, headline_metric=outcome.headline_metric,
            cost={
                "seconds": seconds, "tokens": outcome.tokens, "sampled_tokens": outcome.sampled_tokens,
                "flops": outcome.flops,
                "train_flops": outcome.train_flops, "usd": seconds / 3600 * ctx.usd_per_hour,
                "usd_per_hour": ctx.usd_per_hour, "peak_flops": peak, "peak_share": outcome.flops / seconds / peak,
            },
        )  # fmt: skip


# ---- what came of it ----------------------------------------------------------------------------------------------


def result_rows(recipe: Recipe, runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """A row a stage for the terminal; the recipe's own tables are in the report."""
    rows = []
    for stage in recipe.stages:
        made = runs[stage.name].manifest
        cost, metric = made["cost"], made["headline_metric"] or {}
        rows.append({
            "stage": stage.name, "status": made["status"], "metric": metric.get("name"), "value": metric.get("value"),
            "stderr": metric.get("stderr"), "seconds": cost["seconds"], "tokens": cost["tokens"],
            "sampled_tokens": cost.get("sampled_tokens"), "flops": cost["flops"],
            "peak_share": cost["peak_share"], "usd": cost["usd"], "headline": made["headline"],
        })  # fmt: skip
    return rows


def report_recipe(
    recipe: Recipe, runs_dir: Path, runs: Mapping[str, Run] | None = None, command: str = ""
) -> Path:  # fmt: skip
    """Write the report of a recipe from what its finished runs left. Raises UserError where there is none of them."""
    if runs is None and not (runs := find_runs(recipe, Path(runs_dir))):
        raise UserError(
            f'{runs_dir} holds no run of recipe "{recipe.name}" with these settings; run it first, or say where by '
            "--runs, and what was changed by --set."
        )
    path = Path(runs_dir) / f"report-{recipe.name}-{recipe.digest()}.html"
    return write_report(recipe, runs, Path(runs_dir), path, command)


def find_runs(recipe: Recipe, runs_dir: Path) -> dict[str, Run]:
    """The runs of a recipe's stages that are there, finished or not, without making any."""
    found: dict[str, Run] = {}
    for stage in recipe.stages:
        inputs = {
            role: found[value] if value in found else find_input(value, runs_dir, download=False)
            for role, value in stage.inputs.items()
        }
        there = {role: value for role, value in inputs.items() if value is not None}
        if len(there) < len(inputs):
            continue
        digest = run_digest(stage.to_dict(), parents_of(there), data_of(stage), stage.seed)
        run, _ = newest_run(runs_dir, f"{stage.name}-{recipe.runs_as or recipe.name}-{digest}")
        if run is not None:
            found[stage.name] = run
    return found
