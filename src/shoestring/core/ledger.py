"""The ledger: one line for every attempt at a stage, failed ones too, and the two totals of the bill.

*headline* is what a final run cost, as papers report it; *everything* is what was really spent: every attempt at
every run, ablations, controls, evaluations and rollouts with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from shoestring.core.atomic import append_line, read_lines
from shoestring.core.contracts import LedgerEntry
from shoestring.core.errors import UserError

SCHEMA = 1
FILE = "ledger.jsonl"
COSTS = ("seconds", "tokens", "sampled_tokens", "flops", "usd")


def append(root: Path, entry: LedgerEntry) -> None:
    """Add one attempt. Safe against a kill and against other writers."""
    append_line(root / FILE, json.dumps(asdict(entry), ensure_ascii=False))


def read(root: Path) -> list[LedgerEntry]:
    """Every attempt under `root`, oldest first; a line torn by a kill is left out. Raises UserError."""
    known = {field.name for field in fields(LedgerEntry)}
    needed = {f.name for f in fields(LedgerEntry) if f.default is MISSING and f.default_factory is MISSING}
    entries = []
    for row in read_lines(root / FILE):
        if not isinstance(row, dict):
            raise UserError(f"{root / FILE} has a line that is no entry; each is one JSON object. Remove or mend it.")
        if row.get("schema") != SCHEMA or set(row) - known or needed - set(row):
            raise UserError(
                f"{root / FILE} has an entry of schema {row.get('schema')!r}; this version of shoestring "
                f"reads schema {SCHEMA}."
            )
        entries.append(LedgerEntry(**row))
    return entries


def total_of(costs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The sum of seconds, tokens, FLOPs and dollars; what a cost does not name counts nothing."""
    rows = list(costs)
    return {key: sum(float(row.get(key) or 0.0) for row in rows) for key in COSTS}
