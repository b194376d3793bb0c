"""Stages and teachers as the command line asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shoestring.core.errors import UserError, did_you_mean
from shoestring.cost.chips import Cluster, find_chip, parse_cluster
from shoestring.cost.models import resolve_shape
from shoestring.cost.plan import price_of
from shoestring.cost.prices import ask_usd, find_price, self_host_usd
from shoestring.cost.shape import ModelShape
from shoestring.cost.show_plan import span
from shoestring.cost.stages import (
    StageCost,
    context_extension,
    evaluation,
    generation,
    logit_distillation,
    on_policy_distillation,
    reinforcement,
    sft,
)
from shoestring.cost.units import parse_count, usd

BY_PARAMETERS = ("sft", "distill", "logits")  # priced without knowing a layer's sizes
KINDS = (*BY_PARAMETERS, "on-policy", "rl", "generate", "eval", "extend")


def stage(
    kind: str, model: str, on: str, *, tokens: str = "", samples: str = "", length: int = 4000, teacher: str = "",
    epochs: float = 1.0, acceptance: float = 1.0, usd_per_hour: float | None = None,
    counted: Callable[[str], ModelShape] = resolve_shape,
) -> dict[str, Any]:  # fmt: skip
    """Hours and dollars of one stage. `counted`: reads models of the stages priced by parameters alone.

    Raises UserError for an unknown kind or a number that is missing.
    """
    if kind not in KINDS:
        raise UserError(f'unknown stage "{kind}".{did_you_mean(kind, KINDS)}')
    cluster = parse_cluster(on)
    read = counted if kind in BY_PARAMETERS else resolve_shape
    shape, teachers = read(model), read(teacher) if teacher else None
    cost = _cost(kind, shape, cluster, tokens, samples, length, teachers, epochs, acceptance)
    rent, guesses = price_of(cluster.chip, usd_per_hour)
    notes = (part.note for part in (shape, teachers) if part is not None and part.note)
    assumed = [*notes, *cost.assumed, *guesses]
    hours = cost.hours
    dollars = {k: getattr(hours, k) * getattr(rent, k) for k in ("low", "mid", "high")}
    return {"stage": cost.name, "model": model, "chip": cluster.chip.name, "gpu_hours": hours.to_dict(), "usd": dollars,
            "days": hours.scaled(1 / cluster.n / 24).to_dict(), "assumed": assumed}  # fmt: skip


def _cost(
    kind: str, shape: ModelShape, cluster: Cluster, tokens: str, samples: str, length: int, teacher: ModelShape | None,
    epochs: float, acceptance: float,
) -> StageCost:  # fmt: skip
    chip = cluster.chip
    if kind == "extend":
        return context_extension(shape, cluster)
    if kind in ("rl", "generate", "eval"):
        if not samples:
            raise UserError(f"stage {kind} needs --samples, like 5M.")
        count = parse_count(samples, "samples")
        if kind == "rl":
            return reinforcement(shape, chip, count, length)
        if kind == "eval":
            return evaluation(shape, cluster, count, length)
        return generation(shape, chip, count, length, acceptance=acceptance)
    if not tokens:
        raise UserError(f"stage {kind} needs --tokens, like 4.3B.")
    read = parse_count(tokens, "tokens")
    if kind in ("sft", "distill"):
        return sft(shape, chip, read, epochs=epochs, seq_len=length)
    if teacher is None:
        raise UserError(f"stage {kind} needs --teacher, a model's name.")
    if kind == "logits":
        return logit_distillation(shape, teacher, chip, read, epochs=epochs)
    return on_policy_distillation(shape, teacher, chip, read, context=length)


def stage_text(answer: dict[str, Any]) -> str:
    """One stage as lines."""
    from shoestring.cost.residual import Interval

    hours, dollars = Interval(**answer["gpu_hours"]), Interval(**answer["usd"])
    head = f"{answer['stage']}, {answer['model']} on {answer['chip']}"
    out = [head, f"chip-hours  {span(hours)}", f"dollars     {span(dollars, money=True)}"]
    return "\n".join(out + [f"assumed     {a}" for a in answer["assumed"]])


def ask(
    teacher: str, questions: str, tokens_in: int, tokens_out: int, *, acceptance: float = 1.0, cached: float = 0.0
) -> dict[str, Any]:
    """Dollars of asking a teacher over its API, and of answering on 8 H800 of one's own."""
    count = parse_count(questions, "questions")
    price = find_price(teacher)
    api = ask_usd(price, count, tokens_in, tokens_out, acceptance=acceptance, cached_share=cached)
    own = self_host_usd(count / acceptance, tokens_in, tokens_out, node_usd=8 * (find_chip("H800").rent_mid or 2.0))
    terms = {"yes": "forbid building competing models"}.get(price.forbids_competing, "not recorded (no permission)")
    return {"teacher": price.label, "questions": count, "api_usd": api, "self_host_usd": own, "terms": terms,
            "source": price.source}  # fmt: skip


def ask_text(answer: dict[str, Any]) -> str:
    """The comparison as lines."""
    return (f"{answer['teacher']}: {usd(answer['api_usd'])} by API; a model of V3's size on one's own H800 nodes: "
            f"{usd(answer['self_host_usd'])}\nterms: {answer['terms']}; price from {answer['source']}")  # fmt: skip
