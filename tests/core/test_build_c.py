"""A folder of C becomes one library, is built again when a source changes, and says why when it cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoestring.core.build_c import Missing, load


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two units and a header, and a cache folder of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SHOESTRING_NATIVE", raising=False)
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "number.h").write_text("#define NUMBER 3\n")
    (folder / "a.c").write_text('#include "number.h"\nint three(void) { return NUMBER; }\n')
    (folder / "b.c").write_text("int three(void);\nint four(void) { return three() + 1; }\n")
    (folder / "notes.txt").write_text("no C")
    return folder


def can_build(sources: Path) -> bool:
    try:
        load(sources, "small")
    except Missing:
        return False
    return True


def test_one_library_of_all_units(sources: Path, tmp_path: Path) -> None:
    if not can_build(sources):
        pytest.skip("no C compiler here")
    assert load(sources, "small").four() == 4
    built = list((tmp_path / "cache" / "shoestring").iterdir())
    assert len(built) == 1 and built[0].name.startswith("small-")
    (sources / "number.h").write_text("#define NUMBER 6\n")
    assert load(sources, "small").four() == 7
    assert len(list((tmp_path / "cache" / "shoestring").iterdir())) == 2


def test_headers_of_another_folder(sources: Path, tmp_path: Path) -> None:
    """They are found, and a change in them is another library."""
    if not can_build(sources):
        pytest.skip("no C compiler here")
    (others := tmp_path / "others").mkdir()
    (sources / "number.h").rename(others / "number.h")
    assert load(sources, "small", headers=others).four() == 4
    (others / "number.h").write_text("#define NUMBER 8\n")
    assert load(sources, "small", headers=others).four() == 9


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"SHOESTRING_NATIVE": "0"}, "SHOESTRING_NATIVE is 0"),
        ({"CC": "no-such-compiler"}, "there is no C compiler"),
        ({"CC": "false"}, "false failed"),
    ],
)
def test_why_it_is_missing(
    environment: dict[str, str], reason: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Missing, match=reason):
        load(sources, "small")
    assert not list(tmp_path.rglob("*.so"))


def test_a_source_that_does_not_compile(sources: Path, tmp_path: Path) -> None:
    if not can_build(sources):
        pytest.skip("no C compiler here")
    (sources / "c.c").write_text("this is no C\n")
    with pytest.raises(Missing, match="failed"):
        load(sources, "small")
    assert len(list(tmp_path.rglob("*.so"))) == 1
