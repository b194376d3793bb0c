"""The drawings of the plan's page, as inline SVG: bars, points, a tree of dollars, a timetable. Text in, text out."""

# ruff: noqa: E501 (lines of markup)
from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log10

from shoestring.cost.timetable import Cell
from shoestring.cost.units import show

COLOURS = ("#2f6f8f", "#d08c3c", "#5b8c5a", "#a85751", "#7d6b9e", "#8a8a8a", "#4f9fa8", "#b5a642")
FORWARD, BACKWARD, INPUT, WEIGHT, BOTH = COLOURS[0], COLOURS[1], "#e3b982", COLOURS[2], COLOURS[4]


def svg(width: int, height: float, parts: Sequence[str], label: str) -> str:
    """A drawing with its words for those who cannot see it."""
    return f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _rect(x: float, y: float, width: float, height: float, colour: str, title: str = "") -> str:
    words = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" fill="{colour}">{words}</rect>'


def _text(x: float, y: float, words: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{words}</text>'


def bar(parts: Sequence[tuple[str, float]], limit: float, unit: str, label: str) -> str:
    """One stacked bar with its legend; `limit` is drawn as a line (0: none)."""
    whole = max(limit, sum(value for _, value in parts)) or 1.0
    x, marks, legend = 0.0, [], []
    for i, (name, value) in enumerate(parts):
        colour = COLOURS[i % len(COLOURS)]
        marks.append(_rect(x + 10, 8, 880 * value / whole, 34, colour, f"{name} {value:.3g} {unit}"))
        legend.append(f'<tspan fill="{colour}">&#9632;</tspan> {escape(name)} {value:.3g}&#160;{unit}&#160;&#160; ')
        x += 880 * value / whole
    if limit:
        edge = 10 + 880 * limit / whole
        marks.append(f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="2" y2="48" class="line" stroke-dasharray="4 3"/>')
    rows = [legend[i : i + 4] for i in range(0, len(legend), 4)]
    marks += [_text(10, 66 + 18 * i, "".join(row)) for i, row in enumerate(rows)]
    return svg(900, 62 + 18 * len(rows), marks, label)


def scatter(points: Sequence[tuple[float, float, str, bool]], x_name: str, y_name: str, *, join: bool = False) -> str:
    """Points on logarithmic axes; the last flag marks ours."""
    xs, ys = [log10(p[0]) for p in points], [log10(p[1]) for p in points]
    x0, x1, y0, y1 = min(xs) - 0.1, max(xs) + 0.1, min(ys) - 0.1, max(ys) + 0.1

    def at(x: float, y: float) -> tuple[float, float]:
        return 70 + 800 * (log10(x) - x0) / (x1 - x0), 270 - 240 * (log10(y) - y0) / (y1 - y0)

    out = ['<path d="M70 20V270H880" fill="none" class="line"/>']
    for i in range(5):
        xv, yv = 10 ** (x0 + (x1 - x0) * i / 4), 10 ** (y0 + (y1 - y0) * i / 4)
        out.append(_text(at(xv, 10**y0)[0], 288, show(xv, 2), "middle", 'class="dim"'))
        out.append(_text(64, at(10**x0, yv)[1] + 4, show(yv, 2), "end", 'class="dim"'))
    if join:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(p[0], p[1]) for p in points))
        out.append(f'<polyline points="{path}" fill="none" stroke="#999"/>')
    for x, y, name, ours in points:
        a, b = at(x, y)
        colour = COLOURS[1] if ours else COLOURS[0]
        out.append(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{7 if ours else 4}" fill="{colour}"><title>{escape(name)}</title></circle>'
        )
        if ours or join:
            out.append(_text(a + 9, b - 7, escape(name)))
    out += [_text(470, 306, x_name, "middle"), _text(12, 14, y_name)]
    return svg(900, 312, out, f"{y_name} against {x_name}")


def spans(rows: Sequence[tuple[str, float, float, str]], mid: float, mid_words: str, label: str) -> str:
    """Bars from low to high around one middle value; a row is (name, low, high, words)."""
    low, high = min(row[1] for row in rows), max(row[2] for row in rows)
    unit = 540 / ((high - low) or 1.0)
    out = []
    for i, (name, a, b, words) in enumerate(rows):
        out.append(_text(320, 26 + 34 * i, escape(name), "end"))
        out.append(_rect(330 + unit * (a - low), 10 + 34 * i, unit * (b - a), 22, COLOURS[0], words))
    x = 330 + unit * (mid - low)
    out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{10 + 34 * len(rows)}" class="line"/>')
    out.append(_text(x, 28 + 34 * len(rows), mid_words, "middle"))
    return svg(900, 36 + 34 * len(rows), out, label)


def tree(root: str, branches: Sequence[tuple[str, Sequence[tuple[str, float, str]]]], words: str) -> str:
    """A tree from left to right whose heights are amounts: the whole, its branches, their (leaf, amount, words)."""
    whole = sum(amount for _, leaves in branches for _, amount, _ in leaves) or 1.0
    height, gap, least = 300.0, 3.0, 15.0
    amounts = [[max(least, height * amount / whole) for _, amount, _ in leaves] for _, leaves in branches]
    full = sum(sum(group) + gap * len(group) for group in amounts)
    out = [_rect(0, 0, 190, full - gap, COLOURS[5], root), _text(10, 22, escape(root), extra='fill="#fff"'),
           _text(10, 42, escape(words), extra='fill="#fff"')]  # fmt: skip
    y = 0.0
    for i, ((branch, leaves), group) in enumerate(zip(branches, amounts, strict=True)):
        tall = sum(group) + gap * len(group)
        out += [_rect(194, y, 150, tall - gap, COLOURS[i]), _text(204, y + 14, escape(branch), extra='fill="#fff"')]
        for (leaf, _, amount), part in zip(leaves, group, strict=True):
            out += [
                _rect(348, y, 14, part, COLOURS[i]),
                _text(370, y + part / 2 + 4, f"{escape(leaf)}: {escape(amount)}"),
            ]
            y += part + gap
    return svg(900, full, out, f"{root}: {words}")


def timetable(cells: Sequence[Cell], ranks: int) -> str:
    """Ranks from top to bottom, time from left to right; what is left white is the bubble."""
    end = max(cell.end for cell in cells)
    out = []
    for cell in cells:
        kinds = [chunk.kind for chunk in cell.chunks]
        colour = BOTH if len(kinds) > 1 else {"F": FORWARD, "B": BACKWARD, "I": INPUT, "W": WEIGHT}[kinds[0]]
        x, wide = 40 + 850 * cell.start / end, 850 * (cell.end - cell.start) / end
        title = " and ".join(f"{c.kind}{c.micro}" for c in cell.chunks)
        out.append(_rect(x, 4 + 22 * cell.rank, max(wide - 0.8, 0.5), 19, colour, title))
    out += [_text(4, 18 + 22 * rank, f"{rank}", extra='class="dim"') for rank in range(ranks)]
    legend = [(FORWARD, "forward"), (BACKWARD, "backward"), (BOTH, "both at once"), (INPUT, "gradient of the input"),
              (WEIGHT, "gradient of the weights")]  # fmt: skip
    words = "".join(f'<tspan fill="{colour}">&#9632;</tspan> {name}&#160;&#160; ' for colour, name in legend)
    out.append(_text(40, 22 * ranks + 24, words))
    return svg(900, 22 * ranks + 32, out, f"timetable of {ranks} ranks")
