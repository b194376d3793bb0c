"""The data card of a set of traces: Markdown with plots beside it, for people and for a hub's page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import floor, log2
from pathlib import Path
from typing import Any

from shoestring.core.atomic import write_text
from shoestring.core.nouns import Trace

PLOTS = {"tokens": "Tokens of an answer, thinking included", "dollars": "Dollars of an answer", "days": "Answers a day"}
WIDTH, HEIGHT, LOWER, MOST = 640, 160, 36, 80  # of a plot; room for its labels; bars at most


def write_card(
    traces: Iterable[Trace], path: Path, *, funnel: Sequence[dict[str, Any]] = (), title: str = "Traces"
) -> Path:
    """A Markdown card of a set: whose answers, under which terms, how they were asked for, what was dropped and why.

    Its plots (tokens and dollars of an answer, answers a day, the funnel) are SVG files beside it, named after it.
    """
    teachers, licences, terms, reported = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    decodings, finishes, tasks, verdicts = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    spans: dict[str, Counter[Any]] = {name: Counter() for name in PLOTS}
    usd, tokens, dates = 0.0, [0, 0], ["9999", "0000"]
    count = 0
    for trace in traces:
        count += 1
        teachers[trace.teacher] += 1
        reported[trace.teacher_reported] += 1
        licences[trace.licence] += 1
        source = trace.source
        terms[" ".join(str(source[k]) for k in ("terms", "permission") if source.get(k)) or "not recorded"] += 1
        decodings[json.dumps({k: v for k, v in trace.decoding.items() if k != "sample"}, sort_keys=True)] += 1
        finishes[trace.finish_reason] += 1
        tasks[trace.task or "none"] += 1
        verdicts[{True: "right", False: "wrong", None: "not graded"}[trace.correct]] += 1
        spans["tokens"][_step(trace.usage.get("completion_tokens", 0))] += 1
        spans["dollars"][_step(trace.cost_usd)] += 1
        spans["days"][trace.date[:10]] += 1
        usd += trace.cost_usd
        tokens = [tokens[0] + trace.usage.get("prompt_tokens", 0), tokens[1] + trace.usage.get("completion_tokens", 0)]
        dates = [min(dates[0], trace.date), max(dates[1], trace.date)]
    lines = [f"# {title}", "", f"{count:,} traces, {tokens[0]:,} tokens in, {tokens[1]:,} out, ${usd:,.4f}."]
    if count:
        lines += [f"Answered from {dates[0][:10]} to {dates[1][:10]}.", ""]
    for head, counts in (
        ("Teacher", teachers), ("Model that answered", reported), ("Licence of the answers", licences),
        ("Terms on record", terms), ("Decoding", decodings), ("Finish", finishes), ("Task", tasks),
        ("Verdict", verdicts),
    ):  # fmt: skip
        lines += [f"## {head}", "", *(f"- {name}: {number:,}" for name, number in counts.most_common(20)), ""]
    lines += _plots(path, spans, funnel)
    if funnel:
        lines += ["## Dropped", "", "| filter | seen | kept | dropped because |", "|---|---|---|---|"]
        for step in funnel:
            why = ", ".join(f"{reason} {number:,}" for reason, number in step["dropped"].items()) or "-"
            lines.append(f"| {step['filter']} {step['options'] or ''} | {step['seen']:,} | {step['kept']:,} | {why} |")
    return write_text(path, "\n".join(lines) + "\n")


def _step(value: float) -> int | None:
    """Which half of a power of two `value` lies in; None for nothing at all."""
    return floor(2 * log2(value)) if value > 0 else None


def _plots(path: Path, spans: Mapping[str, Counter[Any]], funnel: Sequence[dict[str, Any]]) -> list[str]:
    """Write the plots beside `path`; the card's lines that show them. One bar alone says nothing: no plot."""
    found = []
    for name, title in PLOTS.items():
        counts = {key: count for key, count in spans[name].items() if key is not None}
        if name == "days":
            bars = [(day, counts[day]) for day in sorted(counts)]
        else:
            steps = range(min(counts, default=0), max(counts, default=-1) + 1)
            bars = [(f"{2 ** (step / 2):,.3g}", counts.get(step, 0)) for step in steps]
        found.append((name, title, bars))
    if funnel:
        left = [(step["filter"], step["kept"]) for step in funnel]
        found.append(("funnel", "Left after each filter", [("all", funnel[0]["seen"]), *left]))
    lines = []
    for name, title, bars in found:
        if len(bars) > 1:
            file = path.with_name(f"{path.stem}.{name}.svg")
            write_text(file, _svg(title, bars))
            lines += [f"![{title}]({file.name})", ""]
    return ["## Plots", "", *lines] if lines else []


def _svg(title: str, bars: Sequence[tuple[str, int]]) -> str:
    """Columns from left to right, the first, the last and the highest with their labels."""
    while len(bars) > MOST:  # two and two together
        bars = [(bars[i][0], sum(count for _, count in bars[i : i + 2])) for i in range(0, len(bars), 2)]
    most, wide = max(count for _, count in bars) or 1, WIDTH / len(bars)
    top = next(i for i, (_, count) in enumerate(bars) if count == max(c for _, c in bars))
    parts = []
    for i, (label, count) in enumerate(bars):
        x, high = i * wide, (HEIGHT - 20) * count / most
        parts.append(
            f'<rect x="{x:.1f}" y="{HEIGHT - high:.1f}" width="{max(1.0, wide - 2):.1f}" height="{high:.1f}" '
            f'fill="#4a7ab5"><title>{escape(label)}: {count:,}</title></rect>'
        )
        if len(bars) <= 12 or i in (0, len(bars) - 1):
            parts.append(f'<text x="{x + wide / 2:.1f}" y="{HEIGHT + 16}" {_TEXT}>{escape(label)}</text>')
        if i == top or len(bars) <= 12:
            parts.append(f'<text x="{x + wide / 2:.1f}" y="{HEIGHT - high - 4:.1f}" {_TEXT}>{count:,}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-20 0 {WIDTH + 40} {HEIGHT + LOWER}" width="{WIDTH}" '
        f'role="img"><title>{escape(title)}</title><rect x="-20" width="{WIDTH + 40}" height="{HEIGHT + LOWER}" '
        f'fill="white"/>{"".join(parts)}</svg>\n'
    )


_TEXT = 'text-anchor="middle" font-size="11" font-family="sans-serif" fill="#222"'
