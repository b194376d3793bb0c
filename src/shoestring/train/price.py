"""What a recipe would cost on rented chips: every stage by the planner's own models. Loads no torch.

Tokens and answers come from `estimate`; hours from `cost.stages`, each with an 80 % interval and what it assumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from shoestring.cost.chips import Cluster
from shoestring.cost.plan import price_of
from shoestring.cost.residual import Interval
from shoestring.cost.shape import ModelShape
from shoestring.cost.stages import SFT_MFU, StageCost, evaluation, generation, reinforcement, sft
from shoestring.train.configs import Recipe, Stage
from shoestring.train.estimate import ANSWER_TOKENS, PROMPT_TOKENS, estimate, stage_shapes

SMALL = 1e8  # active parameters below which a chip's peak says little
NOTHING = Interval(0.0, 0.0, 0.0)


def price(
    recipe: Recipe, cluster: Cluster, *, usd_per_hour: float | None = None, known: Mapping[str, ModelShape] = {}
) -> dict[str, Any]:
    """Chip-hours and dollars of each stage, and the two totals: the headline and everything. JSON values only."""
    rent, guesses = price_of(cluster.chip, usd_per_hour)
    shapes = stage_shapes(recipe, known)
    stages = []
    for stage, row in zip(recipe.stages, estimate(recipe, known), strict=True):
        shape = shapes[stage.name]
        cost = None if shape is None else _cost(stage, row, shape, cluster)
        hours = NOTHING if cost is None else cost.hours
        stages.append({"stage": stage.name, "kind": stage.stage, "headline": stage.headline,
                       "about_tokens": row["about_tokens"], "gpu_hours": hours.to_dict(), "usd": _times(hours, rent),
                       "assumed": list(cost.assumed) if cost else []})  # fmt: skip
    if any(shape is not None and shape.params().active < SMALL for shape in shapes.values()):
        guesses.append(f"models this small do not reach {SFT_MFU:.0%} of a chip's peak: the hours are a lower bound")
    return {"recipe": recipe.name, "on": cluster.label, "stages": stages, "guesses": guesses,
            "headline": _total(row for row in stages if row["headline"]), "everything": _total(stages)}  # fmt: skip


def _cost(stage: Stage, row: Mapping[str, Any], shape: ModelShape, cluster: Cluster) -> StageCost | None:
    settings: Any = stage
    if stage.stage == "rl":
        length = settings.decoding.max_new_tokens / 2
        rollouts = row["about_tokens"] / (length + PROMPT_TOKENS)
        return reinforcement(shape, cluster.chip, rollouts, length, prompt=PROMPT_TOKENS) if rollouts else None
    if stage.stage in ("eval", "ask", "reject"):
        entries = len(settings.mix) if stage.stage == "eval" else 1
        answers = entries * settings.problems * settings.samples
        if stage.stage == "eval":
            return evaluation(shape, cluster, answers, ANSWER_TOKENS)
        return generation(shape, cluster.chip, answers, ANSWER_TOKENS)
    return sft(shape, cluster.chip, row["about_tokens"]) if row["about_tokens"] else None


def _times(hours: Interval, rent: Interval) -> dict[str, float]:
    return {side: getattr(hours, side) * getattr(rent, side) for side in ("low", "mid", "high")}


def _total(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    kept = list(rows)
    sides = ("low", "mid", "high")
    return {what: {side: sum(row[what][side] for row in kept) for side in sides} for what in ("gpu_hours", "usd")}


def text(document: Mapping[str, Any]) -> str:
    """The table of `plan RECIPE`."""
    from shoestring.cost.show_plan import span

    out = [f"{document['recipe']} on {document['on']}", f"  {'stage':<28}{'tokens':>10}  {'chip-hours':<34}dollars"]
    for row in document["stages"]:
        hours, dollars = span(Interval(**row["gpu_hours"])), span(Interval(**row["usd"]), money=True)
        mark = "" if row["headline"] else "  (not in the headline)"
        out.append(f"  {row['stage']:<28}{row['about_tokens']:>10,}  {hours:<34}{dollars}{mark}")
    for name in ("headline", "everything"):
        hours, dollars = (span(Interval(**document[name][k]), money=k == "usd") for k in ("gpu_hours", "usd"))
        out.append(f"  {name:<40}{hours:<34}{dollars}")
    return "\n".join(out + [f"  guessed: {guess}" for guess in document["guesses"]])
