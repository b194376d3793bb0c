"""Files that are either the old one whole or the new one whole, whatever happens in between.

Written to a temporary file beside the target, fsynced, renamed over it, and the directory fsynced: after a
kill or a power cut there is one of the two, never a mixture. A full disk is told in one sentence (`DiskFull`)
and leaves the old file as it was. Left out: Windows (`fcntl` and directory fsync are POSIX).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shoestring.core.errors import UserError

TEMPORARY = ".tmp"  # suffix of what may be deleted when nobody is writing
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NEARLY_NOTHING = 64 * 1024  # bytes free: a write that failed here failed for want of space


class DiskFull(UserError):
    """No space left where a run writes; the mend is the user's, and the run goes on afterwards."""


def disk_full(path: Path) -> DiskFull:
    """The sentence for a disk that filled while `path` was being written."""
    return DiskFull(f"No space left on the disk of {path}: free some and run the same command again; it goes on.")


def is_disk_full(error: BaseException, path: Path) -> bool:
    """Whether `error`, or what caused it, is a full disk under `path`.

    Libraries that write for us (safetensors, torch) have errors of their own for it: some quote the system's words,
    for the others the disk is asked.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DiskFull) or (isinstance(cause, OSError) and cause.errno in _FULL):
            return True
        if any(os.strerror(code) in str(cause) for code in _FULL):
            return True
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OSError) and error.errno is not None:
        return False  # the system has named another reason
    wrote = isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or "write" in str(error).lower()
    return wrote and shutil.disk_usage(path).free < _NEARLY_NOTHING


def check_place(path: Path) -> Path:
    """`path` itself, its folder made. Raises UserError where no file can be written there: asked before the work whose
    result it is to hold."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file in it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(path) from error
        raise UserError(f"{path} cannot be written ({error.strerror}); give another place.") from error
    return path


@contextmanager
def told_when_full(path: Path) -> Iterator[None]:
    """What writes inside and finds the disk of `path` full says so in a sentence (DiskFull)."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(path) from error
        raise


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes(path: Path, data: bytes) -> Path:
    """Replace `path` by `data` atomically. Raises DiskFull; the old file then stays."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with told_when_full(path):
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_path(path.parent)
    except BaseException:
        with suppress(OSError):  # not there, or in a read-only folder: the first error is the news
            temporary.unlink()
        raise
    return path


def write_text(path: Path, text: str) -> Path:
    """Replace `path` by `text` (UTF-8) atomically."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> Path:
    """Replace `path` by `value` as indented JSON atomically. NaN and infinity are refused (ValueError)."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append one line for good: locked, fsynced, whole or not at all. A torn last line is closed first."""
    path = Path(path)
    with told_when_full(path), open(path, "ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        data = line.encode("utf-8") + b"\n"
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            data = b"\n" + data
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def read_lines(path: Path, *, appended: bool = True) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file. Raises UserError for a broken line.

    `appended`: the file is one that grows and may have been cut by a kill; a torn line is left out. A file that was
    written whole or came from elsewhere has none: there it is damage.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if not appended and _torn(lines, number):
                raise UserError(f"{path} line {number} breaks off: the file is cut; copy it again.") from error
            if not appended or (number < len(lines) and not _torn(lines, number)):
                raise UserError(f"{path} line {number} is not JSON; remove or mend that line.") from error
    return rows


def _torn(lines: list[bytes], number: int) -> bool:
    """A line cut by a kill never closed its brace, whether or not the next append closed the line."""
    line = lines[number - 1].rstrip()
    return line.startswith(b"{") and not line.endswith(b"}")


def commit_dir(temporary: Path, final: Path) -> Path:
    """Make the finished directory `temporary` appear as `final`, on disk before it is visible."""
    with told_when_full(final):
        for folder, _, files in os.walk(temporary):
            for name in files:
                fsync_path(Path(folder) / name)
            fsync_path(Path(folder))
        if final.exists():
            remove_dir(final)
        os.replace(temporary, final)
        fsync_path(final.parent)
    return final


def remove_dir(path: Path) -> None:
    """Remove a directory so that nobody ever sees half of it: renamed first, then deleted."""
    doomed = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def clear_temporaries(folder: Path) -> None:
    """Delete what a killed writer left in `folder` (the caller holds the lock, so nobody is writing)."""
    for path in folder.glob(f".*{TEMPORARY}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
