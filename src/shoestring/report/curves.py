"""Training curves as small multiples: one panel a measurement, one line a stage, controls beside what they control."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shoestring.core.run import Run
from shoestring.report import words
from shoestring.report.roles import roles_of
from shoestring.report.spec import ReportSpec
from shoestring.train.configs import Recipe

WIDTH, HEIGHT = 320, 168
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 20
Scale = Callable[[float], float]
POINTS = 160  # a line is averaged down to this many
KINDS = {
    "pretrain": "Pretraining", "sft": "Supervised fine-tuning and distillation",
    "distill": "Supervised fine-tuning and distillation", "rl": "Reinforcement learning",
}  # fmt: skip
PANELS: dict[str, tuple[tuple[str, str], ...]] = {
    "Pretraining": (
        ("loss", "Next-token loss, nats, log scale"), ("mtp", "MTP module's loss, nats, log scale"),
        ("max_violation", "Expert load, max ÷ mean − 1"),
    ),
    "Supervised fine-tuning and distillation": (
        ("loss", "Next-token loss, nats, log scale"), ("max_violation", "Expert load, max ÷ mean − 1"),
    ),
    "Reinforcement learning": (
        ("reward", "Reward, weighted sum"), ("length", "Mean answer length, tokens"),
        ("mixed_groups", "Groups that carry signal, share"), ("entropy", "Entropy of the policy, nats"),
        ("ratio_error", "|Sampler − trainer| logprob, nats"), ("max_violation", "Expert load, max ÷ mean − 1"),
        ("truncated", "Answers cut off, share"), ("kl", "KL to the reference, nats"),
    ),
}  # fmt: skip
PASS_RATE = {"correct": "Pass rate in training"}


@dataclass(frozen=True, slots=True)
class Line:
    """One stage's curve: rows of metrics, its colour class and dash number."""

    label: str
    css: str
    dash: int
    rows: list[dict[str, object]]

    def points(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) where the metric is a finite number."""
        pairs = [(row["step"], row[metric]) for row in self.rows if metric in row]
        return [(float(x), float(y)) for x, y in pairs if isinstance(x, int | float) and isinstance(y, int | float)]

    def broken(self, metric: str) -> str:
        """Where the metric is no number (NaN, infinity: `core/metrics.py` writes them as words), said; or nothing."""
        there = [row for row in self.rows if metric in row]
        odd = [row["step"] for row in there if not isinstance(row[metric], int | float)]
        return f"{self.label}: no number at {len(odd)} of {len(there)} steps, first at {odd[0]}" if odd else ""


def curves_html(recipe: Recipe, spec: ReportSpec, runs: Mapping[str, Run]) -> str:
    """Every group of panels, each with its legend."""
    parts = []
    for title, lines in _lines(recipe, spec, runs).items():
        panels = [_panel(metric, name, lines) for metric, name in _metrics(title, lines)]
        if title == "Reinforcement learning":
            panels += [_histogram(label, runs[name]) for name, label in _asked_before(recipe, spec, runs)]
        if any(panels):
            parts.append(f'<h3>{title}</h3>{_legend(lines)}<div class="panels">{"".join(panels)}</div>')
    return "".join(parts)


def _named(spec: ReportSpec, recipe: Recipe) -> dict[str, str]:
    """Stage -> label of every curve; without any, the headline training stages under their names."""
    if spec.curves:
        return {stage: label for label, stage in spec.curves.items()}
    return {stage.name: stage.name for stage in recipe.stages if stage.headline and stage.stage in KINDS}


def _asked_before(recipe: Recipe, spec: ReportSpec, runs: Mapping[str, Run]) -> list[tuple[str, str]]:
    """(stage, label) of the RL curves that are no controls."""
    roles = roles_of(recipe, spec)
    return [(name, label) for name, label in _named(spec, recipe).items() if name in runs and not roles[name].control]


def _lines(recipe: Recipe, spec: ReportSpec, runs: Mapping[str, Run]) -> dict[str, list[Line]]:
    roles, kinds = roles_of(recipe, spec), {stage.name: stage.stage for stage in recipe.stages}
    groups: dict[str, list[Line]] = {}
    for stage, label in _named(spec, recipe).items():
        rows = runs[stage].metrics() if stage in runs else []
        if rows and kinds[stage] in KINDS:
            lines = groups.setdefault(KINDS[kinds[stage]], [])
            dash = sum(line.css == roles[stage].css for line in lines)
            lines.append(Line(label, roles[stage].css, dash, rows))
    return {title: groups[title] for title in PANELS if title in groups}


def _metrics(title: str, lines: Sequence[Line]) -> list[tuple[str, str]]:
    """The panels of a group that have something to show; rewards by name first, their sum only if it is another."""
    known = {key for line in lines for row in line.rows for key in row}
    rewards = sorted(key for key in known if key.startswith("reward/"))
    named = [(key, PASS_RATE.get(key[7:], f"Reward: {key[7:]}")) for key in rewards]
    rest = [(key, name) for key, name in PANELS[title] if key in known and not (key == "reward" and len(rewards) == 1)]
    shown = [*named, *rest]
    least = {"truncated": 0.01}  # below that there is nothing to see
    return [
        (key, name) for key, name in shown
        if any(line.broken(key) or any(abs(y) > least.get(key, 0.0) for _, y in line.points(key)) for line in lines)
    ]  # fmt: skip


def _legend(lines: Sequence[Line]) -> str:
    items = [
        f'<li class="{line.css} d{line.dash}"><svg viewBox="0 0 26 8" aria-hidden="true">'
        f'<path class="line" d="M1 4H25"/></svg>{words.text(line.label)}</li>'
        for line in lines
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


# ---- one panel ----------------------------------------------------------------------------------------------------


def _panel(metric: str, title: str, lines: Sequence[Line]) -> str:
    found = [(line, points) for line in lines if (points := line.points(metric))]
    told = "".join(f'<p class="missing">{words.text(said)}</p>' for line in lines if (said := line.broken(metric)))
    if not found:
        return f'<figure class="panel"><figcaption>{words.text(title)}</figcaption>{told}</figure>' if told else ""
    smooth = [(line, points, smoothed(points)) for line, points in found]
    ys = [y for _, points, soft in smooth for _, y in (*soft, *_middle(points))]
    log = "log scale" in title and min(ys) > 0
    ticks = log_ticks(min(ys), max(ys)) if log else nice_ticks(min(ys), max(ys))
    last = max(points[-1][0] for _, points in found)
    to_x, to_y = _scales(last, ticks, log=log)
    drawn = []
    for line, points, soft in smooth:
        faint = _path([(x, min(max(y, ticks[0]), ticks[-1])) for x, y in averaged(points, POINTS)], to_x, to_y)
        drawn.append(f'<path class="faint {line.css}" d="{faint}"/>')
        drawn.append(f'<path class="line {line.css} d{line.dash}" d="{_path(averaged(soft, POINTS), to_x, to_y)}"/>')
    ends = _ends(found[0][1])
    return (
        f'<figure class="panel"><figcaption>{words.text(title)}<span class="ends {found[0][0].css}">{ends}</span>'
        "</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words.text(f"{title}: {ends}")}">'
        f"{_axes(ticks, last, to_x, to_y)}{''.join(drawn)}</svg>{told}</figure>"
    )


def _ends(points: Sequence[tuple[float, float]]) -> str:
    """Where a line begins (its first step) and ends (the mean of its last twentieth)."""
    values = [y for _, y in points]
    return f"{_short(values[0])} → {_short(statistics.fmean(values[-(len(values) // 20 + 1) :]))}"


def _middle(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points without the outermost 2 % of values, so that one spike does not flatten a panel."""
    ordered = sorted(points, key=lambda point: point[1])
    cut = len(ordered) // 50
    return ordered[cut : len(ordered) - cut]


def _scales(last: float, ticks: Sequence[float], *, log: bool) -> tuple[Scale, Scale]:
    low, high = (math.log(ticks[0]), math.log(ticks[-1])) if log else (ticks[0], ticks[-1])
    across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def to_x(x: float) -> float:
        return LEFT + across * (x / last if last else 0.0)

    def to_y(y: float) -> float:
        return TOP + up * (1 - ((math.log(y) if log else y) - low) / (high - low))

    return to_x, to_y


def _axes(ticks: Sequence[float], last: float, to_x: Scale, to_y: Scale) -> str:
    grid = "".join(
        f'<path class="grid" d="M{LEFT} {to_y(t):.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{to_y(t) + 3.5:.1f}" text-anchor="end">{_short(t)}</text>'
        for t in ticks
    )
    under = f'<text class="tick" x="{LEFT}" y="{HEIGHT - 5}">0</text>' + (
        f'<text class="tick" x="{to_x(last):.1f}" y="{HEIGHT - 5}" text-anchor="end">{last:,.0f} steps</text>'
    )
    return grid + under


def _path(points: Sequence[tuple[float, float]], to_x: Scale, to_y: Scale) -> str:
    return "M" + "L".join(f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in points)


def _short(value: float) -> str:
    shown = f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}".replace("e-0", "e-")
    return shown.replace("-", "−") if shown.startswith("-") else shown


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred running mean over about a fifteenth of the curve, narrower at its steep beginning."""
    sums, reach = [0.0], len(points) // 30
    for _, y in points:
        sums.append(sums[-1] + y)
    out = []
    for i, (x, _) in enumerate(points):
        half = min(reach, i)
        first, end = i - half, min(len(points), i + half + 1)
        out.append((x, (sums[end] - sums[first]) / (end - first)))
    return out


def averaged(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most `limit` points: means of neighbours, between the first point and the last as they are."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit - 2))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
    return [points[0], *means, points[-1]]


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers that enclose [low, high], about `wanted` of them."""
    if high - low < 1e-12 * max(1.0, abs(high)) or high == low:
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... times a power of ten, enclosing [low, high] > 0."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [float(f"{m}e{power}") for power in powers for m in (1, 2, 5)]
    below, above = max(s for s in steps if s <= low * 1.000001), min(s for s in steps if s >= high * 0.999999)
    return [s for s in steps if below <= s <= max(above, below * 2)]


# ---- the pre-flight check -----------------------------------------------------------------------------------------


def _histogram(label: str, run: Run) -> str:
    """How often 0, 1, ..., k of k samples were right before RL began: only what lies between can be learnt from."""
    facts = run.manifest["facts"].get("preflight")
    if not facts:
        return ""
    counts, k = facts["solved_histogram"], facts["samples"]
    pitch, tallest = (WIDTH - LEFT - RIGHT) / len(counts), max([*counts, 1])
    up = HEIGHT - TOP - BOTTOM
    bars = "".join(
        f'<rect class="{"bar" if 0 < i < k else "bar idle"}" x="{LEFT + i * pitch + 1:.1f}" width="{pitch - 2:.1f}" '
        f'y="{TOP + up * (1 - c / tallest):.1f}" height="{up * c / tallest:.1f}" rx="1.5"/>'
        for i, c in enumerate(counts)
    )
    told = f"Problems before “{words.text(label)}”"
    return (
        f'<figure class="panel r-a"><figcaption>{told}<span class="ends">{words.percent(facts["pass@1"], 0)} right'
        f'</span></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{told}">'
        f'<path class="grid" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>{bars}'
        f'<text class="tick" x="{LEFT - 6}" y="{TOP + 8}" text-anchor="end">{tallest}</text>'
        f'<text class="tick" x="{LEFT - 6}" y="{HEIGHT - BOTTOM + 3.5}" text-anchor="end">0</text>'
        f'<text class="tick" x="{LEFT + 2}" y="{HEIGHT - 5}">none right</text>'
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">all {k} samples right</text>'
        "</svg></figure>"
    )
