"""Old or new, never a mixture; a full disk in one sentence."""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoestring.core import atomic
from shoestring.core.atomic import (
    DiskFull,
    append_line,
    check_place,
    commit_dir,
    is_disk_full,
    read_lines,
    write_json,
    write_text,
)
from shoestring.core.config import Config
from shoestring.core.errors import UserError
from shoestring.core.run import Run


@contextmanager
def small_disk(path, size="256k"):
    """A file system that is soon full. Needs root and mount(2)."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("this system does not let root mount a tmpfs")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_write_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": [1.5, None, "é"]})
    assert path.read_text(encoding="utf-8") == '{\n  "a": [\n    1.5,\n    null,\n    "é"\n  ]\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a", "old")

    def broken(*_):
        raise OSError("no rename today")

    monkeypatch.setattr(atomic.os, "replace", broken)
    with pytest.raises(OSError, match="no rename"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_appended_lines_are_whole_with_many_writers(tmp_path):
    path = tmp_path / "ledger"
    threads = [
        threading.Thread(target=lambda n=n: [append_line(path, f'{{"n": {n}, "i": {i}}}') for i in range(20)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = read_lines(path)
    assert sorted((row["n"], row["i"]) for row in rows) == [(n, i) for n in range(4) for i in range(20)]


def test_a_torn_line_is_skipped_and_closed(tmp_path):
    path = tmp_path / "ledger"
    path.write_text('{"a": 1}\n{"a": 2, "b"')
    assert read_lines(path) == [{"a": 1}]
    append_line(path, '{"a": 3}')
    assert read_lines(path) == [{"a": 1}, {"a": 3}]


def test_a_line_broken_otherwise_is_an_error(tmp_path):
    path = tmp_path / "ledger"
    path.write_text('{"a": 1}\n{"a": x}\n{"a": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_lines(path)


def test_commit_dir_replaces_an_old_one(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").write_text("old")
    (tmp_path / "temporary").mkdir()
    (tmp_path / "temporary" / "new").write_text("new")
    commit_dir(tmp_path / "temporary", tmp_path / "final")
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "new"]


def test_a_full_disk_is_a_sentence_and_keeps_the_old_file(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        path = write_text(disk / "a.json", "old")
        append_line(disk / "ledger", '{"a": 1}')
        with pytest.raises(DiskFull, match=r"No space left on the disk of .*a\.json: free some"):
            write_text(path, "x" * 1_000_000)
        assert path.read_text() == "old"
        with pytest.raises(DiskFull):
            append_line(disk / "ledger", '{"a": "' + "x" * 1_000_000 + '"}')
        assert read_lines(disk / "ledger") == [{"a": 1}]
        append_line(disk / "ledger", '{"a": 2}')
        assert read_lines(disk / "ledger") == [{"a": 1}, {"a": 2}]


def test_a_run_whose_disk_fills_says_so_and_goes_on(tmp_path):
    class Empty(Config):
        pass

    with small_disk(tmp_path / "disk", "512k") as disk:

        def opened():
            return Run.open(disk, stage="sft", recipe="r", config=Empty())

        with pytest.raises(DiskFull, match="run the same command again"), opened().attempt() as run:
            run.metric(1, loss=1.0)
            (run.begin_checkpoint(1) / "weights").write_bytes(b"1" * 1000)
            run.commit_checkpoint(1)
            (run.begin_checkpoint(2) / "weights").write_bytes(b"2" * 1_000_000)
        run = opened()
        assert run.latest_checkpoint()[0] == 1
        with run.attempt():
            assert run.metrics() == [{"step": 1, "loss": 1.0}]
            run.finish(outputs=[run.latest_checkpoint()[1]], headline_metric=None, cost={})
        assert Run.load(run.path).finished


def test_other_libraries_errors_for_a_full_disk_are_known(tmp_path):
    class SafetensorError(Exception):
        pass

    assert not is_disk_full(SafetensorError("I/O error"), tmp_path)
    # a large tensor can fail where there is room for small files yet: then the words tell
    assert is_disk_full(SafetensorError("I/O error: No space left on device (os error 28)"), tmp_path)
    assert not is_disk_full(ValueError("write"), tmp_path)
    wrapped = RuntimeError("writer failed")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert is_disk_full(wrapped, tmp_path)
    with small_disk(tmp_path / "disk") as disk:
        (disk / "fill").write_bytes(b"0" * 256 * 1024)
        assert is_disk_full(SafetensorError("I/O error"), disk)


def test_a_reason_that_is_known_is_not_a_full_disk(tmp_path):
    """/proc has no room at all, and "no such file" is what is wrong there."""
    assert not is_disk_full(FileNotFoundError(2, "No such file or directory"), Path("/proc"))


def test_a_place_is_tried_before_the_work(tmp_path):
    assert check_place(tmp_path / "new" / "page.md").parent.is_dir() and not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "x", Path("/proc/x")):
        with pytest.raises(UserError, match=r"is a folder|cannot be written"):
            check_place(path)
