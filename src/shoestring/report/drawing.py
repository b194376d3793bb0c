"""The road as a picture: a box a stage, an arrow from parent to child, evaluations docked under what they evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shoestring.core.run import Run
from shoestring.report import words
from shoestring.report.results import read_result, why_missing
from shoestring.report.roles import Role, budget_of, first_seed, roles_of, sources_of
from shoestring.report.spec import ReportSpec
from shoestring.train.configs import Recipe, StageBase

WIDTH, HEIGHT, DOCK = 150, 44, 19  # a box, and an evaluation under it
GAP_X, GAP_Y = 28, 16
LETTERS = 22  # that fit into a box


@dataclass(slots=True)
class Box:
    """A stage on the grid."""

    stage: StageBase
    role: Role
    column: int
    lane: int = 0
    evals: list[StageBase] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0


def road_svg(recipe: Recipe, spec: ReportSpec, runs: Mapping[str, Run]) -> str:
    """The road of the first seed as one SVG element."""
    boxes = _laid_out(first_seed(recipe, spec), roles_of(recipe, spec))
    if not boxes:
        return ""
    width = max(box.x for box in boxes.values()) + WIDTH + 2
    height = max(box.y + HEIGHT + DOCK * len(box.evals) for box in boxes.values()) + 4
    arrows = [
        _arrow(boxes[source], box, solid=_is_parent(runs, source, box.stage.name))
        for box in boxes.values() for source in sources_of(box.stage) if source in boxes
    ]  # fmt: skip
    drawn = [_box(box, runs) for box in boxes.values()]
    return (
        f'<svg class="road" viewBox="0 0 {width:.0f} {height:.0f}" style="--w:{width:.0f}px" role="img" '
        'aria-label="The stages of the road and what each was made from">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 .8 7 4 0 7.2z"/></marker></defs>{"".join(arrows)}{"".join(drawn)}</svg>'
    )


def _laid_out(stages: Sequence[StageBase], roles: Mapping[str, Role]) -> dict[str, Box]:
    boxes: dict[str, Box] = {}
    for stage in stages:
        parents = [boxes[name] for name in sources_of(stage) if name in boxes]
        if stage.stage == "eval" and parents:  # type: ignore[attr-defined]
            parents[0].evals.append(stage)
        else:
            column = 1 + max((parent.column for parent in parents), default=-1)
            boxes[stage.name] = Box(stage, roles[stage.name], column)
    _take_lanes(boxes)
    lanes = range(1 + max((box.lane for box in boxes.values()), default=0))
    top = 2.0
    for lane in lanes:
        here = [box for box in boxes.values() if box.lane == lane]
        for box in here:
            box.x, box.y = 2 + box.column * (WIDTH + GAP_X), top
        top += HEIGHT + GAP_Y + DOCK * max((len(box.evals) for box in here), default=0)
    return boxes


def _take_lanes(boxes: Mapping[str, Box]) -> None:
    """Models under one another, each with its controls below; a box stays in its parent's lane where it can."""
    taken: set[tuple[int, int]] = set()
    placed: list[Box] = []
    for group in sorted({box.role.group for box in boxes.values()}):
        base = 1 + max((box.lane for box in placed), default=-1)
        mine = [box for box in boxes.values() if box.role.group == group]
        for box in sorted(mine, key=lambda b: b.role.control):
            parents = [boxes[name] for name in sources_of(box.stage) if name in boxes]
            near = [p for p in parents if p in placed and p.role.group == group]
            lane = max([base, *(p.lane for p in near[:1])])
            start = min((p.column for p in parents), default=box.column - 1)
            cells = range(start + 1, box.column + 1)
            while any((lane, column) in taken for column in cells):
                lane += 1
            box.lane = lane
            taken |= {(lane, column) for column in cells}
            placed.append(box)


def _is_parent(runs: Mapping[str, Run], source: str, child: str) -> bool:
    """Whether the child's manifest names the parent's digest."""
    if source not in runs or child not in runs:
        return False
    return runs[source].digest in {parent["digest"] for parent in runs[child].manifest["parents"].values()}


def _arrow(parent: Box, child: Box, *, solid: bool) -> str:
    x, y = parent.x + WIDTH, parent.y + HEIGHT / 2
    to_x, to_y = child.x - 2, child.y + HEIGHT / 2
    turn = min(x + GAP_X, to_x)  # lanes are changed in the gutter beside the parent
    bend = (turn - x) * 0.55
    path = f"M{x:.1f} {y:.1f}C{x + bend:.1f} {y:.1f} {turn - bend:.1f} {to_y:.1f} {turn:.1f} {to_y:.1f}H{to_x:.1f}"
    return f'<path class="arrow{"" if solid else " planned"}" d="{path}" marker-end="url(#tip)"/>'


def _box(box: Box, runs: Mapping[str, Run]) -> str:
    name, kind = box.stage.name, box.stage.stage  # type: ignore[attr-defined]
    state = why_missing(runs, name)
    budget = budget_of(box.stage)
    under = f"{kind} · {state or _seconds(runs[name])}"
    told = f"{name}: {under}" + (f"; as many training FLOPs as {', '.join(budget)}" if budget else "")
    parts = [
        f'<g class="box {box.role.css}{" open" if state else ""}" transform="translate({box.x:.0f} {box.y:.0f})">',
        f"<title>{words.text(told)}</title>",
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}" rx="5"/>',
        f'<rect class="front" width="{WIDTH}" height="{HEIGHT}" rx="5"/>',
        f'<rect class="edge" width="4" height="{HEIGHT - 12}" x="6" y="6" rx="2"/>',
        f'<text class="name{" long" if len(name) > 18 else ""}" x="17" y="18">{words.text(_short(name))}</text>',
        f'<text class="small" x="17" y="34">{words.text(_short(under + (" · = FLOPs" if budget else ""), 26))}</text>',
    ]
    for index, stage in enumerate(box.evals):
        parts.append(_dock(stage, HEIGHT + index * DOCK, runs))
    return "".join(parts) + "</g>"


def _dock(stage: StageBase, y: float, runs: Mapping[str, Run]) -> str:
    result = read_result(runs, stage.name)
    state = why_missing(runs, stage.name)
    if result is not None:
        told = f"{words.percent(result['overall']['pass@1'])} right · {_seconds(runs[stage.name])}"
    else:
        told = f"eval · {state or 'unreadable'}"
    return (
        f'<g class="dock r-eval" transform="translate(10 {y:.0f})"><title>{words.text(f"{stage.name}: {told}")}</title>'
        f'<path class="front" d="M0 0V{DOCK - 6}q0 4 4 4H{WIDTH - 24}q4 0 4-4V0z"/>'
        f'<text class="small" x="7" y="12.5">{words.text(told)}</text></g>'
    )


def _seconds(run: Run) -> str:
    return words.seconds((run.manifest["cost"] or {}).get("seconds"))


def _short(name: str, letters: int = LETTERS) -> str:
    return name if len(name) <= letters else name[: letters - 1] + "…"
