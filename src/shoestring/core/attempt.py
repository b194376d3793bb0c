"""One attempt at a run: when it began, what had been spent by then, and the ledger line it ends with.

Kept in logs/attempt_NNN.json from its first moment, so that the line of a killed attempt can be written by the next
one: its end is the time of the last metrics row, its tokens and FLOPs those of that row less those it began with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shoestring.core.atomic import write_json
from shoestring.core.contracts import LedgerEntry
from shoestring.core.manifest import now

SPENT = ("tokens", "sampled_tokens", "flops")


def spent_so_far(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Tokens and FLOPs of the run so far: those of the last metrics row that names them."""
    return {key: float(next((row[key] for row in reversed(rows) if key in row), 0.0)) for key in SPENT}


@dataclass(slots=True)
class Attempt:
    """The attempt at work on a run directory."""

    folder: Path
    run: dict[str, Any]  # name, stage, recipe, headline of the manifest
    number: int
    started: str
    usd_per_hour: float
    base: dict[str, float]  # what (`SPENT`) earlier attempts left in the checkpoint this one goes on from

    @classmethod
    def begin(cls, folder: Path, manifest: Mapping[str, Any], usd_per_hour: float, base: dict[str, float]) -> Attempt:
        """Start number `manifest["attempts"]` now, and say so on disk."""
        run = {key: manifest[key] for key in ("name", "stage", "recipe", "headline")}
        attempt = cls(folder, run, manifest["attempts"], now(), usd_per_hour, base)
        attempt._keep()
        return attempt

    def start_from(self, base: dict[str, float]) -> None:
        """What had been spent where this attempt went on from, once that is known."""
        self.base = base
        self._keep()

    def _keep(self) -> None:
        values = {key: value for key, value in asdict(self).items() if key not in ("folder", "run")}
        write_json(_file(self.folder, self.number), values)

    def entry(self, status: str, spent: Mapping[str, float], *, ended: str = "", **detail: Any) -> LedgerEntry:
        """The ledger line of an attempt that ended now (or at `ended`) with `spent` totals of the run."""
        ended = ended or now()
        seconds = max((datetime.fromisoformat(ended) - datetime.fromisoformat(self.started)).total_seconds(), 0.0)
        since = {key: max(spent.get(key, 0.0) - self.base.get(key, 0.0), 0.0) for key in SPENT}
        return LedgerEntry(
            run=self.run["name"],
            stage=self.run["stage"],
            recipe=self.run["recipe"],
            status=status,
            attempt=self.number,
            started=self.started,
            ended=ended,
            seconds=seconds,
            tokens=int(since["tokens"]),
            sampled_tokens=int(since["sampled_tokens"]),
            flops=since["flops"],
            usd=seconds / 3600 * self.usd_per_hour,
            headline=self.run["headline"],
            detail={key: value for key, value in detail.items() if value is not None},
        )

    def finished_entry(self, cost: Mapping[str, Any], headline_metric: Mapping[str, Any] | None) -> LedgerEntry:
        """The line of a finished attempt: the run's cost less what it began with; dollars as the cost counts them."""
        spent = {key: float(cost.get(key) or self.base.get(key, 0.0)) for key in SPENT}
        entry = asdict(self.entry("finished", spent, headline_metric=headline_metric))
        if cost.get("usd"):
            share = entry["seconds"] / cost["seconds"] if cost.get("seconds") and self.number > 1 else 1.0
            entry["usd"] = cost["usd"] * min(share, 1.0)
        return LedgerEntry(**entry)


def unrecorded(
    folder: Path, manifest: Mapping[str, Any], entries: Iterable[LedgerEntry],
    rows: Callable[[], Sequence[Mapping[str, Any]]],
) -> LedgerEntry | None:  # fmt: skip
    """The line owed for the last attempt when it was killed (or is at work now) and the ledger has none for it.

    `entries` of the ledger; `rows`: the run's metrics, read only where a line is owed.
    """
    number = manifest["attempts"]
    path = _file(folder, number)
    if manifest["status"] == "finished" or not path.exists():
        return None
    if any(entry.run == manifest["name"] and entry.attempt == number for entry in entries):
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    attempt = Attempt(folder=folder, run=dict(manifest), **kept)
    signs = [path, folder / "metrics.jsonl"]
    last = max(sign.stat().st_mtime for sign in signs if sign.exists())
    ended = datetime.fromtimestamp(last, UTC).isoformat(timespec="milliseconds")
    return attempt.entry("interrupted", spent_so_far(rows()), ended=ended, error="killed")


def _file(folder: Path, number: int) -> Path:
    return folder / "logs" / f"attempt_{number:03d}.json"
