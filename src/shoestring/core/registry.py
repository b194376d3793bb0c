"""The folder is the registry: a file dropped into `rewards/`, `tasks/`, ... is the whole registration.

Its first docstring line is its help text, read without running it. Wherever a name is accepted, a path to a .py file
and an installed package's entry point (group "shoestring.<kind>", with "." for "/") are too; `part_hash` goes into
the manifest. Files that begin with "_" are the folder's own, and so are the few shared ones named in `SHARED_FILES`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from shoestring.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

KINDS = (
    "recipes",
    "tasks",
    "rewards",
    "losses",
    "models",
    "teachers",
    "curate",
    "guard/signals",
    "lineage/methods",
)

# Files of a kind's folder that are not parts but what the parts there share.
SHARED_FILES: dict[str, tuple[str, ...]] = {
    "tasks": ("sandbox*", "grading"),
    "models": ("checkpoint*",),
}

_PACKAGE = Path(__file__).resolve().parent.parent


def list_parts(kind: str) -> dict[str, str]:
    """Name -> first docstring line of every part of `kind`, ours and those of installed packages. Runs none."""
    parts = {path.stem: _first_line(path) for path in sorted(_folder(kind).glob("*.py")) if is_part(kind, path.stem)}
    for name, entry in sorted(_entry_points(kind).items()):
        parts.setdefault(name, f"from {entry.dist.name} {entry.dist.version}" if entry.dist else "installed")
    return parts


def load_part(kind: str, name: str) -> ModuleType:
    """The module of a part, by name ("-" and "_" are one), by path, or by entry point.

    Raises UserError when there is none, when a user's file does not import, or when it lacks a package.
    """
    if is_path(name):
        return _load_file(Path(name))
    known = list_parts(kind)
    stem = name.replace("-", "_")
    if (_folder(kind) / f"{stem}.py").exists() and is_part(kind, stem):
        return _import(f"shoestring.{kind.replace('/', '.')}.{stem}", f'{kind} "{name}"')
    entry = _entry_points(kind).get(name)
    if entry is not None:
        return _import(entry.module, f'{kind} "{name}"')
    raise UserError(f'There is no "{name}" in {kind}.{did_you_mean(stem, known)}')


def part_hash(kind: str, name: str) -> str:
    """12 hex digits of the part's source file."""
    return hashlib.sha256(part_path(kind, name).read_bytes()).hexdigest()[:12]


def part_path(kind: str, name: str) -> Path:
    """The source file of a part. Raises UserError as `load_part` does."""
    if is_path(name):
        return _existing(Path(name))
    path = _folder(kind) / f"{name.replace('-', '_')}.py"
    if path.exists() and is_part(kind, path.stem):
        return path
    module = load_part(kind, name)
    if module.__file__ is None:
        raise UserError(f'{kind} "{name}" has no source file; give the path of one.')
    return Path(module.__file__)


def is_part(kind: str, stem: str) -> bool:
    """Whether the file `stem`.py of the folder of `kind` is a part."""
    return not stem.startswith("_") and not any(fnmatch(stem, shared) for shared in SHARED_FILES.get(kind, ()))


def _folder(kind: str) -> Path:
    if kind not in KINDS:
        raise UserError(f'There is no kind of part "{kind}".{did_you_mean(kind, KINDS)}')
    return _PACKAGE / kind


def is_path(name: str) -> bool:
    """Whether a name is a file's: for who reads names from data, which must not say what code is run."""
    return name.endswith(".py") or "/" in name


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    return path


def _first_line(path: Path) -> str:
    try:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except SyntaxError as error:
        return f"(does not parse: line {error.lineno})"
    return docstring.strip().splitlines()[0] if docstring else ""


def _entry_points(kind: str) -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # slow to import, and only needed here

    return {entry.name: entry for entry in entry_points(group=f"shoestring.{kind.replace('/', '.')}")}


def _load_file(path: Path) -> ModuleType:
    """Import a user's file under a name made of its contents, so that an edited file is a new module."""
    source = _existing(path).read_bytes()
    name = f"shoestring_part_{path.stem}_{hashlib.sha256(bytes(path.resolve()) + source).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look a module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, SyntaxError):
            raise UserError(f"{path} line {error.lineno} is not valid Python: {error.msg}.") from None
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise UserError(f"{path} fails when imported: {type(error).__name__}: {error}.") from error
        raise
    return module


def _import(module: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "shoestring":
            raise
        raise UserError(f'{what} needs the package "{error.name}", which is not installed.') from error
