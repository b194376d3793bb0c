"""Kill -9 at every system call that matters, in a forked child, and report what is left. Run by test_run_crash.py.

`python crash.py WHAT FOLDER` prints a JSON list with one entry for each point at which the child was killed (and one
for the child that came through): what the next process finds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from shoestring.core import ledger
from shoestring.core.config import Config
from shoestring.core.run import Run, totals


class Empty(Config):
    pass


def opened(root: Path) -> Run:
    return Run.open(root, stage="sft", recipe="r", config=Empty())


def checkpoint(run: Run, step: int) -> None:
    folder = run.begin_checkpoint(step)
    for name in ("a", "b"):
        (folder / name).write_text(f"{step} " * 1000)
    run.commit_checkpoint(step, keep_last=1)


class Deadly:
    """From `arm` on, the `point`-th call of fsync, replace or rmtree kills the process before it acts."""

    def __init__(self, point: int) -> None:
        self.left = point
        self.armed = False
        os.fsync, os.replace, shutil.rmtree = map(self.watched, (os.fsync, os.replace, shutil.rmtree))

    def watched(self, act):
        def call(*args, **kwargs):
            self.left -= self.armed
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*args, **kwargs)

        return call


def child(what: str, root: Path, point: int) -> None:
    deadly = Deadly(point)
    deadly.armed = what == "open"
    run = opened(root)
    with run.attempt():
        run.metric(1, loss=1.0, tokens=100, flops=1e3)
        checkpoint(run, 1)
        run.metric(2, loss=0.5, tokens=200, flops=2e3)
        deadly.armed = what in ("open", "checkpoint")
        checkpoint(run, 2)
        deadly.armed = what in ("open", "finish")
        finish(run)


def finish(run: Run) -> None:
    cost = {"tokens": 200, "flops": 2e3, "seconds": 1}
    run.finish(outputs=[run.latest_checkpoint()[1]], headline_metric=None, cost=cost)


def found(root: Path) -> dict:
    """What a new process finds, and whether it can go on to the end."""
    run = opened(root)
    latest = run.latest_checkpoint()
    first = {
        "finished": run.finished,
        "step": latest and latest[0],
        "whole": latest is None or all((latest[1] / name).read_text() == f"{latest[0]} " * 1000 for name in ("a", "b")),
    }
    if not run.finished:
        with run.attempt():
            start = latest[0] if latest else 0
            run.rewind_metrics(start)
            for step in range(start + 1, 3):
                run.metric(step, loss=1.0 / step, tokens=100 * step, flops=1e3 * step)
                checkpoint(run, step)
            finish(run)
    run = opened(root)
    leftovers = [path.name for path in root.rglob("*.tmp")]
    statuses = [entry.status for entry in ledger.read(root)]
    rows = [row["step"] for row in run.metrics()]
    checkpoints = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    return {
        **first,
        "end": run.finished,
        "leftovers": leftovers,
        "ledger": statuses,
        "rows": rows,
        "checkpoints": checkpoints,
        "totals": totals(root),
    }


def main(what: str, folder: Path) -> None:
    reports = []
    for point in range(200):
        root = folder / str(point)
        root.mkdir()
        pid = os.fork()
        if pid == 0:
            child(what, root, point)
            os._exit(0)
        killed = os.waitpid(pid, 0)[1] == signal.SIGKILL
        reports.append({"point": point, "killed": killed, **found(root)})
        if not killed:
            break
    print(json.dumps(reports))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
