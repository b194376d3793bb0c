"""One process at a time: a POSIX record lock that dies with its owner.

Record locks (`lockf`) are not inherited by forked workers, so a worker that outlives a killed parent cannot keep a
run from being resumed. Left out: threads of one process (they share the lock) and network file systems.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoestring.core.errors import UserError


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`. Raises UserError at once when another process holds it."""
    with open(path, "a+b", buffering=0) as file:  # unbuffered: on a full disk, closing has nothing left to write
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # not held by anybody: no locks can be had there
                raise UserError(f"{path} cannot be locked ({error.strerror}); keep {what} on another disk.") from error
            file.seek(0)
            owner = file.read().decode().strip() or "unknown"
            raise UserError(f"Another process (pid {owner}) is at work on {what}; wait for it or stop it.") from None
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        yield
