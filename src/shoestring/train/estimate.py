"""What a recipe would cost, before it is run: steps, tokens, FLOPs, seconds and dollars a stage. Loads no torch.

Tokens of training on answers are guessed from row lengths, those of RL from half the longest answer, a prompt read
once for its group and every group trained on; seconds from FLOPs at a rate that small models reach on two cores.
Guesses, and marked as such by "about".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoestring.core.errors import UserError
from shoestring.cost.hf import shape_from_hf
from shoestring.cost.pruned import pruned
from shoestring.cost.shape import ModelShape
from shoestring.train.configs import PretrainStage, PruneStage, Recipe, Stage, TrainBase

ASSUMED_FLOPS = 5.0e10  # FLOP/s that training of a 0.3M-parameter model reaches on two cores (docs/quickstart.md)
ASSUMED_VOCAB = 320
CAPTURED = 1000  # answers in a capture, where nothing better is known
PROMPT_TOKENS = 16  # of a short problem
ANSWER_TOKENS = 48  # tokens of a worked answer with its question, where nothing better is known


def estimate(
    recipe: Recipe, known: Mapping[str, ModelShape] = {}, trained: Mapping[str, float] = {}
) -> list[dict[str, Any]]:
    """A row a stage, in order. `known` and `trained`: shapes and training FLOPs of inputs that are there already."""
    shapes = stage_shapes(recipe, known)
    spent: dict[str, float] = {**trained}
    rows: list[dict[str, Any]] = []
    for stage in recipe.stages:
        shape = shapes[stage.name]
        tokens, flops = _work(stage, shape, spent)
        flops += _teachers(stage, tokens, shapes)
        spent[stage.name] = flops
        seconds = flops / ASSUMED_FLOPS
        rows.append({
            "stage": stage.name, "kind": stage.stage, "from": ", ".join(f"{r}={v}" for r, v in stage.inputs.items()),
            "steps": getattr(stage, "steps", None), "about_tokens": round(tokens), "about_flops": flops,
            "about_seconds": round(seconds, 1), "about_usd": seconds / 3600 * recipe.usd_per_hour,
            "headline": stage.headline,
        })  # fmt: skip
    notes = [shape.note if (shape := shapes[row["stage"]]) is not None else "" for row in rows]
    if any(notes):
        for row, note in zip(rows, notes, strict=True):
            row["assumed"] = note
    return rows


def plan_totals(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The two totals of a plan's rows: the headline's stages, and everything."""
    counted = ("about_tokens", "about_flops", "about_seconds", "about_usd")
    chosen = {"headline": [row for row in rows if row["headline"]], "everything": rows}
    return {name: {key: sum(row[key] for row in some) for key in counted} for name, some in chosen.items()}


def stage_shapes(recipe: Recipe, known: Mapping[str, ModelShape] = {}) -> dict[str, ModelShape | None]:
    """The shape of the model each stage works on, by stage; None where there is none, or it is not known yet."""
    shapes: dict[str, ModelShape | None] = {**known}
    for stage in recipe.stages:
        shapes[stage.name] = _shape(stage, shapes)
    return shapes


def _shape(stage: Stage, shapes: dict[str, ModelShape | None]) -> ModelShape | None:
    if isinstance(stage, PretrainStage) and stage.model is not None:
        defaults = {"model_type": "deepseek_v3" if stage.model.family == "deepseek" else "qwen2"}
        return shape_from_hf({**defaults, "vocab_size": ASSUMED_VOCAB, **stage.model.config}, f"stage {stage.name}")
    role = next((role for role in ("model", "teacher") if role in stage.inputs), "")
    found = shapes.get(stage.inputs.get(role, ""))
    return _pruned(stage, found) if isinstance(stage, PruneStage) and found is not None else found


def _pruned(stage: PruneStage, shape: ModelShape) -> ModelShape:
    try:
        return pruned(shape, **stage.kept())
    except UserError as error:
        raise UserError(f'stage "{stage.name}": {error}') from None


def _work(stage: Stage, shape: ModelShape | None, spent: dict[str, float]) -> tuple[float, float]:
    """(tokens, FLOPs) of a stage; 0 FLOPs where the model is not known before it is loaded."""
    kind = stage.stage
    forward = 0.0 if shape is None else shape.flops_per_token(64, backward=False)
    with_mtp = isinstance(stage, TrainBase) and stage.mtp_lambda > 0
    train = 0.0 if shape is None else shape.flops_per_token(64, mtp=with_mtp)
    if isinstance(stage, TrainBase) and stage.match_flops:
        given, taken = (_sum(stage, roles, spent) for roles in (stage.match_flops, stage.spent_flops))
        flops = max(given - taken, 0.0)
        return (flops / train if train else 0.0), flops
    if isinstance(stage, PretrainStage):
        tokens = float((stage.steps or 0) * stage.tokens_per_step)
        return tokens, tokens * train
    if kind == "rl":
        s: Any = stage
        tokens = s.steps * s.problems_per_step * (PROMPT_TOKENS + s.group_size * s.decoding.max_new_tokens / 2)
        return tokens, tokens * (train + forward)
    if isinstance(stage, TrainBase):
        tokens = float((stage.steps or 0) * getattr(stage, "examples_per_step", 1) * ANSWER_TOKENS)
        return tokens, tokens * train
    if isinstance(stage, PruneStage):  # both models read the text that is held out
        tokens = float((stage.examples + 2 * stage.held_out) * ANSWER_TOKENS)
        return tokens, tokens * forward
    if kind == "capture":
        return float(CAPTURED * ANSWER_TOKENS), CAPTURED * ANSWER_TOKENS * forward
    if kind in ("eval", "ask", "reject"):
        s = stage
        entries = len(s.mix) if kind == "eval" else 1
        tokens = float(entries * s.problems * s.samples * ANSWER_TOKENS)
        return tokens, tokens * forward
    return 0.0, 0.0


def _teachers(stage: Stage, tokens: float, shapes: Mapping[str, ModelShape | None]) -> float:
    """FLOPs of teachers that read along, and of a student that writes what it learns from."""
    if stage.stage != "distill" or stage.match_flops or "teacher" not in stage.roles:
        return 0.0
    read = [shapes.get(stage.inputs[role]) for role in stage.teachers]
    if stage.way == "on_policy":
        read.append(shapes.get(stage.inputs["model"]))
    return sum(tokens * shape.flops_per_token(64, backward=False) for shape in read if shape is not None)


def _sum(stage: Stage, roles: tuple[str, ...], spent: Mapping[str, float]) -> float:
    return sum(spent.get(stage.inputs[role], 0.0) for role in roles)
