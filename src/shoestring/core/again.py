"""A road asked to do everything again, that may be killed on the way and asked again.

`Run.open(again=True)` makes every finished run anew, and would do so once more when the same command is repeated after
a kill. The moment at which the road was first asked is therefore kept beside the runs until the road is through:

    moment = since(root, recipe.digest())
    ... Run.open(root, ..., again=moment) for each stage ...
    through(root, recipe.digest())
"""

from __future__ import annotations

from pathlib import Path

from shoestring.core.atomic import write_text
from shoestring.core.manifest import now


def since(root: Path, key: str) -> str:
    """When the road `key` was first asked to do everything again, and is not through yet: now, or earlier."""
    path = _file(root, key)
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        write_text(path, now())
    return path.read_text(encoding="utf-8")


def through(root: Path, key: str) -> None:
    """The road has done everything again; the next time it is asked counts anew."""
    _file(root, key).unlink(missing_ok=True)


def _file(root: Path, key: str) -> Path:
    return root / f".again-{key}"
