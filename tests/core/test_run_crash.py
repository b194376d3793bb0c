"""kill -9 at any moment, and the same thing again: it goes on and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shoestring.core.errors import UserError
from shoestring.core.run import Run, totals

CRASH = Path(__file__).with_name("crash.py")


@pytest.mark.parametrize(("what", "least"), [("open", 20), ("checkpoint", 6), ("finish", 7)])
def test_killed_at_every_point(what, least, tmp_path):
    done = subprocess.run([sys.executable, CRASH, what, tmp_path], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    *killed, last = json.loads(done.stdout)
    assert len(killed) >= least
    assert not last["killed"]
    for report in [*killed, last]:
        assert report["whole"], report  # a checkpoint that is seen is complete
        assert report["end"], report
        assert report["leftovers"] == [], report
        assert report["rows"] == [1, 2], report
        assert report["checkpoints"] in (["step_000002"], ["step_000001", "step_000002"]), report
        assert report["ledger"][-1] == "finished", report
        assert report["totals"]["headline"]["tokens"] == 200, report
        assert report["totals"]["everything"]["tokens"] >= 200, report
    if what == "checkpoint":  # the old checkpoint stays until the new one is there
        assert {report["step"] for report in killed} == {1, 2}
        assert all(report["ledger"] == ["interrupted", "finished"] for report in killed)


def test_two_processes_cannot_work_on_one_run(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(CRASH.parent)!r})
from crash import *
with opened(Path({str(tmp_path)!r})).attempt() as run:
    run.metric(1, tokens=50)
    print("working", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "working\n"
        (folder,) = tmp_path.glob("sft-r-*")
        run = Run.load(folder)
        busy = rf"Another process \(pid {other.pid}\) is at work on run sft-r-"
        with pytest.raises(UserError, match=busy), run.attempt():
            pass
        assert totals(tmp_path)["everything"]["tokens"] == 50  # what is under way is already counted
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        other.stdout.close()
    with run.attempt():
        run.finish(outputs=[], headline_metric=None, cost={})
    assert Run.load(folder).finished
