"""The manifest: what a run directory is, written first and replaced whole. Reading one checks its schema.

Fields: schema, name, stage, recipe, digest, status (started | interrupted | failed | finished), parents
{role: {name, digest}}, data {name: digest}, git_sha, git_diff_hash, code, versions, host, chip, sandbox, seed,
attempts, started, ended, outputs [{path, sha256, bytes}], headline_metric {name, value, stderr}, headline, cost,
error, facts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shoestring.core import host
from shoestring.core.atomic import write_json
from shoestring.core.config import digest_of
from shoestring.core.errors import UserError

SCHEMA = 1
FILE = "manifest.json"


def now() -> str:
    """The present moment, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def run_digest(config: dict[str, Any], parents: Mapping[str, str], data: Mapping[str, str], seed: int) -> str:
    """12 hex digits of what decides a run's result: resolved config, parents, data and seed. Code is not in it."""
    return digest_of({"config": config, "parents": dict(parents), "data": dict(data), "seed": seed})


def made_by() -> dict[str, Any]:
    """The code and machine at work now, as manifest fields."""
    sha, changes = host.git_facts()
    return {
        "git_sha": sha,
        "git_diff_hash": changes,
        "code": host.code_digest(),
        "versions": host.versions(),
        "host": host.host(),
        "chip": host.chip(),
    }


def new(**given: Any) -> dict[str, Any]:
    """A manifest of a run that starts now."""
    empty: dict[str, Any] = {"attempts": 0, "ended": None, "outputs": [], "headline_metric": None, "cost": None}
    return {
        "schema": SCHEMA,
        "status": "started",
        **given,
        **made_by(),
        "sandbox": None,
        "started": now(),
        **empty,
        "error": None,
        "facts": {},
    }


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a run directory. Raises UserError when there is none, or none this version reads."""
    path = folder / FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a run directory: it has no {FILE}.") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON; restore it or remove the run directory.") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema!r}; this version of shoestring reads schema {SCHEMA}.")
    return manifest


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest of a run directory atomically."""
    write_json(folder / FILE, manifest)
