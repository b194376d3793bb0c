"""What `Recipe.report` may say: which evaluation belongs to whom, what is claimed, which samples and curves to show.

The schema in words is in the docstring of `report/tables.py`. A mistake in it is a `UserError` of one sentence; call
`read_spec` before a long road to hear of it at once.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from shoestring.core.config import Config
from shoestring.core.errors import UserError, did_you_mean
from shoestring.train.configs import EvalStage, Recipe

PLACEHOLDER = re.compile(r"\{([^{}/]+)/([^{}:]+)(?::(pass@1|mean_tokens))?\}")  # {teacher/after RL:mean_tokens}
Metric = Literal["pass@1", "mean_tokens"]


class EvalEntry(Config):
    """One evaluation: of whom, under which name in the table. Entries that differ only in `seed` are one row."""

    label: str
    of: str
    stage: str  # the eval stage
    model: str | None = None  # the stage that trained what was evaluated; None: the eval stage's input "model"
    control: bool = False
    seed: int = 0


class Arm(Config):
    """One point of the frontier: a way of learning at one budget. Entries that differ only in `seed` are one point."""

    way: str
    budget: int  # orders the points of a way, e.g. updates
    stage: str  # the eval stage
    model: str  # the stage that learnt
    seed: int = 0


class Point(Config):
    """A row of the result table."""

    of: str
    label: str


class Claim(Config):
    """A sentence and the numbers that decide it: a difference, a difference of differences, or a ratio."""

    text: str
    metric: Metric = "pass@1"
    task: str | None = None  # one family; None: all problems
    minuend: Point | None = None
    subtrahend: Point | None = None
    difference_of: tuple[Point, Point] | None = None
    minus: tuple[Point, Point] | None = None
    ratio_of: Point | None = None
    to: Point | None = None
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Claim:
        forms = ((self.minuend, self.subtrahend), (self.difference_of, self.minus), (self.ratio_of, self.to))
        if [bool(a) + bool(b) for a, b in forms if a or b] != [2]:
            raise UserError(
                f'claim "{self.text}": give minuend and subtrahend, difference_of and minus, or ratio_of and to.'
            )
        if (self.at_least is None) == (self.at_most is None):
            raise UserError(f'claim "{self.text}": give either at_least or at_most.')
        return self

    @property
    def kind(self) -> Literal["difference", "ratio"]:
        return "ratio" if self.ratio_of else "difference"

    @property
    def points(self) -> tuple[tuple[Point, int], ...]:
        """Every point with its sign; a ratio is (over, under)."""
        if self.ratio_of and self.to:
            return (self.ratio_of, 1), (self.to, -1)
        if self.minuend and self.subtrahend:
            return (self.minuend, 1), (self.subtrahend, -1)
        assert self.difference_of and self.minus
        (a, b), (c, d) = self.difference_of, self.minus
        return (a, 1), (b, -1), (c, -1), (d, 1)


class SamplePairs(Config):
    """Eval stages whose answers are set side by side: before | after, teacher | student."""

    before: str | None = None
    after: str | None = None
    teacher: str | None = None
    student: str | None = None


class ReportSpec(Config):
    """`Recipe.report`, validated."""

    title: str = ""
    finding: str = ""  # one sentence; "{teacher/after RL}" becomes that row's pass@1, ":mean_tokens" its length
    note: str = ""
    evals: tuple[EvalEntry, ...] = ()
    claims: tuple[Claim, ...] = ()
    samples: SamplePairs = SamplePairs()
    curves: dict[str, str] = Field(default_factory=dict)
    frontier: tuple[Arm, ...] = ()  # accuracy against what it cost
    given: tuple[str, ...] = ()  # stages that every arm starts from: their cost is not the arm's
    command: str = ""  # how to run it again; "": what was typed


def read_spec(recipe: Recipe) -> ReportSpec:
    """The recipe's report, validated against its stages. Raises UserError for a name that does not exist."""
    spec = ReportSpec.from_dict(recipe.report, where=f'report of recipe "{recipe.name}"')
    stages = {stage.name: stage for stage in recipe.stages}
    evals = {name for name, stage in stages.items() if isinstance(stage, EvalStage)}
    for entry in spec.evals:
        _known(entry.stage, evals, f'evals, "{entry.label}" of {entry.of}: stage')
        if entry.model is not None:
            _known(entry.model, set(stages), f'evals, "{entry.label}" of {entry.of}: model')
    for arm in spec.frontier:
        _known(arm.stage, evals, f'frontier, "{arm.way}": stage')
        _known(arm.model, set(stages), f'frontier, "{arm.way}": model')
    for name in spec.given:
        _known(name, set(stages), "given")
    for name in spec.samples.to_dict().values():
        if name is not None:
            _known(name, evals, "samples")
    for label, name in spec.curves.items():
        _known(name, set(stages), f'curves, "{label}"')
    rows = {f"{entry.of}/{entry.label}" for entry in spec.evals}
    for claim in spec.claims:
        for point, _ in claim.points:
            _known(f"{point.of}/{point.label}", rows, f'claim "{claim.text}"')
    for of, label, _ in PLACEHOLDER.findall(spec.finding):
        _known(f"{of}/{label}", rows, "finding")
    return spec


def _known(name: str, names: set[str], where: str) -> None:
    if name not in names:
        raise UserError(f'report, {where}: there is no "{name}".{did_you_mean(name, sorted(names))}')
