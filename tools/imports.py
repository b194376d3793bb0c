"""Who imports whom in the package, read by ast: imports inside functions and under TYPE_CHECKING count too."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = "shoestring"
SOURCE = Path(__file__).resolve().parent.parent / "src"


def modules(source: Path = SOURCE) -> dict[str, Path]:
    """Dotted name -> file of every module of the package; a package's own name stands for its __init__.py."""
    found = {}
    for path in sorted((source / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, known: dict[str, Path]) -> list[tuple[str, int]]:
    """(imported module of the package, line) for every import that `name` makes of the package's own modules."""
    path = known[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            found += [(whole if whole in known else base, node.lineno) for whole in names]
    return [(module, line) for module, line in found if module.partition(".")[0] == PACKAGE]
