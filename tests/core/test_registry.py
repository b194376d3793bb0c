"""The folder is the registry: names, paths and entry points, listed without running anything."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import shoestring
from shoestring.core import parts, registry
from shoestring.core.errors import UserError
from shoestring.core.registry import list_parts, load_part, part_hash


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package folder of our own in place of shoestring's."""
    folder = tmp_path / "rewards"
    folder.mkdir()
    (folder / "brief_one.py").write_text('"""Short is good.\n\nMore."""\nraise RuntimeError("ran")\n')
    (folder / "_shared.py").write_text('"""No part."""\n')
    (folder / "broken.py").write_text("def (:\n")
    monkeypatch.setattr(registry, "_PACKAGE", tmp_path)
    return folder


def test_listing_reads_docstrings_and_runs_nothing(package):
    assert list_parts("rewards") == {"brief_one": "Short is good.", "broken": "(does not parse: line 1)"}
    assert list_parts("teachers") == {}


def test_listing_ours_loads_no_torch():
    code = "import sys, shoestring.core.registry as r; list(map(r.list_parts, r.KINDS)); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_part_of_ours_has_a_first_line():
    listed = {(kind, name): line for kind in registry.KINDS for name, line in list_parts(kind).items()}
    assert listed
    assert not [key for key, line in listed.items() if len(line) < 10]


def test_shared_files_are_not_parts():
    assert "checkpoint" not in list_parts("models")
    assert {"sandbox", "grading"}.isdisjoint(list_parts("tasks"))


def test_unknown_names_and_kinds(package):
    with pytest.raises(UserError, match=r'no "brief_on" in rewards\. Did you mean "brief_one"\?'):
        load_part("rewards", "brief_on")
    with pytest.raises(UserError, match=r'no kind of part "reward"\. Did you mean "rewards"\?'):
        list_parts("reward")
    with pytest.raises(UserError, match='no "_shared" in rewards'):
        load_part("rewards", "_shared")


def test_a_path_is_as_good_as_a_name(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text('"""Mine."""\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 3\n')
    module = load_part("rewards", str(path))
    assert module.A().x == 3
    assert load_part("rewards", str(path)) is module
    first = part_hash("rewards", str(path))
    path.write_text('"""Mine, edited."""\nx = 4\n')
    assert load_part("rewards", str(path)).x == 4
    assert part_hash("rewards", str(path)) != first


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def (:", "line 1 is not valid Python"),
        ("import a_package_nobody_has", "fails when imported: ModuleNotFoundError"),
        ("1 / 0", "fails when imported: ZeroDivisionError"),
    ],
)
def test_a_broken_file_is_told_in_a_sentence(tmp_path, text, sentence):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_part("rewards", str(path))
    with pytest.raises(UserError, match="There is no file"):
        load_part("rewards", str(tmp_path / "absent.py"))


def test_names_load_and_dashes_are_underscores():
    assert load_part("losses", "next_token") is load_part("losses", "next-token")
    assert part_hash("losses", "next-token") == part_hash("losses", "next_token")
    assert registry.part_path("losses", "next-token") == Path(shoestring.__file__).parent / "losses" / "next_token.py"


def test_entry_points_of_installed_packages_count(tmp_path, monkeypatch):
    (tmp_path / "their_reward.py").write_text('"""Theirs."""\nRANGE = (0.0, 1.0)\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = EntryPoint(name="theirs", value="their_reward", group="shoestring.rewards")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry] if group == entry.group else [])
    assert list_parts("rewards")["theirs"] == "installed"
    assert load_part("rewards", "theirs").RANGE == (0.0, 1.0)
    assert len(part_hash("rewards", "theirs")) == 12


def test_the_kind_of_a_file_is_its_folder():
    assert parts.kind_of(Path("somewhere/rewards/x.py")) == "rewards"
    assert parts.kind_of(Path("guard/signals/x.py")) == "guard/signals"
    with pytest.raises(UserError, match="--kind"):
        parts.kind_of(Path("somewhere/x.py"))


def test_a_contract_is_found_by_kind(tmp_path, monkeypatch):
    (tmp_path / "x.py").write_text('"""X."""\nRANGE = 3\n')
    package = tmp_path / "contract_module.py"
    package.write_text("def check(module, path):\n    return [f'RANGE is {module.RANGE}']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    real = parts.importlib.import_module
    monkeypatch.setattr(parts, "checkable", lambda: ["rewards"])
    monkeypatch.setattr(
        parts.importlib, "import_module", lambda name: real("contract_module" if name.endswith("_contract") else name)
    )
    assert parts.check("rewards", tmp_path / "x.py") == ["RANGE is 3"]
    with pytest.raises(UserError, match=r'no contract for "reward"\. Did you mean "rewards"\?'):
        parts.check("reward", tmp_path / "x.py")
