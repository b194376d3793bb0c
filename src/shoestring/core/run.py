"""The run directory of one stage: manifest, metrics, checkpoints, samples, ledger entry.

Killed at any moment and opened again with the same config, parents and data, it goes on; a finished run is never
edited. Whatever matters is written atomically (`core.atomic`): the manifest, checkpoints (a temporary folder renamed
when complete), samples; metrics are appended line by line and a torn last line is cut.

    run = Run.open(root, stage="sft", recipe="quickstart", config=config, parents={"model": parent.digest})
    if not run.finished:
        with run.attempt():
            ...train, run.metric(step, loss=...), run.begin_checkpoint(step), run.commit_checkpoint(step)...
            run.finish(outputs=[path], headline_metric={"name": "loss", "value": 1.2, "stderr": 0.1}, cost={...})

Left out: several writers of one run (one process writes; a lock sees to it), remote file systems.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoestring.core import host, ledger, manifest
from shoestring.core.atomic import (
    DiskFull,
    clear_temporaries,
    commit_dir,
    disk_full,
    is_disk_full,
    remove_dir,
    told_when_full,
    write_json,
    write_text,
)
from shoestring.core.attempt import Attempt, spent_so_far, unrecorded
from shoestring.core.config import Config
from shoestring.core.errors import UserError
from shoestring.core.lock import locked
from shoestring.core.metrics import Metrics

LOCK = ".lock"
_STEP = re.compile(r"step_(\d{6,})")
_TOP_FACTS = ("chip", "sandbox")  # facts that have a field of their own in the manifest


class Run:
    """One run directory. Made by `open` (to work in) or `load` (to read); never by hand."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path = path
        self._fields = fields
        self._attempt: Attempt | None = None
        self._metrics = Metrics(path / "metrics.jsonl")

    # ---- opening -------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        stage: str,
        recipe: str,
        config: Config,
        parents: Mapping[str, str] = {},
        data: Mapping[str, str] = {},
        seed: int = 0,
        headline: bool = True,
        again: bool | str = False,
    ) -> Run:
        """The run of this config, these parents (role -> digest) and data under `root`: new, resumable or finished.

        A finished run made by other code is said to be so and kept. `again=True` makes a finished run anew beside
        the old (-2, -3, ...); `again="2026-01-31T..."` only one that was started before that moment (what a road that
        was asked to do everything again, and was killed on the way, needs). An unfinished run is always gone on with.
        """
        root = Path(root)
        values = config.to_dict()
        digest = manifest.run_digest(values, parents, data, seed)
        base = f"{stage}-{recipe}-{digest}"
        newest, number = newest_run(root, base)
        if newest is not None:
            redo = again is True or (isinstance(again, str) and newest.manifest["started"] < again)
            if not newest.finished or not redo:
                _say_if_other_code(newest)
                return newest
        name = base if newest is None else f"{base}-{number + 1}"
        fields = manifest.new(
            name=name,
            stage=stage,
            recipe=recipe,
            digest=digest,
            parents={role: {"name": _name_of(root, key), "digest": key} for role, key in parents.items()},
            data=dict(data),
            seed=seed,
            headline=headline,
        )
        with told_when_full(root / name):
            (root / name).mkdir(parents=True, exist_ok=True)
            with locked(root / name / LOCK, f"run {name}"):
                # another process may have been faster, and be at work by now
                if not (root / name / manifest.FILE).exists():
                    write_json(root / name / "config.json", values)
                    manifest.write(root / name, fields)
        return cls.load(root / name)

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """A view of an existing run directory. Raises UserError when it is none, or of an unknown schema."""
        return cls(Path(path), manifest.read(Path(path)))

    # ---- reading -------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The directory's name: stage-recipe-digest, with -2, -3, ... when made again."""
        return str(self._fields["name"])

    @property
    def digest(self) -> str:
        """12 hex digits of the resolved config, the parents, the data and the seed."""
        return str(self._fields["digest"])

    @property
    def finished(self) -> bool:
        """Whether the stage has run to its end; then nothing here changes any more."""
        return bool(self._fields["status"] == "finished")

    @property
    def manifest(self) -> dict[str, Any]:
        """A copy of the manifest."""
        return copy.deepcopy(self._fields)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config as JSON values."""
        values: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return values

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, in order."""
        return self._metrics.rows()

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """(step, folder) of the last complete checkpoint."""
        return max(self._checkpoints(), default=None)

    def without_checkpoint(self) -> str:
        """What to say of a run that has no checkpoint: it has none yet, it makes none, or somebody removed it."""
        if not self.finished:
            return "a run that is not finished and has no checkpoint yet"
        made = any(str(output["path"]).startswith("checkpoints/") for output in self._fields["outputs"])
        gone = "a run whose checkpoint is gone: bring its folder checkpoints back, or make it anew by --again"
        return gone if made else "a run that made no checkpoint"

    def _checkpoints(self) -> list[tuple[int, Path]]:
        found = (self.path / "checkpoints").glob("step_*")
        return sorted((int(match[1]), path) for path in found if (match := _STEP.fullmatch(path.name)))

    # ---- one attempt ---------------------------------------------------------------------------------------------

    @contextmanager
    def attempt(self, *, usd_per_hour: float = 0.0) -> Iterator[Run]:
        """Work on the run: everything that writes is called inside. Ends with a ledger line, however it ends.

        KeyboardInterrupt, SystemExit or leaving without `finish`: interrupted. An exception: failed, its traceback
        kept in logs/. A killed attempt gets its line from the next one. Raises UserError when another process is at
        work on it, or when the run is finished.
        """
        with told_when_full(self.path), locked(self.path / LOCK, f"run {self.name}"):
            self._fields = manifest.read(self.path)
            if self.finished:
                raise UserError(f"Run {self.name} is finished and is never edited; --again makes it anew beside it.")
            self._begin(usd_per_hour)
            try:
                yield self
            except BaseException as error:
                told = disk_full(self.path) if is_disk_full(error, self.path) else error
                told.add_note(f"run directory: {self.path}")
                self._end_badly(told)
                if told is not error:
                    raise told from error
                raise
            else:
                if not self.finished:
                    self._end("interrupted", "left without finishing")
            finally:
                self._metrics.close()
                self._attempt = None

    def _begin(self, usd_per_hour: float) -> None:
        for folder in (self.path, self.path / "checkpoints", self.path / "samples", self.path / "logs"):
            folder.mkdir(exist_ok=True)
            clear_temporaries(folder)
        self._metrics.cut_torn_line()
        if (killed := unrecorded(self.path, self._fields, ledger.read(self.path.parent), self.metrics)) is not None:
            ledger.append(self.path.parent, killed)
        made = manifest.made_by()
        if self._fields["attempts"] and made["code"] != self._fields["code"]:
            self._fields["facts"].setdefault("earlier_code", []).append(self._fields["code"])
        self._fields.update(made, status="started", attempts=self._fields["attempts"] + 1, error=None, ended=None)
        manifest.write(self.path, self._fields)
        self._attempt = Attempt.begin(self.path, self._fields, usd_per_hour, spent_so_far(self.metrics()))

    def _end_badly(self, error: BaseException) -> None:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)
        try:
            if not stopped:
                log = self.path / "logs" / f"attempt_{self._fields['attempts']:03d}.txt"
                write_text(log, "".join(traceback.format_exception(error)))
            self._end("interrupted" if stopped else "failed", f"{type(error).__name__}: {error}")
        except (OSError, UserError) as second:  # what failed the stage may fail its epitaph; the first is the news
            if not (isinstance(error, DiskFull) and isinstance(second, DiskFull)):  # one full disk is said once
                error.add_note(f"and the manifest could not be updated: {second}")

    def _end(self, status: str, message: str) -> None:
        if self.finished:
            return  # it finished, then something after it failed: the run stays as it is
        assert self._attempt is not None
        self._fields.update(status=status, ended=manifest.now(), error=message)
        ledger.append(self.path.parent, self._attempt.entry(status, spent_so_far(self.metrics()), error=message))
        manifest.write(self.path, self._fields)

    def _working(self, what: str) -> Attempt:
        if self._attempt is None or self.finished:
            state = "is finished" if self.finished else "is only open for reading"
            raise RuntimeError(f"{what}: run {self.name} {state}; it is written to inside `with run.attempt():`")
        return self._attempt

    # ---- metrics -------------------------------------------------------------------------------------------------

    def metric(self, step: int, **values: float | int | str) -> None:
        """Append one row, flushed. By convention `tokens` and `flops` are totals of the run so far."""
        self._working("metric")
        self._metrics.append(step, values)

    def rewind_metrics(self, step: int) -> None:
        """Drop the rows after `step`: what a resumed stage is going to compute again."""
        attempt = self._working("rewind_metrics")
        attempt.start_from(spent_so_far(self._metrics.rewind(step)))

    # ---- checkpoints and samples ---------------------------------------------------------------------------------

    def begin_checkpoint(self, step: int) -> Path:
        """An empty folder to write the checkpoint of `step` into; it is nothing until it is committed."""
        self._working("begin_checkpoint")
        folder = self._temporary(step)
        if folder.exists():
            remove_dir(folder)
        folder.mkdir(parents=True)
        return folder

    def commit_checkpoint(self, step: int, keep_last: int | None = 2) -> Path:
        """Make the folder of `begin_checkpoint` the checkpoint of `step`, and drop all but the last `keep_last`."""
        self._working("commit_checkpoint")
        final = self.path / "checkpoints" / f"step_{step:06d}"
        commit_dir(self._temporary(step), final)
        if keep_last is not None:
            for _, old in self._checkpoints()[: -max(keep_last, 1)]:
                remove_dir(old)
        return final

    def _temporary(self, step: int) -> Path:
        return self.path / "checkpoints" / f".step_{step:06d}.tmp"

    def save_samples(self, name: str, rows: list[dict[str, Any]]) -> Path:
        """Write samples/NAME.jsonl whole."""
        self._working("save_samples")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        return write_text(self.path / "samples" / f"{name}.jsonl", "".join(lines))

    # ---- facts and the end ---------------------------------------------------------------------------------------

    def note(self, **facts: Any) -> None:
        """Merge facts into the manifest (kernels chosen, ...); `chip` and `sandbox` have fields of their own."""
        self._working("note")
        for key, value in facts.items():
            target = self._fields if key in _TOP_FACTS else self._fields["facts"]
            target[key] = value
        manifest.write(self.path, self._fields)

    def finish(
        self, *, outputs: list[Path], headline_metric: Mapping[str, Any] | None, cost: Mapping[str, Any]
    ) -> None:
        """Close the run for good: hash the outputs (a folder stands for its files), write the cost and the ledger.

        `cost` holds the totals of the run: seconds, tokens, flops, usd, and whatever else is worth keeping.
        """
        attempt = self._working("finish")
        self._metrics.close()
        hashed = [_hashed(self.path, path) for output in outputs for path in _files(output)]
        write_json(self.path / "cost.json", dict(cost))
        ended = {**self._fields, "status": "finished", "ended": manifest.now(), "error": None}
        ended.update(
            outputs=hashed, headline_metric=dict(headline_metric) if headline_metric else None, cost=dict(cost)
        )
        # ledger first: killed in between, the next attempt finishes at once and both lines are true
        ledger.append(self.path.parent, attempt.finished_entry(cost, headline_metric))
        manifest.write(self.path, ended)
        self._fields = ended


def runs_tree(root: str | Path) -> list[Run]:
    """Every run under `root`, oldest first, so parents stand before their children. Raises UserError."""
    folders = sorted(path.parent for path in Path(root).glob(f"*/{manifest.FILE}"))
    return sorted((Run.load(folder) for folder in folders), key=lambda run: (run._fields["started"], run.name))


def totals(root: str | Path, runs: Sequence[Run] | None = None) -> dict[str, dict[str, float]]:
    """The two totals under `root`: {"headline": ..., "everything": ...}, each seconds, tokens, flops, usd and a count.

    `runs`: those under `root`, where they are read already.
    headline: the cost of every finished headline run, the newest where it was made again. everything: every attempt
    of the ledger, and killed ones that no later attempt has put there yet.
    """
    runs, recorded = runs_tree(root) if runs is None else runs, ledger.read(Path(root))
    newest = {(run._fields["stage"], run._fields["recipe"], run.digest): run._fields for run in runs if run.finished}
    final = [made["cost"] for made in newest.values() if made["headline"]]
    owed = [unrecorded(run.path, run._fields, recorded, run.metrics) for run in runs]
    attempts = [asdict(entry) for entry in [*recorded, *owed] if entry is not None]
    return {
        "headline": {"runs": len(final), **ledger.total_of(final)},
        "everything": {"attempts": len(attempts), **ledger.total_of(attempts)},
    }


def newest_run(root: Path, base: str) -> tuple[Run | None, int]:
    """The run of this name made last (base, base-2, base-3, ...) and its number; (None, 0) when there is none."""
    number, newest = 0, None
    for path in root.glob(f"{base}*/{manifest.FILE}"):
        suffix = path.parent.name.removeprefix(base)
        count = 1 if not suffix else int(suffix[1:]) if re.fullmatch(r"-\d+", suffix) else 0
        if count > number:
            number, newest = count, path.parent
    return (Run.load(newest) if newest else None), number


def _name_of(root: Path, digest: str) -> str | None:
    """The directory of the newest run with this digest, for people to read in the manifest."""
    runs = [run for run in runs_tree(root) if run.digest == digest]
    return runs[-1].name if runs else None


def _say_if_other_code(run: Run) -> None:
    made = run.manifest
    if run.finished and made["code"] != host.code_digest():
        by = f"commit {made['git_sha'][:9]}" if made["git_sha"] else f"version {made['versions'].get('shoestring')}"
        print(
            f"{run.name} was made by other code ({by}) and is kept; --again makes it anew beside it.", file=sys.stderr
        )


def _files(output: Path) -> list[Path]:
    if not output.exists():
        raise FileNotFoundError(f"output {output} was not written")
    return sorted(path for path in output.rglob("*") if path.is_file()) if output.is_dir() else [output]


def _hashed(root: Path, path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "path": path.resolve().relative_to(root.resolve()).as_posix(),
        "sha256": digest,
        "bytes": path.stat().st_size,
    }
