"""The distillation bench runs at its smallest, in every case; and starts from TRL's losses where TRL is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
PEER_PYTHON = Path(os.environ.get("PEER_PYTHON", ROOT / ".venv-peers" / "bin" / "python"))


def run(case: str, *words: str) -> tuple[str, list[dict[str, Any]]]:
    command = [sys.executable, str(ROOT / "bench" / "distill_step.py"), "--case", case, "--small", "--threads", "1",
               "--warm-up", "1", "--repeats", "1", *words]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "case",
    [pytest.param("off"), pytest.param("sft", marks=pytest.mark.slow), pytest.param("on", marks=pytest.mark.slow)],
)
def test_it_runs_alone_and_ends_with_json(case: str) -> None:
    text, entries = run(case, "--peers", "none")
    assert [entry["metric"] for entry in entries] == ["time", "processor time", "peak memory"]
    assert all(
        entry["name"] == f"distill_step {case} 512" and entry["ours"] > 0 and entry["small"] for entry in entries
    )
    assert (entries[0]["limit"] is None) == (case == "on")
    assert case == "on" or 0 < entries[0]["share_of_limit"] < 1
    assert f"{case}, vocabulary 512, 2 x (8 + 8), 1 threads" in text


@pytest.mark.slow
def test_a_peer_that_is_not_there_is_named(tmp_path: Path) -> None:
    text, entries = run("sft", "--peers", "SFTTrainer fp32", "--peer-python", str(tmp_path / "python"))
    assert entries[0]["peers"] == {} and "make peers" in entries[0]["failed"]["SFTTrainer fp32"]
    assert "SFTTrainer fp32" in text


@pytest.mark.slow
@pytest.mark.skipif(not PEER_PYTHON.exists(), reason="no peers here: `make peers` makes them")
@pytest.mark.parametrize("case", ["sft", "off"])
def test_both_sides_start_from_the_same_loss(case: str) -> None:
    peer = {"sft": "SFTTrainer fp32", "off": "GKDTrainer fp32"}[case]
    text, entries = run(case, "--peers", peer, "--peer-python", str(PEER_PYTHON), "--dtype", "float32")
    assert entries[0]["best_peer"] == peer and entries[0]["failed"] == {}
    rows = {line.split("|")[1].strip(): line.split("|")[6] for line in text.splitlines() if line.startswith("| ")}
    assert float(rows["ours"]) == pytest.approx(float(rows[peer]), abs=2e-3)
