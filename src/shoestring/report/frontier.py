"""Accuracy against what it cost: a line for each way of learning, a point for each budget, whiskers over seeds.

An arm's cost is its own and that of the stages it alone needed: asking, stored logits, an arm it goes on from. What
every arm starts from (`ReportSpec.given`) is left out, and so is whose budget an arm was given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shoestring.core.run import Run
from shoestring.report import words
from shoestring.report.curves import log_ticks
from shoestring.report.results import over_seeds, read_result
from shoestring.report.spec import Arm, ReportSpec
from shoestring.train.configs import Recipe

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460.0, 330.0, 44.0, 118.0, 10.0, 30.0
TICKS = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
BEST = 0.9975  # the axis is one of errors, in logarithms: it has no place for none
LEAST = 1e-9  # dollars or tokens
APART = 11.0  # between two names at the end of lines


def frontier_table(recipe: Recipe, spec: ReportSpec, runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """A row a way and budget: pass@1 with its error over seeds, mean dollars and tokens; finished seeds only."""
    groups: dict[tuple[str, int], list[Arm]] = {}
    for arm in spec.frontier:
        groups.setdefault((arm.way, arm.budget), []).append(arm)
    table = []
    for (way, budget), arms in groups.items():
        found = [(result, cost) for arm in arms if (result := read_result(runs, arm.stage))
                 and (cost := spent(arm.model, recipe, spec.given, runs))]  # fmt: skip
        if not found:
            continue
        rights = [float(result["overall"]["pass@1"]) for result, _ in found]
        told = over_seeds(rights, found[0][0]["overall"].get("pass@1_stderr"))
        mean = {key: sum(cost[key] for _, cost in found) / len(found) for key in ("usd", "tokens")}
        table.append({
            "way": way, "updates": budget, "pass@1": told.value, "pass@1 stderr": told.stderr, **mean,
            "seeds": told.seeds,
        })  # fmt: skip
    return table


def spent(name: str, recipe: Recipe, given: Sequence[str], runs: Mapping[str, Run]) -> dict[str, float] | None:
    """Dollars and tokens of a stage and of what it alone needed, or None when one of them is not finished."""
    total = {"usd": 0.0, "tokens": 0.0}
    for stage in set(_needed(name, recipe, given)):
        if stage not in runs or not runs[stage].finished:
            return None
        cost = runs[stage].manifest["cost"] or {}
        for key in total:
            total[key] += float(cost.get(key) or 0.0)
    return total


def _needed(name: str, recipe: Recipe, given: Sequence[str]) -> Iterator[str]:
    stages = {stage.name: stage for stage in recipe.stages}
    if name not in stages or name in given:
        return
    yield name
    for role, source in stages[name].inputs.items():
        if role != "budget" and isinstance(source, str):
            yield from _needed(source, recipe, given)


# ---- the picture
def frontier_html(recipe: Recipe, spec: ReportSpec, runs: Mapping[str, Run]) -> str:
    """Two panels, or nothing when no arm is finished."""
    table = frontier_table(recipe, spec, runs)
    if not table:
        return ""
    panels = ((f"Right answers against {title}", frontier_svg(table, key)) for key, title in AXES.items())
    drawn = "".join(f'<figure class="panel"><figcaption>{t}</figcaption>{svg}</figure>' for t, svg in panels)
    return f'<div class="panels wide">{drawn}</div>'


AXES = {"usd": "dollars", "tokens": "tokens"}
COLOURS = ("2b6cb0", "c05621", "3d8f4c", "8a4fa3", "b08a1e", "1f9a9a", "d0507a", "6b7b8a", "8a6240", "777777")
INKS = "".join(f".line.w{i}{{stroke:#{c}}}.spot.w{i},text.w{i}{{fill:#{c}}}" for i, c in enumerate(COLOURS))
ALONE = (
    "svg{background:#fdfcf9}text{font:10px sans-serif;fill:#555}.grid{stroke:#e2dccf;fill:none}"
    ".line{fill:none;stroke-width:1.6}"
)


def frontier_svg(table: Sequence[Mapping[str, Any]], key: str, *, alone: bool = False) -> str:
    """Right answers (errors in logarithms, more is up) against "usd" or "tokens"; `alone`: a file of its own."""
    table = [{**row, key: max(row[key], LEAST)} for row in table]  # a machine may cost nothing
    low, high = min(row[key] for row in table), max(row[key] for row in table)
    across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    worst = max(t for t in TICKS if t <= min(row["pass@1"] for row in table))
    best = min([t for t in TICKS if t > max(row["pass@1"] for row in table)] or [BEST])

    def to_x(value: float) -> float:
        return LEFT + across * (math.log(value / low) / math.log(high / low) if high > low else 0.5)

    def to_y(right: float) -> float:
        height = math.log((1 - worst) / (1 - min(right, BEST)))
        return TOP + up * (1 - height / math.log((1 - worst) / (1 - best)))

    ways = list(dict.fromkeys(row["way"] for row in table))
    lines, names = [], []
    for place, way in enumerate(ways):
        points = sorted((row for row in table if row["way"] == way), key=lambda row: row["updates"])
        lines.append(_line(points, key, place, to_x, to_y))
        names.append((to_y(points[-1]["pass@1"]), place, way))
    shown = [t for t in TICKS if worst <= t <= best]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'aria-label="Right answers against {AXES[key]}"><style>{ALONE if alone else ""}{INKS}</style>'
        f"{_axes(shown, to_x, to_y, low, high, key)}{''.join(lines)}{_names(names)}</svg>"
    )


def _line(points: Sequence[Mapping[str, Any]], key: str, place: int, to_x: Any, to_y: Any) -> str:
    css = f"w{place % 10}"
    at = [(to_x(row[key]), to_y(row["pass@1"])) for row in points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
    marks = []
    for (x, y), row in zip(at, points, strict=True):
        error = row["pass@1 stderr"] or 0.0
        bottom, top = to_y(max(row["pass@1"] - error, 0.0)), to_y(min(row["pass@1"] + error, BEST))
        marks.append(f'<path class="line {css}" d="M{x:.1f} {bottom:.1f}V{top:.1f}"/>')
        told = f"{row['way']}, {row['updates']} updates: {100 * row['pass@1']:.1f} ± {100 * error:.1f} %"
        marks.append(
            f'<circle class="spot {css}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{words.text(told)}</title></circle>'
        )
    return f'<path class="line {css}" d="{path}"/>{"".join(marks)}'


def _names(names: Sequence[tuple[float, int, str]]) -> str:
    """At the right edge, each near the end of its line, none over another."""
    drawn: list[str] = []
    last = -APART
    spare = HEIGHT - BOTTOM - APART * len(names)
    for y, place, way in sorted(names):
        last = max(min(y, spare + APART * len(drawn)), last + APART)
        at = f'x="{WIDTH - RIGHT + 10:g}" y="{last + 3:.1f}"'
        drawn.append(f'<text class="tick w{place % 10}" {at}>{words.text(way)}</text>')
    return "".join(drawn)


def _axes(shown: Sequence[float], to_x: Any, to_y: Any, low: float, high: float, key: str) -> str:
    grid = "".join(
        f'<path class="grid" d="M{LEFT:g} {to_y(t):.1f}H{WIDTH - RIGHT:g}"/>'
        f'<text class="tick" x="{LEFT - 6:g}" y="{to_y(t) + 3.5:.1f}" text-anchor="end">{100 * t:g} %</text>'
        for t in shown
    )
    under = "".join(
        f'<text class="tick" x="{to_x(t):.1f}" y="{HEIGHT - 12:g}" text-anchor="middle">'
        f"{f'${t:.4g}' if key == 'usd' else words.tick(t)}</text>"
        for t in log_ticks(low, high) if low <= t <= high
    )  # fmt: skip
    return grid + under
