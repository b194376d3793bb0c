"""The benchmarks of asking and curating run at their smallest and say what they should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("aiohttp")
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def run(*arguments: str) -> list[dict[str, object]]:
    command = [sys.executable, str(ROOT / "bench" / arguments[0]), "--small", *arguments[1:]]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_ask() -> None:
    (found,) = run("ask.py", "--peers", "none", "--latency", "0")
    assert found["ours"] and found["limit"] and set(found["rates"]) == {"raw", "bare", "ours"}  # type: ignore[call-overload]


def test_a_peer_that_is_not_there_is_named() -> None:
    (found,) = run("ask.py", "--peers", "curator", "--curator-python", "/nowhere/python", "--latency", "0")
    assert "curator" in found["reasons"] and found["peers"] == {}  # type: ignore[operator]


def test_the_million_at_three_thousand() -> None:
    (found,) = run("ask.py", "--million")
    assert found["answers"] == 3000 and found["store_bytes"] and found["export_parquet_s"]


def test_curate() -> None:
    (found,) = run("curate.py")
    assert found["recall_at_0.8"] >= 0.99 and found["leaked_found"] == found["leaked"] == 3  # type: ignore[operator]
    assert found["false_alarms"] == found["false_leaks"] == 0
