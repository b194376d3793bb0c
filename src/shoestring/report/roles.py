"""Whose a stage is: which model it belongs to, whether it is a control, and so its colour on every picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoestring.report.results import model_stage
from shoestring.report.spec import EvalEntry, ReportSpec
from shoestring.train.configs import Recipe, StageBase

FLOWS = ("model", "traces", "teacher", "tokenizer")  # input roles that hand something on, not only a budget


@dataclass(frozen=True, slots=True)
class Role:
    """`group`: index of the model ("of") it belongs to. `css`: r-a, r-b, r-c (models), r-control, r-data, r-eval."""

    group: int
    control: bool
    css: str


def groups_of(spec: ReportSpec) -> list[str]:
    """The models of the report ("teacher", "student"), in order of mention."""
    return list(dict.fromkeys(entry.of for entry in spec.evals))


def css_of(group: int, control: bool = False) -> str:
    """The colour class of a model of the report."""
    return "r-control" if control else f"r-{'abc'[min(group, 2)]}"


def roles_of(recipe: Recipe, spec: ReportSpec) -> dict[str, Role]:
    """The role of every stage. What is not evaluated itself belongs to whom it leads to."""
    groups, named = groups_of(spec), _named(recipe, spec)
    roles: dict[str, Role] = {}
    for stage in reversed(recipe.stages):
        children = [roles[s.name] for s in recipe.stages if s.name in roles and _flows(stage.name, s)]
        main = sorted(children, key=lambda role: (role.control, role.group))
        group = main[0].group if main else 0
        kind = stage.stage
        if stage.name in named:
            group, control = groups.index(named[stage.name].of), named[stage.name].control
            roles[stage.name] = Role(group, control, css_of(group, control))
        elif kind == "eval":
            roles[stage.name] = Role(group, False, "r-eval")
        elif kind == "tokenizer":
            roles[stage.name] = Role(0, False, "r-data")
        elif kind in ("ask", "reject"):
            roles[stage.name] = Role(group, not stage.headline, "r-data")
        else:
            control = not stage.headline
            roles[stage.name] = Role(group, control, css_of(group, control))
    return _with_teachers(recipe, roles)


def _named(recipe: Recipe, spec: ReportSpec) -> dict[str, EvalEntry]:
    named: dict[str, EvalEntry] = {}
    for entry in spec.evals:
        model = model_stage(entry, recipe)
        if model is not None:
            named.setdefault(model, entry)
    return named


def _flows(name: str, child: StageBase) -> bool:
    return child.stage != "eval" and any(child.inputs.get(role) == name for role in ("model", "tokenizer"))  # type: ignore[attr-defined]


def _with_teachers(recipe: Recipe, roles: Mapping[str, Role]) -> dict[str, Role]:
    """Asking and sampling stand with the model that is asked."""
    settled = dict(roles)
    for stage in recipe.stages:
        if stage.stage in ("ask", "reject"):
            asked = settled.get(stage.inputs.get("teacher") or stage.inputs.get("model") or "")
            if asked is not None:
                settled[stage.name] = Role(asked.group, settled[stage.name].control, "r-data")
    return settled


def budget_of(stage: StageBase) -> list[str]:
    """The stages whose FLOPs alone a control takes over: inputs that hand nothing else on."""
    matched = set(getattr(stage, "match_flops", ())) - set(FLOWS)
    return [value for role, value in stage.inputs.items() if role in matched]


def sources_of(stage: StageBase) -> list[str]:
    """The inputs that hand weights, traces or a tokenizer on."""
    budget = budget_of(stage)
    return [value for value in stage.inputs.values() if value not in budget]


def first_seed(recipe: Recipe, spec: ReportSpec) -> list[StageBase]:
    """The stages of the first seed and those that belong to no seed: the road that is drawn."""
    seeds = sorted({entry.seed for entry in spec.evals})
    if len(seeds) < 2:
        return list(recipe.stages)
    first = _upstream(recipe, [e.stage for e in spec.evals if e.seed == seeds[0]])
    others = _upstream(recipe, [e.stage for e in spec.evals if e.seed != seeds[0]])
    return [stage for stage in recipe.stages if stage.name in first or stage.name not in others]


def _upstream(recipe: Recipe, names: list[str]) -> set[str]:
    found = set(names)
    for stage in reversed(recipe.stages):
        if stage.name in found:
            found |= set(stage.inputs.values())
    return found
