"""The report of a recipe: one self-contained HTML file, without scripts or anything from elsewhere.

From top to bottom: what was found and which claims hold, what to know before believing it, the road, the results, the
curves, answers side by side, the bill, and how it was made. Made from what the runs left; whatever is missing or
unfinished is said so in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from shoestring.core.atomic import write_text
from shoestring.core.run import Run
from shoestring.report import words
from shoestring.report.curves import curves_html
from shoestring.report.drawing import road_svg
from shoestring.report.figures import bill_html, claims_html, results_html
from shoestring.report.frontier import frontier_html
from shoestring.report.making import making_html
from shoestring.report.results import why_missing
from shoestring.report.roles import css_of, groups_of, roles_of
from shoestring.report.samples import samples_html
from shoestring.report.spec import PLACEHOLDER, ReportSpec, read_spec
from shoestring.report.tables import bill_table, claims, result_table
from shoestring.train.configs import Recipe

Rows = list[dict[str, Any]]
SMALL = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_report(recipe: Recipe, runs: Mapping[str, Run], root: Path, path: Path, command: str = "") -> Path:
    """Write the page to `path`, atomically. `runs`: stage name -> its run; missing and unfinished ones are told.
    `command`: what makes it again.

    Raises UserError for a `recipe.report` that names what does not exist (see `report/tables.py`).
    """
    return write_text(path, page(recipe, runs, root, command))


def style() -> str:
    """The stylesheet, shared with the server's pages."""
    return files("shoestring.report").joinpath("style.css").read_text(encoding="utf-8")


def page(recipe: Recipe, runs: Mapping[str, Run], root: Path, command: str = "") -> str:
    """The page as text."""
    spec = read_spec(recipe)
    command = spec.command or command
    results, judged, bill = result_table(recipe, runs), claims(recipe, runs), bill_table(recipe, runs, root)
    roles = roles_of(recipe, spec)
    title = words.text(spec.title or recipe.name)
    body = [
        _head(command or recipe.name, runs, title, _finding(spec, results, judged)),
        _tiles(spec, results, bill),
        _unfinished(recipe, runs),
        _section("Claims", claims_html(judged) if judged else "", _claims_caption(judged)),
        f'<aside class="note"><h2>Before you believe it</h2>{_paragraphs(spec.note)}</aside>' if spec.note else "",
        _section("The road", _road(recipe, spec, runs), _road_caption(spec)),
        _section("Results", results_html(results, groups_of(spec)), _results_caption(results)),
        _section("What it cost", frontier_html(recipe, spec, runs), FRONTIER),
        _section("Curves", curves_html(recipe, spec, runs), CURVES + _of_seeds(spec)),
        _section("Answers, side by side", samples_html(spec, runs), _of_seeds(spec).strip()),
        _section("The bill", bill_html(bill, roles), _bill_caption(recipe)),
        _section("How it was made", making_html(recipe, command, spec, runs)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="generator" content="shoestring">'
        f"<title>{title}</title><style>{style()}</style></head>\n<body><main>{''.join(body)}</main></body></html>\n"
    )


# ---- the top ------------------------------------------------------------------------------------------------------


def _head(made_by: str, runs: Mapping[str, Run], title: str, finding: str) -> str:
    ended = max((run.manifest["ended"] or "" for run in runs.values()), default="")[:10]
    kicker = " · ".join(words.text(part) for part in ("shoestring", made_by, ended) if part)
    return f'<header><p class="kicker">{kicker}</p><h1>{title}</h1><p class="finding">{finding}</p></header>'


def _finding(spec: ReportSpec, results: Rows, judged: Rows) -> str:
    """The recipe's sentence with its numbers filled in, and how many claims hold."""
    by_row = {(row["of"], row["label"]): row for row in results}
    parts, last = [], 0
    for match in PLACEHOLDER.finditer(spec.finding):
        of, label, metric = match.groups()
        value = by_row[of, label][metric or "pass@1"]
        shown = words.NONE if value is None else f"{value:.0f}" if metric == "mean_tokens" else words.percent(value)
        parts += [words.text(spec.finding[last : match.start()]), f"<b>{shown}</b>"]
        last = match.end()
    parts.append(words.text(spec.finding[last:]))
    return " ".join(part for part in ("".join(parts), _verdict(judged)) if part)


def _verdict(judged: Rows) -> str:
    if not judged:
        return ""
    open_, missed = ([row for row in judged if row["reached"] is state] for state in (None, False))
    if open_:
        rest = f"; {_word(len(missed))} missed" if missed else ""
        return f"{_word(len(open_)).capitalize()} of {_word(len(judged))} claims cannot be decided yet{rest}."
    if missed:
        held = len(judged) - len(missed)
        hold = "claims holds" if held == 1 else "claims hold"
        return f"{_word(held).capitalize()} of {_word(len(judged))} {hold}; {_word(len(missed))} missed."
    return f"All {_word(len(judged))} claims hold." if len(judged) > 1 else "The claim holds."


def _word(number: int) -> str:
    return SMALL[number] if number < len(SMALL) else str(number)


def _tiles(spec: ReportSpec, results: Rows, bill: Rows) -> str:
    """The few numbers to take away: each model's last own row, and the two totals."""
    tiles = []
    for group, name in enumerate(groups_of(spec)):
        mine = [row for row in results if row["of"] == name and not row["control"] and row["pass@1"] is not None]
        if mine:
            best = mine[-1]
            error = "" if best["pass@1 stderr"] is None else f" ±{_points(best['pass@1 stderr'])}"
            number = f"{_points(best['pass@1'])}<small>{words.text(' %' + error)}</small>"
            tiles.append(_tile(css_of(group), number, f"{name}, {best['label']}"))
    for row in [row for row in bill if row["kind"] == "total"][:2]:
        tiles.append(_tile("", words.usd(row["usd"]), f"{row['stage']}, {words.seconds(row['seconds'])}"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _tile(css: str, number: str, told: str) -> str:
    return f'<div class="tile {css}"><b>{number}</b><span>{words.text(told)}</span></div>'


def _unfinished(recipe: Recipe, runs: Mapping[str, Run]) -> str:
    states = [(stage.name, why) for stage in recipe.stages if (why := why_missing(runs, stage.name))]
    if not states:
        return ""
    told = ", ".join(f"{name} ({why})" for name, why in states[:12]) + (", …" if len(states) > 12 else "")
    return (
        f'<p class="unfinished"><b>Not whole yet.</b> {len(states)} of {len(recipe.stages)} stages have not finished: '
        f"{words.text(told)}. The same command goes on from here.</p>"
    )


# ---- sections -----------------------------------------------------------------------------------------------------

CURVES = (
    "Faint: every step; firm: a running mean over a fifteenth of the curve. Beside each title the first line's start "
    "and end. Controls are grey."
)
FRONTIER = (
    "Each way of learning at several budgets, both axes logarithmic (upwards: errors). An arm pays for itself and what "
    "it alone needed: asking, stored logits, the arm it goes on from; what all start from is not counted. Whiskers: "
    "one standard error over seeds."
)


def _section(title: str, body: str, caption: str = "") -> str:
    if not body:
        return ""
    under = f'<p class="caption">{words.text(caption)}</p>' if caption else ""
    return f"<section><h2>{words.text(title)}</h2>{under}{body}</section>"


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{words.text(part.strip())}</p>" for part in text.split("\n\n") if part.strip())


def _road(recipe: Recipe, spec: ReportSpec, runs: Mapping[str, Run]) -> str:
    drawn = road_svg(recipe, spec, runs)
    items = [(css_of(i), name) for i, name in enumerate(groups_of(spec))]
    items += [("r-control", "control"), ("r-data", "data"), ("r-eval", "evaluation")]
    legend = "".join(f'<li class="{css}"><i class="dot"></i>{words.text(name)}</li>' for css, name in items)
    return f'<ul class="legend">{legend}</ul><div class="scroll wide">{drawn}</div>' if drawn else ""


def _of_seeds(spec: ReportSpec) -> str:
    """What is not averaged says so."""
    seeds = len({entry.seed for entry in spec.evals})
    return f" Of the first of {seeds} seeds." if seeds > 1 else ""


def _road_caption(spec: ReportSpec) -> str:
    seeds = len({entry.seed for entry in spec.evals})
    more = f" Drawn for the first of {seeds} seeds; the others repeat it." if seeds > 1 else ""
    return f"Every box is a stage with its measured time; “= FLOPs” marks a control at equal training compute.{more}"


def _claims_caption(judged: Rows) -> str:
    seeds = max((row["seeds"] for row in judged), default=0)
    if seeds > 1:
        return "Means over seeds ± standard error over seeds."
    return (
        "One seed: ± is the standard error of the paired difference over the same problems, and says nothing of "
        "other seeds."
    )


def _results_caption(results: Rows) -> str:
    seeds = {row["seeds"] for row in results}
    error = "over seeds" if max(seeds, default=0) > 1 else "over problems"
    if error == "over seeds" and 1 in seeds:
        error = "over seeds where a row names them, elsewhere over the problems of its one seed"
    return (
        f"Right answers to unseen problems in per cent, ± one standard error {error} (the whisker). Training compute "
        "is all that went into the weights: pretraining, rollouts, and the sampling of the traces they learnt from."
    )


def _bill_caption(recipe: Recipe) -> str:
    return (
        "Headline: what made the final models, as papers count it. Everything: controls, evaluations and broken-off "
        f"attempts too. Dollars at {words.usd(recipe.usd_per_hour)} an hour; share of peak is against the best dense "
        "product measured on this machine."
    )
