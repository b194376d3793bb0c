"""The page of a curation: the funnel, beside each reason some of what it dropped, at the end some of what is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import islice
from pathlib import Path

from shoestring.core.atomic import write_text
from shoestring.core.nouns import Trace
from shoestring.curate._sieve import Step
from shoestring.report.page import style

LONGEST = 700  # characters of a sample
KEPT_SHOWN = 8


def write_sieve(path: Path, title: str, whole: int, steps: Sequence[Step], kept: Iterable[Trace]) -> Path:
    """Write the page to `path`, atomically."""
    left = whole - sum(step.dropped.total() for step in steps)
    body = [
        f'<header><p class="kicker">shoestring · curate</p><h1>{escape(title)}</h1>'
        f'<p class="finding">{left:,} of {whole:,} answers are kept.</p></header>',
        f"<section><h2>The funnel</h2>{_funnel(whole, steps)}</section>",
    ]
    for step in steps:
        for why, samples in step.samples.items():
            head = f"{step.name}: {why} ({step.dropped[why]:,})"
            body.append(f"<section><h2>{escape(head)}</h2>{''.join(sample(trace) for trace in samples)}</section>")
    shown = "".join(sample(trace) for trace in islice(kept, KEPT_SHOWN))
    body.append(f"<section><h2>Kept</h2>{shown or '<p>Nothing.</p>'}</section>")
    return write_text(path, page_of(f"{title}: curation", "".join(body)))


def page_of(title: str, body: str) -> str:
    """A self-contained page in the reports' style."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="generator" content="shoestring">'
        f"<title>{escape(title)}</title><style>{style()}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def _funnel(whole: int, steps: Sequence[Step]) -> str:
    """A bar for each filter: what it let through, of all."""
    width, height = 640, 26
    rows = [("answers", whole, ""), *((step.name, step.seen - step.dropped.total(), _why(step)) for step in steps)]
    parts = []
    for i, (name, count, why) in enumerate(rows):
        long = 0 if not whole else (width - 260) * count / whole
        y = i * height
        parts.append(
            f'<text x="0" y="{y + 17}" fill="currentColor" font-size="13">{escape(name)}</text>'
            f'<rect x="130" y="{y + 5}" width="{long:.1f}" height="16" fill="currentColor" opacity="0.35">'
            f"<title>{escape(why)}</title></rect>"
            f'<text x="{136 + long:.1f}" y="{y + 17}" fill="currentColor" font-size="13">{count:,}</text>'
        )
    return (
        f'<div class="scroll"><svg role="img" aria-label="funnel" viewBox="0 0 {width} {height * len(rows)}" '
        f'width="{width}">{"".join(parts)}</svg></div>'
    )


def _why(step: Step) -> str:
    return ", ".join(f"{why}: {count:,}" for why, count in step.dropped.items())


def sample(trace: Trace) -> str:
    """A question, and under it what was thought and answered."""
    question = str(trace.messages[-1].get("content")) if trace.messages else ""
    said = f"{trace.thinking}\n—\n{trace.answer}" if trace.thinking else trace.answer
    return (
        f"<details><summary>{escape(question[:120])}</summary><p><b>{escape(question[:LONGEST])}</b></p>"
        f"<pre>{escape(said[:LONGEST])}</pre></details>"
    )
