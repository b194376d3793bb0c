"""What is behind a model: every teacher, data set and base model of its run tree, with licence and terms.

Read from the manifests up to the roots and from the traces that were trained on. A model that was exported carries its
`provenance.json`, so the chain goes on through folders. What nobody wrote down is "unknown", never "allowed".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoestring.core.errors import UserError
from shoestring.core.run import Run
from shoestring.data.traces import TraceStore
from shoestring.teachers._price import terms_of

FILE, SCHEMA = "provenance.json", 1
UNKNOWN = ("", "unknown")


@dataclass(frozen=True, slots=True)
class Source:
    """One thing that a model learnt from. `terms`: allowed, forbidden (to train competing models), or unknown."""

    kind: str  # teacher | model | data
    name: str
    licence: str
    terms: str
    used_by: str  # the run, or the exported model, that learnt from it
    detail: str = ""


def tree(run: Run) -> list[Run]:
    """The run and all its ancestors, roots first, each once."""
    found: dict[str, Run] = {}

    def walk(at: Run) -> None:
        for parent in at.manifest["parents"].values():
            if parent["name"] and parent["name"] not in found:
                walk(Run.load(at.path.parent / parent["name"]))
        found.setdefault(at.name, at)

    walk(run)
    return list(found.values())


def sources(model: str | Path) -> list[Source]:
    """Everything behind a run directory, or behind an exported folder. Raises UserError for anything else."""
    path = Path(model)
    if (path / FILE).exists():
        return _read(path)
    found: list[Source] = []
    for run in tree(Run.load(path)):
        found += _of_run(run)
    return sorted(set(found), key=lambda s: (s.kind, s.name, s.used_by))


def hindrances(found: Iterable[Source]) -> list[str]:
    """A sentence for each source whose terms forbid a student, or are not known."""
    said = []
    for source in found:
        if source.terms == "forbidden":
            said.append(f"the terms of {source.name} forbid training competing models on its answers")
        elif source.terms == "unknown":
            said.append(f"the licence of the {source.kind} {source.name} is unknown")
    return list(dict.fromkeys(said))


def write(folder: Path, found: Iterable[Source], permission: bool) -> None:
    """`provenance.json` of an export."""
    rows = [asdict(source) for source in found]
    text = json.dumps({"schema": SCHEMA, "permission_stated": permission, "sources": rows}, indent=2)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def _read(folder: Path) -> list[Source]:
    try:
        told = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if told.get("schema") != SCHEMA:
            raise UserError(f"{folder / FILE} has schema {told.get('schema')!r}; this version reads {SCHEMA}.")
        return [Source(**row) for row in told["sources"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / FILE} is not readable ({error}); export the model again.") from None


def _of_run(run: Run) -> list[Source]:
    config, parents = run.config, run.manifest["parents"]
    found: list[Source] = []
    for role, parent in parents.items():
        if role == "traces":
            found += _teachers(run, parent)
        elif parent["name"] is None and (role == "model" or role.startswith("teacher")):
            found += _foreign(run, role, str(config["inputs"][role]), parent["digest"])
    for name, digest in (run.manifest["data"] or {}).items():
        if "/" not in name or Path(name).suffix in (".txt", ".jsonl"):
            found.append(Source("data", Path(name).name, "unknown", "unknown", run.name, f"sha256 {digest}"))
        elif name.startswith("tasks/"):
            found.append(Source("data", name, "made by this software", "allowed", run.name, f"version {digest}"))
    return found


def _teachers(run: Run, parent: dict[str, Any]) -> list[Source]:
    """The teachers whose answers a run learnt from: of a run of traces, or of a store of the user's."""
    folder = run.path.parent / parent["name"] if parent["name"] else Path(str(run.config["inputs"]["traces"]))
    told: Counter[tuple[str, str, str]] = Counter()
    for trace in TraceStore(folder):
        forbids = str(trace.source.get("terms") or terms_of(trace.teacher_reported) or terms_of(trace.teacher))
        terms = "forbidden" if forbids == "yes" else "unknown" if trace.licence in UNKNOWN else "allowed"
        told[trace.teacher, trace.licence, terms] += 1
    return [
        Source("teacher", teacher, licence or "unknown", terms, run.name, f"{count} answers")
        for (teacher, licence, terms), count in told.items()
    ]


def _foreign(run: Run, role: str, named: str, digest: str) -> list[Source]:
    """A model that is no run of ours: what its folder says of itself, and what was behind it."""
    folder, kind = Path(named), "teacher" if role.startswith("teacher") else "model"
    behind = _read(folder) if (folder / FILE).exists() else []
    licence = _card_licence(folder / "README.md") or ("see its provenance" if behind else "unknown")
    terms = "unknown" if licence in UNKNOWN else "allowed"
    return [
        Source(kind, folder.name if folder.is_dir() else named, licence, terms, run.name, f"digest {digest}"),
        *behind,
    ]


def _card_licence(card: Path) -> str:
    """`license:` of a model card's front matter."""
    if not card.is_file():
        return ""
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return ""
    for line in lines[1:]:
        if line.strip() == "---":
            return ""
        key, _, value = line.partition(":")
        if key.strip() in ("license", "license_name") and value.strip() not in ("other", ""):
            return value.strip().strip("\"'")
    return ""
