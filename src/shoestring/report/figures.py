"""Tables that are pictures too: results with a bar and an error whisker in every cell, the bill with its shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoestring.report import words
from shoestring.report.roles import Role, css_of
from shoestring.report.tables import TASK

Row = Mapping[str, Any]


# ---- results ------------------------------------------------------------------------------------------------------


def results_html(rows: Sequence[Row], groups: Sequence[str]) -> str:
    """A block a model, a line a label, a column a family, every accuracy with its bar."""
    if not rows:
        return ""
    columns = [key for key in rows[0] if key.startswith((TASK, "pass@", "cons@")) and not key.endswith("stderr")]
    heads = "".join(f'<th scope="col"{_key(c)}>{words.text(_title(c))}</th>' for c in columns)
    bodies = []
    for group, name in enumerate(groups):
        mine = [_result_row(row, columns, css_of(group, row["control"])) for row in rows if row["of"] == name]
        title = f'<tr><th scope="rowgroup" colspan="{len(columns) + 3}">{words.text(name.capitalize())}</th></tr>'
        bodies.append(f"<tbody>{title}{''.join(mine)}</tbody>")
    return (
        f'<div class="scroll"><table class="results"><thead><tr><th></th>{heads}<th scope="col">tokens an answer</th>'
        f'<th scope="col">training compute</th></tr></thead>{"".join(bodies)}</table></div>'
    )


def _title(column: str) -> str:
    return "all, pass@1" if column == "pass@1" else column.removeprefix(TASK)


def _key(column: str) -> str:
    return ' class="key"' if column == "pass@1" else ""


def _result_row(row: Row, columns: Sequence[str], css: str) -> str:
    seeds = f' <span class="tag">{row["seeds"]} seeds</span>' if row["seeds"] > 1 else ""
    tag = '<span class="tag">control</span>' if row["control"] else ""
    head = f'<th scope="row"><i class="dot"></i>{words.text(row["label"])} {tag}{seeds}</th>'
    if row["pass@1"] is None:
        gap = f'<td class="missing" colspan="{len(columns) + 2}">{words.text(row["missing"])}</td>'
        return f'<tr class="{css}">{head}{gap}</tr>'
    cells = "".join(f"<td{_key(c)}>{_accuracy(row[c], row[f'{c} stderr'])}</td>" for c in columns)
    length = f"<td>{row['mean_tokens']:.1f}{_error(row['mean_tokens stderr'], 1.0)}</td>"
    note = f'<span class="missing">{words.text(row["missing"])}</span>' if row["missing"] else ""
    return f'<tr class="{css}">{head}{cells}{length}<td>{words.flops(row["train flops"])}{note}</td></tr>'


def _accuracy(value: float | None, stderr: float | None) -> str:
    if value is None:
        return words.NONE
    return f"{100 * value:.1f}{_error(stderr, 100.0)}{bar(value, stderr)}"


def _error(stderr: float | None, scale: float) -> str:
    return "" if stderr is None else f'<span class="pm">±{scale * stderr:.1f}</span>'


def bar(value: float, stderr: float | None) -> str:
    """A share from 0 to 1 as a bar, one standard error to either side as a whisker."""
    end = 100 * min(max(value, 0.0), 1.0)
    whisker = ""
    if stderr:
        low, high = max(0.0, end - 100 * stderr), min(100.0, end + 100 * stderr)
        whisker = f'<path class="whisker" d="M{low:.2f} 5H{high:.2f}M{low:.2f} 2V8M{high:.2f} 2V8"/>'
    return (
        '<svg class="cell" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" y="3" width="100" height="4"/><rect class="fill" y="3" width="{end:.2f}" height="4"/>'
        f"{whisker}</svg>"
    )


# ---- claims -------------------------------------------------------------------------------------------------------


def claims_html(rows: Sequence[Row]) -> str:
    """Every claim with its number, its target and, plainly, whether it is reached."""
    marks = {True: ("yes", "✓ reached"), False: ("no", "✗ missed"), None: ("open", "not decided")}
    told = [f'<b class="{css}">{mark}</b>' for css, mark in (marks[row["reached"]] for row in rows)]
    body = "".join(
        f'<tr><th scope="row">{words.text(row["text"])}</th><td class="found">{_claim_value(row)}</td>'
        f'<td class="target">{words.text(_claim_target(row))}</td><td>{row["seeds"] or words.NONE}</td>'
        f"<td>{mark}</td></tr>"
        for row, mark in zip(rows, told, strict=True)
    )
    return (
        '<div class="scroll"><table class="claims"><thead><tr><th scope="col">Claim</th><th scope="col">Measured</th>'
        '<th scope="col">Target</th><th scope="col">Seeds</th><th scope="col"></th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _claim_target(row: Row) -> str:
    bound = "at least" if row["sense"] == ">=" else "at most"
    return f"{bound} {words.in_unit(row['target'], row['unit'], sign=False)}"


def _claim_value(row: Row) -> str:
    told, error = words.in_unit(row["value"], row["unit"]), words.plus_minus(row["stderr"], row["unit"])
    number, _, unit = told.partition(" ")
    unit_html = f' <span class="unit">{words.text(unit)}</span>' if unit else ""
    error_html = f'<span class="pm">{words.text(error)}</span>' if error else ""
    return f"{words.text(number)}{error_html}{unit_html}"


# ---- the bill -----------------------------------------------------------------------------------------------------


def bill_html(rows: Sequence[Row], roles: Mapping[str, Role]) -> str:
    """Two bars on one scale, headline and everything, and the table of stages beneath."""
    stages = [row for row in rows if row["kind"] != "total"]
    totals = [row for row in rows if row["kind"] == "total"]
    return f"{_shares(stages, totals, roles)}{_bill(stages, totals, roles)}"


def _shares(stages: Sequence[Row], totals: Sequence[Row], roles: Mapping[str, Role]) -> str:
    spent = [row for row in stages if row["seconds"]]
    everything = max(sum(row["seconds"] for row in spent), *(row["seconds"] for row in totals[:2]))
    if not everything:
        return ""
    bars = []
    for total in totals[:2]:
        mine = [row for row in spent if row["headline"] or not total["headline"]]
        lost = total["seconds"] - sum(row["seconds"] for row in mine)
        parts = [_share(row["stage"], row["seconds"], everything, roles[row["stage"]].css) for row in mine]
        if lost > 0.01 * everything:
            parts.append(_share("broken-off attempts", lost, everything, "r-lost"))
        told = f"{words.seconds(total['seconds'])} · {words.usd(total['usd'])}"
        bars.append(
            f'<div class="share"><p><b>{words.text(total["stage"])}</b> {told}</p>'
            f'<div class="stack">{"".join(parts)}</div></div>'
        )
    return f'<div class="shares">{"".join(bars)}</div>'


def _share(name: str, seconds: float, everything: float, css: str) -> str:
    width = 100 * seconds / everything
    label = words.text(name) if width > 0.9 * len(name) + 1 else ""
    title = f"{words.text(name)}: {words.seconds(seconds)}"
    return f'<span class="{css}" style="width:{width:.3f}%" title="{title}">{label}</span>'


def _bill(stages: Sequence[Row], totals: Sequence[Row], roles: Mapping[str, Role]) -> str:
    longest = max([row["seconds"] or 0.0 for row in stages], default=0.0) or 1.0
    bodies = []
    for title, headline in (("In the headline", True), ("Beside it: controls and evaluation", False)):
        mine = [_bill_row(r, longest, roles[r["stage"]].css) for r in stages if r["headline"] is headline]
        if mine:
            bodies.append(f'<tbody><tr><th scope="rowgroup" colspan="8">{title}</th></tr>{"".join(mine)}</tbody>')
    foot = "".join(_bill_row(row, None, "total") for row in totals)
    return (
        '<div class="scroll"><table class="bill"><thead><tr><th scope="col">Stage</th><th scope="col"></th>'
        '<th scope="col">Time</th><th scope="col">Tokens</th><th scope="col">of them sampled</th>'
        '<th scope="col">Compute</th><th scope="col">Share of peak</th><th scope="col">Cost</th></tr></thead>'
        f"{''.join(bodies)}<tfoot>{foot}</tfoot></table></div>"
    )


def _bill_row(row: Row, longest: float | None, css: str) -> str:
    """One stage, or (without `longest`) one total."""
    share = words.percent(row["peak_share"]) if row["flops"] else words.NONE
    wide = 0.0 if longest is None else 100 * (row["seconds"] or 0.0) / longest
    picture = f'<span class="time" style="width:{wide:.2f}%"></span>' if wide else ""
    state = "" if row["status"] in ("finished", "") else f' <span class="missing">{words.text(row["status"])}</span>'
    name = row["stage"] if longest is not None else f"Total, {row['stage']}"
    return (
        f'<tr class="{css}"><th scope="row">{words.text(name)}{state}</th><td class="times">{picture}</td>'
        f"<td>{words.seconds(row['seconds'])}</td><td>{words.count(row['tokens'])}</td>"
        f"<td>{words.count(row['sampled_tokens'] or None)}</td><td>{words.flops(row['flops'])}</td><td>{share}</td>"
        f"<td>{words.usd(row['usd'])}</td></tr>"
    )
