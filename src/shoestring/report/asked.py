"""The page of a traces store: what it cost, how fast it came, how long the answers are, what went wrong, some answers.

Made from sums that the database computes, so a million answers take seconds and no memory.
"""

# ruff: noqa: E501 (markup)
from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from shoestring.core.atomic import write_text
from shoestring.core.nouns import Trace
from shoestring.data.schema import PICO
from shoestring.data.store import Store
from shoestring.data.traces import stored
from shoestring.report.sieve import page_of, sample

Bars = Sequence[tuple[str, float]]
WIDTH, HEIGHT, ROW = 640, 150, 24
COLUMNS = 40  # bins of a histogram
SHOWN = 8


def write_asked(store: Store, path: Path) -> Path:
    """Write the page of `store` to `path`, atomically."""
    purse, counts = store.read_purse(), store.counts()
    tiles = [
        (f"{purse.answers:,}", "answers"), (f"${purse.spent / PICO:,.4f}", "spent"),
        (f"${purse.doubt / PICO:,.4f}", f"in doubt at most ({purse.doubts:,} requests)"),
        (f"{counts['planned'] + counts['sent']:,}", "not asked yet"), (f"{counts['failed']:,}", "failed"),
    ]  # fmt: skip
    shown = "".join(f'<div class="tile"><b>{number}</b><span>{escape(told)}</span></div>' for number, told in tiles)
    teachers = _query(store, "SELECT json_extract(h.fields, '$.teacher'), count(*) FROM answers a "
                      "JOIN rows r ON r.id = a.row JOIN hows h ON h.id = r.how GROUP BY 1 ORDER BY 2 DESC LIMIT 20")  # fmt: skip
    finishes = _query(store, "SELECT finish, count(*) FROM answers GROUP BY 1 ORDER BY 2 DESC")
    troubles = [(f"{kind} (last: {words[:80]})", float(count)) for kind, (count, words) in store.troubles().items()]
    body = [
        f'<header><p class="kicker">shoestring · ask</p><h1>{escape(store.file.parent.name)}</h1></header>'
        f'<div class="tiles">{shown}</div>',
        _section("Answers over time", columns(_over_time(store)), "Each column is an equal part of the time."),
        _section("Tokens of an answer", columns(_histogram(store, "tokens_out")), "Reasoning included."),
        _section(
            "Dollars of an answer", columns(_histogram(store, "pico", 1 / PICO)), "By the price list it was asked with."
        ),
        _section("How answers ended", bars(finishes)),
        _section("Who answered", bars(teachers)),
        _section("Errors on the way", bars(troubles), "Every attempt counts; most were made again."),
        _section("The last answers", "".join(sample(trace) for _, trace in _last(store))),
    ]
    return write_text(path, page_of(f"{store.file.parent.name}: asked", "".join(body)))


def columns(found: Bars) -> str:
    """A histogram as SVG: (label, height) from left to right."""
    if not found:
        return ""
    most = max(value for _, value in found) or 1
    wide = WIDTH / len(found)
    parts = [
        f'<rect x="{i * wide:.1f}" y="{HEIGHT * (1 - value / most):.1f}" width="{max(1, wide - 1):.1f}" '
        f'height="{HEIGHT * value / most:.1f}" fill="currentColor" opacity="0.45"><title>{escape(label)}: {value:,.0f}'
        "</title></rect>"
        for i, (label, value) in enumerate(found)
    ]
    ends = (
        f'<text x="0" y="{HEIGHT + 16}" font-size="12" fill="currentColor">{escape(found[0][0])}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 16}" font-size="12" text-anchor="end" fill="currentColor">{escape(found[-1][0])}</text>'
        f'<text x="{WIDTH}" y="11" font-size="12" text-anchor="end" fill="currentColor">at most {most:,.0f}</text>'
    )
    return _svg(HEIGHT + 22, "".join(parts) + ends)


def bars(found: Bars) -> str:
    """Named bars as SVG, one below the other."""
    most = max((value for _, value in found), default=1) or 1
    parts = [
        f'<rect x="0" y="{i * ROW + 2}" width="{max(2.0, 150 * value / most):.1f}" height="{ROW - 6}" fill="currentColor" '
        f'opacity="0.35"/><text x="160" y="{i * ROW + 16}" font-size="13" fill="currentColor">{value:,.0f} {escape(label)}</text>'
        for i, (label, value) in enumerate(found)
    ]
    return _svg(ROW * len(found), "".join(parts)) if parts else ""


def _svg(height: float, inner: str) -> str:
    return f'<div class="scroll"><svg role="img" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">{inner}</svg></div>'


def _section(title: str, body: str, caption: str = "") -> str:
    under = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return f"<section><h2>{escape(title)}</h2>{under}{body}</section>" if body else ""


def _query(store: Store, statement: str) -> list[tuple[str, float]]:
    return [(str(label), float(value)) for label, value in store.base.execute(statement)]


def _histogram(store: Store, column: str, scale: float = 1.0) -> list[tuple[str, float]]:
    least, most = store.base.execute(f"SELECT min({column}), max({column}) FROM answers").fetchone()
    if least is None or most == 0:
        return []
    width = max(1, -(-(most - least + 1) // COLUMNS))
    counts = dict(store.base.execute(f"SELECT ({column} - ?) / ?, count(*) FROM answers GROUP BY 1", (least, width)))
    places = range(int((most - least) // width) + 1)
    return [(f"{(least + i * width) * scale:,.6g}", float(counts.get(i, 0))) for i in places]


def _over_time(store: Store) -> list[tuple[str, float]]:
    first, last = store.base.execute(
        "SELECT min(CAST(strftime('%s', date) AS INTEGER)), max(CAST(strftime('%s', date) AS INTEGER)) FROM answers"
    ).fetchone()
    if first is None:
        return []
    width = max(1, -(-(last - first + 1) // COLUMNS))
    rows = store.base.execute(
        "SELECT (CAST(strftime('%s', date) AS INTEGER) - ?) / ?, count(*) FROM answers GROUP BY 1", (first, width)
    )
    counts = dict(rows.fetchall())
    return [(f"{i * width:,} s", float(counts.get(i, 0))) for i in range((last - first) // width + 1)]


def _last(store: Store) -> list[tuple[int, Trace]]:
    (top,) = store.base.execute("SELECT coalesce(max(row), 0) FROM answers").fetchone()
    return list(stored(store.base, after=max(0, int(top) - SHOWN)))
