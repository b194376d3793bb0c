"""A folder of C sources as one shared library: built with the machine's own compiler, or not to be had.

Who asks for one has a plain twin to fall back on before anything is computed. A library is compiled once per machine
(sources, flags, compiler and processor are its digest) and kept in the user's cache folder; nothing is downloaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

FLAGS = (
    "-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing",
    "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip
_log = logging.getLogger("shoestring.core")


class Missing(Exception):
    """Why the library cannot be had."""


class once:
    """functools.cache for a library, which keeps a Missing too: every step asks, and looking for a compiler takes time.

    As there, `cache_clear` forgets.
    """

    def __init__(self, find: Callable[[], ctypes.CDLL]):
        functools.update_wrapper(self, find)
        self._find = find
        self._found: ctypes.CDLL | str | None = None  # or why there is none

    def __call__(self) -> ctypes.CDLL:
        if self._found is None:
            try:
                self._found = self._find()
            except Missing as missing:
                self._found = str(missing)
        if isinstance(self._found, str):
            raise Missing(self._found)
        return self._found

    def cache_clear(self) -> None:
        self._found = None


def load(sources: Path, name: str, *, headers: Path | None = None) -> ctypes.CDLL:
    """The library of all `*.c` files of a folder, built or found in the cache under `name`.

    `headers`: another folder whose `*.h` they include.

    Raises Missing: no compiler, one that fails, or SHOESTRING_NATIVE=0. Whoever calls often keeps what was returned.
    """
    if os.environ.get("SHOESTRING_NATIVE") == "0":
        raise Missing("SHOESTRING_NATIVE is 0")
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None or shutil.which(compiler) is None:
        raise Missing("there is no C compiler (cc, gcc or clang)")
    try:
        return ctypes.CDLL(str(_built(compiler, sources, name, headers)))
    except OSError as error:
        raise Missing(f"the compiled library does not load: {error}") from error


def _built(compiler: str, sources: Path, name: str, headers: Path | None) -> Path:
    """The shared library for these sources, compiler and processor."""
    version = _output([compiler, "--version"])
    digest = hashlib.sha256("\n".join([*FLAGS, version, _processor()]).encode())
    files = sorted(path for path in sources.iterdir() if path.suffix in (".c", ".h"))
    files += sorted(headers.glob("*.h")) if headers else []
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoestring"
    found = cache / f"{name}-{digest.hexdigest()[:16]}.so"
    if not found.exists():
        _log.info("building the native library %s with %s: some seconds, once on this machine", name, compiler)
        units = [str(file) for file in files if file.suffix == ".c"]
        units += [f"-I{headers}"] if headers else []
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:  # then moved at once: two may build together
                made = Path(folder) / f"{name}.so"
                _output([compiler, *FLAGS, "-o", str(made), *units, "-lm"])
                made.replace(found)
        except OSError as error:
            raise Missing(f"the cache folder cannot be written: {error}") from error
    return found


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise Missing(f"{command[0]} failed: {said[0] if said else error}") from error


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
