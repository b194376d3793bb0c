"""The run directory: names, resuming, what a finished run refuses, attempts and the two totals."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from shoestring.core import again, host, ledger, manifest
from shoestring.core.config import Config
from shoestring.core.errors import UserError
from shoestring.core.lock import locked
from shoestring.core.metrics import Metrics
from shoestring.core.run import Run, runs_tree, totals


class Stage(Config):
    steps: int = 3


@pytest.fixture
def opened(tmp_path):
    def make(stage="sft", config=None, **kwargs):
        return Run.open(tmp_path, stage=stage, recipe="r", config=config or Stage(), **kwargs)

    return make


def finish(run, **cost):
    with run.attempt():
        run.finish(outputs=[], headline_metric={"name": "loss", "value": 1.0, "stderr": None}, cost=cost)
    return run


def test_the_manifest_is_there_from_the_start(opened):
    run = opened(data={"corpus": "abc"}, seed=7)
    made = json.loads((run.path / "manifest.json").read_text())
    assert made == run.manifest
    assert made["name"] == run.path.name == f"sft-r-{run.digest}"
    assert (made["status"], made["attempts"], made["seed"], made["data"]) == ("started", 0, 7, {"corpus": "abc"})
    assert set(made["host"]) == {"cpu", "cores", "memory_gb", "os"}
    assert made["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert json.loads((run.path / "config.json").read_text()) == {"steps": 3} == run.config


def test_the_digest_is_of_config_parents_data_and_seed(opened):
    runs = [
        opened(),
        opened(config=Stage(steps=4)),
        opened(parents={"model": "a" * 12}),
        opened(parents={"teacher": "a" * 12}),
        opened(data={"corpus": "x"}),
        opened(seed=1),
    ]
    assert len({run.digest for run in runs}) == len(runs)
    assert opened().path == runs[0].path


def test_parents_are_named(opened):
    parent = finish(opened("pretrain"))
    child = opened(parents={"model": parent.digest, "else": "0" * 12})
    assert child.manifest["parents"] == {
        "model": {"name": parent.name, "digest": parent.digest},
        "else": {"name": None, "digest": "0" * 12},
    }


def test_an_attempt_that_fails_is_kept_and_gone_on_with(opened, tmp_path):
    run = opened()
    with pytest.raises(ZeroDivisionError) as caught, run.attempt(usd_per_hour=3600.0):
        run.metric(1, loss=2.0, tokens=10, flops=100.0)
        run.metric(2, loss=1.0, tokens=20, flops=200.0)
        raise ZeroDivisionError("oh")
    assert caught.value.__notes__ == [f"run directory: {run.path}"]
    assert run.manifest["status"] == "failed"
    assert run.manifest["error"] == "ZeroDivisionError: oh"
    assert 'raise ZeroDivisionError("oh")' in (run.path / "logs" / "attempt_001.txt").read_text()
    run = opened()
    with run.attempt():
        run.rewind_metrics(1)
        run.metric(2, loss=0.5, tokens=20, flops=200.0)
        run.finish(outputs=[], headline_metric=None, cost={"tokens": 20, "flops": 200.0, "seconds": 1.0, "usd": 0.25})
    failed, finished = ledger.read(tmp_path)
    assert (failed.status, failed.tokens, failed.flops, failed.attempt) == ("failed", 20, 200.0, 1)
    assert failed.usd == pytest.approx(failed.seconds)
    assert (finished.status, finished.tokens, finished.flops, finished.attempt) == ("finished", 10, 100.0, 2)
    expected = {"runs": 1, "seconds": 1.0, "tokens": 20, "sampled_tokens": 0, "flops": 200.0, "usd": 0.25}
    assert totals(tmp_path)["headline"] == expected
    assert totals(tmp_path)["everything"]["tokens"] == 30


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interrupted(opened, tmp_path, stop):
    run = opened()
    with pytest.raises(stop), run.attempt():
        raise stop
    assert run.manifest["status"] == "interrupted"
    with run.attempt():
        pass  # left without finishing
    assert run.manifest["status"] == "interrupted"
    assert [entry.status for entry in ledger.read(tmp_path)] == ["interrupted", "interrupted"]
    assert not list((run.path / "logs").glob("*.txt"))


def test_a_finished_run_is_never_edited(opened):
    run = opened()
    with run.attempt():
        (run.begin_checkpoint(1) / "w").write_bytes(b"weights")
        checkpoint = run.commit_checkpoint(1)
        run.finish(outputs=[checkpoint], headline_metric=None, cost={"usd": 1})
        for write in (
            lambda: run.metric(2, loss=1),
            lambda: run.note(x=1),
            lambda: run.save_samples("x", []),
            lambda: run.begin_checkpoint(2),
            lambda: run.finish(outputs=[], headline_metric=None, cost={}),
        ):
            with pytest.raises(RuntimeError, match="is finished"):
                write()
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="finished and is never edited; --again"), opened().attempt():
        pass
    assert opened().finished
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    (output,) = run.manifest["outputs"]
    weights = hashlib.sha256(b"weights").hexdigest()
    assert output == {"path": "checkpoints/step_000001/w", "bytes": 7, "sha256": weights}
    assert json.loads((run.path / "cost.json").read_text()) == {"usd": 1}


def test_a_failure_after_finishing_leaves_it_finished(opened, tmp_path):
    run = opened()
    with pytest.raises(ZeroDivisionError), run.attempt():
        run.finish(outputs=[], headline_metric=None, cost={})
        raise ZeroDivisionError
    assert Run.load(run.path).finished
    assert [entry.status for entry in ledger.read(tmp_path)] == ["finished"]


def test_reading_only(opened):
    run = Run.load(opened().path)
    with pytest.raises(RuntimeError, match="only open for reading"):
        run.metric(1, loss=1)
    run.manifest["facts"]["x"] = 1
    assert run.manifest["facts"] == {}


def test_again_makes_it_anew_beside_the_old(opened, tmp_path):
    first = finish(opened(), tokens=5)
    assert opened().path == first.path
    second = opened(again=True)
    assert second.name == f"{first.name}-2"
    assert opened().path == opened(again=True).path == second.path  # unfinished: gone on with
    finish(second, tokens=6)
    assert opened().path == second.path
    assert opened(again=True).name == f"{first.name}-3"
    assert totals(tmp_path)["headline"]["tokens"] == 6
    assert totals(tmp_path)["headline"]["runs"] == 1
    assert totals(tmp_path)["everything"]["tokens"] == 11


def test_a_road_asked_again_and_killed_goes_on(opened, tmp_path):
    def tick():
        moment = manifest.now()
        while manifest.now() <= moment:
            pass

    first = finish(opened())
    tick()
    moment = again.since(tmp_path, "road")
    tick()
    second = finish(opened(again=moment))
    assert second.name == f"{first.name}-2"
    # killed here, and the same command again
    assert again.since(tmp_path, "road") == moment
    assert opened(again=again.since(tmp_path, "road")).path == second.path
    again.through(tmp_path, "road")
    tick()
    assert opened(again=again.since(tmp_path, "road")).name == f"{first.name}-3"


def test_a_finished_run_of_other_code_says_so_and_is_kept(opened, monkeypatch, capsys):
    run = finish(opened())
    opened()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(host, "code_digest", lambda: "0" * 12)
    assert opened().path == run.path
    error = capsys.readouterr().err
    assert run.name in error
    assert "made by other code" in error
    assert error.count("\n") == 1
    assert "--again" in error


def test_resuming_with_other_code_is_recorded(opened, monkeypatch):
    run = opened()
    with run.attempt():
        pass
    before = run.manifest["code"]
    monkeypatch.setattr(host, "code_digest", lambda: "0" * 12)
    finish(opened())
    assert opened().manifest["facts"] == {"earlier_code": [before]}
    assert opened().manifest["code"] == "0" * 12


def test_a_torn_metrics_line_is_cut(opened):
    run = opened()
    with run.attempt():
        run.metric(1, loss=1.0)
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert [row["step"] for row in opened().metrics()] == [1]
    run = opened()
    with run.attempt():
        run.metric(2, loss=0.5)
    assert run.metrics() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    with run.attempt():
        run.rewind_metrics(1)
        run.metric(2, loss=0.25)
    assert run.metrics() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.25}]


def test_metrics_are_json_whatever_they_are_given(opened):
    run = opened()
    with run.attempt():
        run.metric(1, a=np.float32(0.5), b=float("nan"), c=float("inf"), d="text", e=np.int64(3))
    line = (run.path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "a": 0.5,
        "b": "nan",
        "c": "inf",
        "d": "text",
        "e": 3,
    }


def test_checkpoints_are_seen_when_committed_and_the_last_are_kept(opened):
    run = opened()
    with run.attempt():
        assert run.latest_checkpoint() is None
        for step in (9, 10, 100, 1_000_000):
            (run.begin_checkpoint(step) / "w").write_text(str(step))
            latest = run.latest_checkpoint()
            assert latest is None or latest[0] < step
            run.commit_checkpoint(step, keep_last=2 if step > 10 else None)
        assert run.latest_checkpoint() == (1_000_000, run.path / "checkpoints" / "step_1000000")
        assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["step_000100", "step_1000000"]
        (run.begin_checkpoint(100) / "w").write_text("redone")
        run.commit_checkpoint(100)
        assert (run.path / "checkpoints" / "step_000100" / "w").read_text() == "redone"
        abandoned = run.begin_checkpoint(7)
        (abandoned / "w").write_text("x")
        assert list(run.begin_checkpoint(7).iterdir()) == []


def test_notes_and_samples(opened):
    run = opened()
    with run.attempt():
        run.note(kernels="loop", sandbox="bwrap")
        run.note(threads=2)
        path = run.save_samples("before", [{"text": "é"}, {"text": "b"}])
    assert opened().manifest["facts"] == {"kernels": "loop", "threads": 2}
    assert opened().manifest["sandbox"] == "bwrap"
    assert path.read_text(encoding="utf-8") == '{"text": "é"}\n{"text": "b"}\n'


def test_a_missing_output_fails_the_attempt(opened, tmp_path):
    run = opened()
    with pytest.raises(FileNotFoundError, match="was not written"), run.attempt():
        run.finish(outputs=[tmp_path / "absent"], headline_metric=None, cost={})
    assert run.manifest["status"] == "failed"


def test_unknown_schemas_and_other_folders_are_refused(opened, tmp_path):
    run = opened()
    manifest.write(run.path, {**run.manifest, "schema": 99})
    with pytest.raises(UserError, match=r"has schema 99; this version of shoestring reads schema 1"):
        Run.load(run.path)
    (run.path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        Run.load(run.path)
    with pytest.raises(UserError, match="is not a run directory"):
        Run.load(tmp_path / "nothing")
    (tmp_path / "ledger.jsonl").write_text('{"schema": 99}\n')
    with pytest.raises(UserError, match="entry of schema 99"):
        ledger.read(tmp_path)


def test_controls_are_in_everything_and_not_in_the_headline(opened, tmp_path):
    finish(opened("pretrain"), tokens=100, usd=1.0)
    finish(opened("rl"), tokens=10, usd=0.5)
    finish(opened("eval", headline=False), tokens=1000, usd=2.0)
    assert totals(tmp_path)["headline"]["tokens"] == 110
    assert totals(tmp_path)["headline"]["usd"] == 1.5
    assert totals(tmp_path)["everything"]["tokens"] == 1110
    assert totals(tmp_path)["everything"]["usd"] == 3.5
    assert [run.manifest["stage"] for run in runs_tree(tmp_path)] == ["pretrain", "rl", "eval"]
    assert runs_tree(tmp_path / "nowhere") == []


def test_code_is_known_without_git(tmp_path):
    """In an installed package, even inside somebody else's checkout, there is no commit but there is a code digest."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    host.git_facts.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host, "_PACKAGE", tmp_path)
            assert host.git_facts() == (None, None)
    finally:
        host.git_facts.cache_clear()
    assert len(host.code_digest()) == 12


def test_core_loads_no_torch():
    modules = ", ".join(f"shoestring.core.{name}" for name in ("run", "progress", "parts", "ledger"))
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_who_opens_a_run_at_the_same_moment_finds_it(opened, monkeypatch):
    """Two processes that both saw no run yet: the second must not write the first one's manifest anew."""
    first = opened()
    with first.attempt():
        monkeypatch.setattr("shoestring.core.run.newest_run", lambda root, base: (None, 0))
        with pytest.MonkeyPatch.context() as patch:  # a lock is its process's own: in this one it would be given again
            patch.setattr("shoestring.core.run.locked", lambda path, what: contextlib.nullcontext())
            assert opened().manifest["attempts"] == 1
    assert json.loads((first.path / "manifest.json").read_text())["attempts"] == 1


def test_the_code_of_a_run_is_its_kernels_too(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "_PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("x = 1")
    found = []
    for text in ("int a;", "int b;"):
        (tmp_path / "a.c").write_text(text)
        found.append(host.code_digest.__wrapped__())
    assert len(set(found)) == 2


def test_a_ledger_of_something_else_is_said(tmp_path):
    for line, words in (("[1]", "no entry"), ('{"schema": 1, "run": "x"}', "reads schema 1")):
        (tmp_path / ledger.FILE).write_text(line + "\n")
        with pytest.raises(UserError, match=words):
            ledger.read(tmp_path)


def test_a_disk_without_locks_is_not_another_process(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("shoestring.core.lock.fcntl.lockf", refuse)
    with pytest.raises(UserError, match="cannot be locked"), locked(tmp_path / ".lock", "run x"):
        pass


def test_many_runs_are_counted_by_one_look_at_the_ledger(opened, tmp_path, monkeypatch):
    """And no metrics are read: a folder of hundreds of runs, failed ones among them, has its totals at once."""
    for number in range(3):
        finish(opened(f"good{number}"), tokens=10)
        with contextlib.suppress(ZeroDivisionError), opened(f"bad{number}").attempt() as run:
            run.metric(1, tokens=5)
            1 / 0  # noqa: B018
    reads, read = [], ledger.read
    monkeypatch.setattr(ledger, "read", lambda root: reads.append(root) or read(root))
    monkeypatch.setattr(Metrics, "rows", lambda _: pytest.fail("metrics were read"))
    found = runs_tree(tmp_path)
    assert totals(tmp_path, found) == totals(tmp_path) and len(reads) == 2
    assert totals(tmp_path)["everything"] | {"seconds": 0, "usd": 0} == {
        "attempts": 6, "seconds": 0, "tokens": 45, "sampled_tokens": 0, "flops": 0, "usd": 0,
    }  # fmt: skip
