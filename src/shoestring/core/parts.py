"""The contract of a part, run on any file: the same checks for ours (tests/contracts) and for a user's.

A kind's checks live in its folder as `_contract.py` with one function `check(module, path) -> list[str]`: the breaches
found, one sentence each. They are found by name at run time, so that core imports nothing above it.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from shoestring.core.errors import UserError, did_you_mean
from shoestring.core.registry import KINDS, load_part


def checkable() -> list[str]:
    """The kinds of parts that have a contract to check."""
    return [kind for kind in KINDS if _has(f"shoestring.{kind.replace('/', '.')}._contract")]


def check(kind: str, path: str | Path) -> list[str]:
    """Every breach of the contract of `kind` by the part at `path`. Raises UserError when it cannot be checked."""
    if kind not in checkable():
        raise UserError(f'There is no contract for "{kind}".{did_you_mean(kind, checkable())}')
    module = load_part(kind, str(path))
    contract = importlib.import_module(f"shoestring.{kind.replace('/', '.')}._contract")
    failures: list[str] = contract.check(module, Path(path))
    return failures


def kind_of(path: Path) -> str:
    """The kind a file belongs to by the folder it lies in (rewards/x.py). Raises UserError when that says nothing."""
    folders = path.resolve().parent.parts
    for kind in KINDS:
        words = tuple(kind.split("/"))
        if folders[-len(words) :] == words:
            return kind
    raise UserError(f"{path} lies in no folder named after a kind of part; name its kind: --kind rewards, for one.")


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package on the way is not there
        return False
