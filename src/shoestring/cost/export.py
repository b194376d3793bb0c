"""Export rules as a predicate over the date: which chip could be sold where on which day.

A rule holds from its effective date to the date it was replaced. Predicates are read from data and evaluated
by a small interpreter (comparisons, `and`, `or`, `in`), never by eval. Planning data, no legal advice. The date
of export (purchase) decides, not the date of training. Left out: end-use and end-user rules, quotas.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import Any

from shoestring.core.errors import UserError, did_you_mean
from shoestring.cost.chips import PCIE_GB_S, find_chip
from shoestring.cost.tables import number, shipped_rows
from shoestring.cost.units import parse_date

# What a rule's destination cell may say, and which of these a country belongs to.
GROUPS = {
    "china": ("china", "d:5", "d:1", "d:4", "worldwide"),
    "macau": ("macau", "d:5", "worldwide"),
    "russia": ("d:5", "d:1", "worldwide"),
    "saudi arabia": ("d:4", "worldwide"),
    "uae": ("d:4", "worldwide"),
    "vietnam": ("d:1", "worldwide"),
    "germany": ("worldwide",), "france": ("worldwide",), "japan": ("worldwide",), "united kingdom": ("worldwide",),
    "taiwan": ("worldwide",), "south korea": ("worldwide",), "netherlands": ("worldwide",), "usa": ("worldwide",),
}  # fmt: skip
NAMES = {"cn": "china", "prc": "china", "us": "usa", "united states": "usa", "uk": "united kingdom"}
SEVERITY = {"none": 0, "unknown": 0, "use-risk": 1, "import-block": 1, "notification": 2, "licence": 3}
COMPARE = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq}


@dataclass(frozen=True, slots=True)
class Verdict:
    """`status`: free, notification, licence, case-by-case, not-us (no US-origin rule), unknown."""

    chip: str
    day: date
    destination: str
    status: str
    rules: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def free(self) -> bool:
        return self.status == "free"

    @property
    def sentence(self) -> str:
        why = f" ({'; '.join(self.rules)})" if self.rules else ""
        words = {
            "free": "could be exported without a licence", "notification": "needed a notification",
            "licence": "needed a licence, with denial presumed",
            "case-by-case": "needed a licence, decided case by case",
            "not-us": "is not of US origin: no US export rule on selling it",
            "unknown": "cannot be decided: its data are unpublished",
        }  # fmt: skip
        return f"{self.chip} to {self.destination.title()} on {self.day}: {words[self.status]}{why}."


def evaluate(expression: str, fields: Mapping[str, Any]) -> bool:
    """Truth of a predicate over `fields`. Raises UserError for anything but comparisons and and/or/in."""
    return bool(_walk(_parsed(expression), expression, fields))


@cache
def _parsed(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body


def _walk(node: ast.expr, text: str, fields: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in fields:
            return fields[name]
        case ast.Tuple(elts=items):
            return tuple(_walk(item, text, fields) for item in items)
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_walk(v, text, fields) for v in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(_walk(v, text, fields) for v in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _walk(left, text, fields) + _walk(right, text, fields)
        case ast.Compare(left=left, ops=ops, comparators=rest):
            values = [_walk(v, text, fields) for v in (left, *rest)]
            return all(_compare(op, a, b, text) for op, a, b in zip(ops, values, values[1:], strict=False))
    raise UserError(f'export rule "{text}" uses something other than comparisons, and, or, in.')


def _compare(op: ast.cmpop, left: Any, right: Any, text: str) -> bool:
    if isinstance(op, ast.In):
        return left in right
    if type(op) not in COMPARE:
        raise UserError(f'export rule "{text}" uses a comparison that is not known.')
    return bool(COMPARE[type(op)](left, right))


def _fields(chip: str) -> dict[str, Any] | None:
    """The predicate's view of a row of chips.csv; None when TPP is not known."""
    row = next(r for r in shipped_rows("chips") if r["chip"] == chip)
    tpp = number(row, "tpp")
    if tpp is None:
        return None
    return {
        "chip": chip, "tpp": tpp, "pd": number(row, "pd") or 0.0, "datacenter": row["datacenter"] == "yes",
        "io_gb_s": number(row, "nvlink_gb_s_bidir") or PCIE_GB_S,
        "mem_bw_gb_s": 1000 * (number(row, "hbm_tb_s") or 0.0),
    }  # fmt: skip


def _chip_name(name: str) -> str:
    known = {r["chip"] for r in shipped_rows("chips")}
    return name if name in known else find_chip(name).name


def parse_destination(text: str) -> str:
    """A country this planner knows the rule groups of."""
    name = NAMES.get(text.strip().lower(), text.strip().lower())
    if name not in GROUPS:
        raise UserError(f'unknown destination "{text}".{did_you_mean(name, GROUPS)}')
    return name


def _applies(rule: Mapping[str, str], day: date, destination: str) -> bool:
    start, end = rule["effective_date"], rule["end_date"]
    if not start or parse_date(start) > day or (end and parse_date(end) <= day):
        return False
    return any(group in rule["destinations"].lower() for group in GROUPS[destination])


def export_status(chip: str, day: date | str, destination: str = "china") -> Verdict:
    """Whether `chip` could be sold to `destination` on `day`, and by which rules that is so."""
    day = parse_date(day) if isinstance(day, str) else day
    name, place = _chip_name(chip), parse_destination(destination)
    fields, maker = _fields(name), next(r["vendor"] for r in shipped_rows("chips") if r["chip"] == name)
    if place == "usa":
        return Verdict(name, day, place, "free", (), ())
    if fields is None:
        return Verdict(name, day, place, "unknown", (), ("total processing performance is not published",))
    hits, notes, eased = [], [], False
    for rule in shipped_rows("export_rules"):
        if not _applies(rule, day, place) or not rule["predicate_expr"] or not evaluate(rule["predicate_expr"], fields):
            continue
        doubt = ", unverified" if rule["unverified"] == "yes" else ""
        if rule["level"] == "case-by-case":
            eased = True
        elif SEVERITY[rule["level"]] >= 2:
            hits.append(
                (SEVERITY[rule["level"]], rule["level"], f"{rule['rule']}, in force {rule['effective_date']}{doubt}")
            )
            continue
        notes.append(f"{rule['effect']}: {rule['rule']}, {rule['source']}{doubt}")
    if maker == "Huawei":
        return Verdict(name, day, place, "not-us", (), tuple(notes))
    if not hits:
        return Verdict(name, day, place, "free", (), tuple(notes))
    level = max(hits)[1]
    status = "case-by-case" if level == "licence" and eased else level
    return Verdict(name, day, place, status, tuple(h[2] for h in hits), tuple(notes))


def parse_rule(text: str) -> tuple[date, str]:
    """'2023-06-01:China' -> (date, 'china')."""
    day, _, place = text.partition(":")
    return parse_date(day, "rule date"), parse_destination(place or "china")
