"""The order of the house: a package imports only from those above it, and parts never import each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from imports import imports, modules

from shoestring.core.registry import SHARED_FILES, is_part

LAYERS = (
    *("core", "cost", "text", "tasks", "rewards", "data", "nn", "models", "dist", "optim", "losses", "infer"),
    *("teachers", "curate", "evals", "train", "guard", "lineage", "serve", "report", "recipes", "cli"),
)
NO_SIBLINGS = ("rewards", "losses", "guard/signals", "lineage/methods", "tasks", "curate")
TOP = ("__main__", "api", "road", "road_inputs")  # beside the package's __init__, as high as the command line


def layer(module: str) -> int | None:
    """The height of a module; None for the package itself, which holds names only."""
    parts = module.split(".")
    if len(parts) == 1:
        return None
    name = "cli" if parts[1] in TOP or parts[1] == "cli" or parts[1].startswith("cli_") else parts[1]
    return LAYERS.index(name) if name in LAYERS else -1


def part_of(module: str) -> tuple[str, str] | None:
    """(folder, file) of a module that lies in a folder whose files must not import each other."""
    inner = module.partition(".")[2].replace(".", "/")
    for kind in NO_SIBLINGS:
        if inner.startswith(f"{kind}/"):
            return kind, inner.removeprefix(f"{kind}/").partition("/")[0]
    return None


def breaches(source: Path | None = None) -> list[str]:
    """Every import that goes against the order, one line each."""
    known = modules(source) if source else modules()
    found = []
    for name in known:
        mine = layer(name)
        if mine == -1:
            found.append(f"{name} belongs to no layer; known: {', '.join(LAYERS)}")
        for module, line in imports(name, known):
            theirs = layer(module)
            if mine is not None and theirs is not None and theirs > mine:
                found.append(f"{name}:{line} imports {module}, which stands below it")
            here, there = part_of(name), part_of(module)
            if here and there and here[0] == there[0] and here != there and is_part(*there) and is_part(*here):
                found.append(f"{name}:{line} imports its sibling {module}")
    return found


def test_the_house_is_in_order():
    assert breaches() == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("core/a.py", "import shoestring.nn.b", "imports shoestring.nn.b, which stands below it"),
        ("core/a.py", "from shoestring.nn import b", "imports shoestring.nn.b, which stands below it"),
        ("core/a.py", "from ..nn import b", "imports shoestring.nn.b, which stands below it"),
        ("core/a.py", "def f():\n    from shoestring.nn.b import x", "core.a:2 imports shoestring.nn.b"),
        ("core/a.py", "from shoestring import cli", "imports shoestring.cli, which stands below it"),
        ("tasks/a.py", "from shoestring.tasks.c import x", "imports its sibling shoestring.tasks.c"),
        ("guard/signals/a.py", "from . import d", "imports its sibling shoestring.guard.signals.d"),
        ("strange/a.py", "", "belongs to no layer"),
        ("nn/a.py", "from shoestring.core import e\nimport torch\nfrom shoestring.nn import b", None),
        ("tasks/a.py", "from shoestring.tasks._shared import x\nfrom shoestring.tasks import sandbox", None),
        ("train/a.py", "from shoestring import __version__", None),
    ],
)
def test_a_breach_is_seen(tmp_path, file, text, expected):
    others = (
        "cli.py",
        "core/e.py",
        "nn/b.py",
        "tasks/c.py",
        "tasks/_shared.py",
        "tasks/sandbox/d.py",
        "guard/signals/d.py",
    )
    for name in (*others, "tasks/sandbox/__init__.py", "guard/signals/__init__.py", "__init__.py", file):
        path = tmp_path / "shoestring" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if name == file else "")
    found = breaches(tmp_path)
    assert any(expected in line for line in found) if expected else found == []


def test_shared_files_are_those_named():
    assert set(SHARED_FILES) == {"tasks", "models"}
