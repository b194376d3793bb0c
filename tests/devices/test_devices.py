"""What a GPU would run, on a device that does not exist (pretend.py): the checks run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
QUICK, ALL = "not slow", "slow or not slow"


def check(names: tuple[str, ...], which: str) -> None:
    files = [str(HERE / f"check_{name}.py") for name in names]
    options = ["-q", "-x", "-p", "no:cacheprovider", "--timeout", "1800", "-m", which]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        capture_output=True, text=True, cwd=HERE.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


def test_training_and_the_engine() -> None:
    check(("training", "engine", "calibrate"), QUICK)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_and_every_stage() -> None:
    check(("training", "engine", "calibrate", "road"), ALL)
