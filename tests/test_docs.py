"""What the pages name is there: files, links, names in files, make's targets, verbs and options."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer

from shoestring import cli

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "shoestring"
PAGES = sorted([*ROOT.glob("docs/*.md"), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "DECISIONS"))])
FOLDERS = {path.name for folder in (ROOT, SOURCE) for path in folder.iterdir() if path.is_dir()} - {"runs", "data"}
PATH = re.compile(r"(?<![\w./<…-])(?:[\w.-]+/)+[\w.-]*|(?<![\w./<…-])[\w-]+\.(?:py|md)\b")
EXAMPLES = {"FILE.py", "x.py", "loss.py", "CARD.md"}  # the reader's own, and what is written for him


def code(text: str) -> list[str]:
    """What stands between backticks or in blocks of code."""
    blocks = re.findall(r"```.*?\n(.*?)```|((?:^    .*\n)+)", text, re.S | re.M)
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)) + [a or b for a, b in blocks]


def defined(path: Path) -> set[str]:
    """Functions, classes and constants of a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for words in code(text):
        for name in PATH.findall(words):
            first, _, rest = name.partition("/")
            last = rest.rpartition("/")[2] or first
            if last in EXAMPLES or ("/" in name and first not in FOLDERS):
                continue
            places = [ROOT / name, SOURCE / name, page.parent / name]
            assert any(place.exists() for place in places), f"{page.name} names {name}, which does not exist"
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_of_make_and_verbs_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    verbs = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for words in code(page.read_text("utf-8")):
        for name in re.findall(r"(?:^|\s)make ([a-z][a-z-]*)(?=[\s,]|$)", words):
            assert name in targets, f"{page.name} says `make {name}`"
        for name, rest in re.findall(r"(?:^|\s)(?<!import )shoestring ([a-z][a-z-]+)([^\n#`]*)", words):
            assert name in verbs, f"{page.name} says `shoestring {name}`"
            known = {option for command in (verbs[name], *getattr(verbs[name], "commands", {}).values())
                     for parameter in command.params for option in parameter.opts}  # fmt: skip
            unknown = set(re.findall(r"(?<=\s)--[a-z-]+", rest)) - known - {"--help"}
            assert not unknown, f"{page.name}: shoestring {name} has no {unknown}"


def test_the_tour_names_what_is_in_its_files() -> None:
    """`file.py`, `name`: the name is defined there; and a step of the tour that names no file has lost its way."""
    text = (ROOT / "docs" / "tour.md").read_text("utf-8")
    pairs = re.findall(r"\*\*`([\w/]+\.py)`(?:, `([\w/]+\.py)`)?, `(\w+)`\*\*", text)
    assert len(pairs) >= 4
    for first, second, name in pairs:
        assert any(name in defined(SOURCE / path) for path in (first, second) if path), (first, second, name)
    steps = re.findall(r"^\d+\. (.*)$", text, re.M)
    assert len(steps) >= 12 and all("`" in step for step in steps)


def test_the_tests_see_what_is_wrong() -> None:
    assert code("a `b/c.py` d\n\n    make x\n") == ["b/c.py", "    make x\n"]
    assert PATH.findall("train/absent.py and road.py, runs/…/x") == ["train/absent.py", "road.py", "runs/"]
    assert {"code", "PAGES", "test_the_tests_see_what_is_wrong"} <= defined(Path(__file__))
