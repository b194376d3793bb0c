"""What made a run: the code, the package versions, the machine. Facts for the manifest; nothing is measured here.

No hostname, user name or path is recorded.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent
_SOURCES = ("*.py", "*.c", "*.h")  # C too: kernels decide numbers as much as what calls them
_VERSIONS_OF = ("shoestring", "torch", "numpy", "pydantic", "tokenizers", "safetensors", "transformers")


@functools.cache
def code_digest() -> str:
    """12 hex digits of every source file of the package as it lies on disk.

    This, and not the commit, decides whether two runs were made by the same code: it is the same in a checkout and
    in an installed wheel, sees uncommitted and untracked files, and does not change with the documentation.
    """
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in _PACKAGE.rglob(pattern)):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@functools.cache
def git_facts() -> tuple[str | None, str | None]:
    """(commit, hash of the uncommitted changes or None) of the checkout the package runs from; Nones outside one."""
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None  # installed, perhaps into an environment inside somebody else's checkout
    sha = _git("rev-parse", "HEAD")
    changes = _git("diff", "HEAD", "--", ".")
    return (sha.decode().strip() if sha else None), (hashlib.sha256(changes).hexdigest()[:12] if changes else None)


def _git(*words: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(_PACKAGE), *words], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@functools.cache
def versions() -> dict[str, str]:
    """Python's version and those of the installed packages that decide numbers. Imports none of them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in _VERSIONS_OF:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def processor() -> str:
    """The processor's model name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host() -> dict[str, Any]:
    """{cpu, cores (usable by this process), memory_gb, os}."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": processor(), "cores": cores(), "memory_gb": round(memory, 1), "os": platform.platform(terse=True)}


def chip() -> str:
    """The accelerator in use if torch is already loaded and sees one, else the processor."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return processor()
