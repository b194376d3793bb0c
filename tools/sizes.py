"""Print the longest files and functions, and how much one has to read to understand one step of reinforcement learning.

Exits 1 when a file or a function is over its limit: then split by idea, not by length.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from imports import PACKAGE, imports, modules

FILE_LIMIT, FUNCTION_LIMIT, SHOWN = 400, 70, 8
STEP_FILES, STEP_LINES = 8, 1500  # what one RL step should be readable in, about

# What a step runs through. Below it lie the model and the nouns, which are read for themselves; beside it lies what
# happens before the first step and after the last: configuration, measuring the machine, reading and writing state.
STEP_START = f"{PACKAGE}.train.rl"
# Two generators keep one contract (core/contracts.py); a step runs through one of them, ours or that over transformers'
# families, and what stands behind it is a read of its own.
ENGINE, BORROWED = f"{PACKAGE}.infer.engine", f"{PACKAGE}.infer.borrowed"
STEP_PACKAGES = ("train", "infer", "losses")
BESIDE_STEP = ("train.configs", "train.context", "train.machine", "train.state", "train.preflight")


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """(lines, name) of every function in a file, nested ones within their outer one too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, f"{node.name}:{node.lineno}"


def closure(start: str, known: dict[str, Path], stop: Sequence[str] = ()) -> list[str]:
    """The modules that one step runs through, in reading order; nothing is looked for behind `stop`."""
    found, queue = [], [start]
    while queue:
        name = queue.pop(0)
        inner = name.removeprefix(f"{PACKAGE}.")
        if name not in found and inner.partition(".")[0] in STEP_PACKAGES and inner not in BESIDE_STEP and "." in inner:
            found.append(name)
            if name in stop:
                continue
            queue += [module for module, _ in imports(name, known)]
    return found


def show(title: str, rows: list[tuple[int, str]], limit: int) -> int:
    """Print the longest rows; return how many are over the limit."""
    rows.sort(reverse=True)
    over = sum(lines > limit for lines, _ in rows)
    print(f"\n{title} (limit {limit})")
    for lines, name in rows[: max(SHOWN, over)]:
        print(f"  {lines:5d}  {name}{'   OVER' if lines > limit else ''}")
    return over


def read(title: str, names: list[str], known: dict[str, Path], limits: str = "") -> None:
    """Print what has to be read, and how much it is."""
    lines = [lines_of(known[name]) for name in names]
    print(f"\n{title}: {len(names)} files, {sum(lines)} lines{limits}")
    for name, count in zip(names, lines, strict=True):
        print(f"  {count:5d}  {name}")


def main() -> int:
    known = modules()
    files = [(lines_of(path), path.as_posix().rpartition("/src/")[2]) for path in known.values()]
    over = show("longest files", files, FILE_LIMIT)
    named = [
        (lines, f"{path.as_posix().rpartition('/src/')[2]} {name}")
        for path in known.values()
        for lines, name in functions(path)
    ]
    over += show("longest functions", named, FUNCTION_LIMIT)
    if STEP_START in known:
        most = f" (about {STEP_FILES} and {STEP_LINES} at most)"
        step = closure(STEP_START, known, (ENGINE, BORROWED))
        read("one RL step", [name for name in step if name != BORROWED], known, most)
        read("the engine behind its contract", closure(ENGINE, known), known)
    print(f"\nin all: {len(files)} files, {sum(lines for lines, _ in files)} lines")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
