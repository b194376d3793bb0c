"""The benchmarks run, alone and small, and end with the JSON line the design asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import _bench  # noqa: E402

KEYS = {"name", "metric", "unit", "ours", "peers", "best_peer", "ratio", "limit", "share_of_limit", "machine",
        "versions", "date"}  # fmt: skip

# A contestant that needs no torch: it prints where the protocol is spoken, and takes a known time.
FAKE = """
import os, signal, sys, time
sys.path.insert(0, {bench!r})
import _bench
who = sys.argv[sys.argv.index("--serve") + 1]
channel = _bench.Channel()
print("a library that prints")
if who == "broken":
    raise RuntimeError("no such kernel")
block = bytearray(200_000_000) if who == "large" else None

def step():
    if who == "mortal":
        sys.exit("out of luck")
    if who == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05 if who == "slow" else 0.0)
    return {{"loss": 1.5}}

channel.serve(step, versions={{"fake": "1"}})
"""


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(bench=str(BENCH)))

    def make(who: str, python: str = sys.executable) -> _bench.Contestant:
        return _bench.Contestant(who, script, who, {}, 1, python)

    return make


def run(name: str, *words: str) -> tuple[str, list[dict]]:
    done = subprocess.run(
        [sys.executable, str(BENCH / name), "--small", "--threads", "1", "--warm-up", "1", "--repeats", "1", *words],
        capture_output=True, text=True, timeout=280, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def check_entries(entries: list[dict], name: str) -> None:
    assert {entry["metric"] for entry in entries} == {"time", "processor time", "peak memory"}
    for entry in entries:
        assert entry.keys() >= KEYS
        assert entry["name"] == name and entry["ours"] > 0 and entry["small"]


def test_grpo_step_runs_alone_and_ends_with_json():
    _, entries = run("grpo_step.py", "--peers", "none", "--dtype", "float32")
    check_entries(entries, "grpo_step")
    assert all(entry["peers"] == {} and entry["ratio"] is None for entry in entries)
    phases = entries[0]["phases"]["ours"]
    assert sum(phases.values()) == pytest.approx(entries[0]["ours"], rel=0.05)
    assert 0 < entries[0]["share_of_limit"] < 1


@pytest.mark.slow  # one bench runs whole in every `make test`, the other in `make test-all`
def test_train_step_names_a_peer_that_is_not_installed_with_the_reason(tmp_path):
    text, entries = run("train_step.py", "--peers", "fp32 eager sdpa", "--peer-python", str(tmp_path / "python"))
    check_entries(entries, "train_step")
    assert 0 < entries[0]["share_of_limit"] < 1
    assert any("fp32 eager sdpa" in line and "make peers" in line for line in text.splitlines())
    assert entries[0]["failed"] == {"fp32 eager sdpa": _bench.NO_PEERS}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_starts_from_the_same_loss(dtype):
    pytest.importorskip("transformers")
    mode = "fp32 grouped_mm sdpa"
    text, entries = run("train_step.py", "--peers", mode, "--peer-python", sys.executable, "--dtype", dtype,
                        "--repeats", "2")  # fmt: skip
    check_entries(entries, "train_step")
    assert entries[0]["best_peer"] == mode and entries[0]["ratio"] > 0
    rows = {row.split("|")[1].strip(): row.split("|")[6] for row in text.splitlines() if row.startswith("| ")}
    ours, theirs = ([float(x) for x in rows[who].split(",")] for who in ("ours", mode))
    assert ours == pytest.approx(theirs, abs=2e-4 if dtype == "float32" else 5e-3)  # the first loss, and two updates on
    assert ours[1] < ours[0] - 0.01


def test_contestants_take_turns_and_are_timed_in_their_own_process(fake):
    with _bench.opened([fake("quick"), fake("slow"), fake("large")]) as (quick, slow, large):
        _bench.interleave([quick, slow, large], warm_up=1, repeats=2)
    assert len(slow.steps) == 3 and len(slow.kept()) == 2
    assert min(slow.kept()) >= 0.05 > max(slow.kept("cpu_seconds"))  # sleeping is no processor time
    assert large.peak_mb > quick.peak_mb + 150
    assert slow.facts["versions"] == {"fake": "1"}


def test_a_turn_has_a_least_length(fake):
    """Who is done sooner steps again within it; whose step is longer than it steps once."""
    with _bench.opened([fake("slow")]) as (slow,):
        _bench.interleave([slow], warm_up=0, repeats=2, turn=0.12)
        assert 4 <= len(slow.kept()) <= 6
        _bench.interleave([slow], warm_up=0, repeats=1, turn=0.01)
        assert len(slow.kept()) <= 7


def test_the_fastest_first_and_failures_with_their_words(fake):
    candidates = [fake(who) for who in ("slow", "broken", "quick", "mortal", "killed")]
    ran, reasons = _bench.scout(candidates, warm_up=0, repeats=2)
    assert [c.name for c in ran] == ["quick", "slow"]
    assert reasons == {
        "broken": "broken stopped: RuntimeError: no such kernel",
        "mortal": "mortal stopped: out of luck",
        "killed": "killed stopped: killed by signal 9",
    }


def test_ratio_above_one_means_ours_is_better():
    entry = _bench.result("x", "time", "s", 2.0, {"a": 8.0, "b": 6.0}, limit=0.5, versions={})
    assert entry["best_peer"] == "b" and entry["ratio"] == 3.0 and entry["share_of_limit"] == 0.25
    json.dumps(entry)


def test_peers_by_name():
    known = ["fp32 eager", "bf16 eager", "bf16 grouped_mm"]
    assert _bench.wanted("none", known) == []
    assert _bench.wanted("all", known) == known
    assert _bench.wanted("bf16", known) == known[1:]
    assert _bench.wanted("fp32 eager, grouped", known) == [known[0], known[2]]
    with pytest.raises(SystemExit, match="no peer matches"):
        _bench.wanted("vllm", known)


def test_spread_and_table():
    assert _bench.spread([3.0, 1.0, 2.0], 1) == "2.0 [1.0, 3.0]"
    assert _bench.table(["a", "b"], [["long", "x"]]) == "| a    | b |\n|------|---|\n| long | x |"
