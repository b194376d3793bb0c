"""Killed at any moment, the same command goes on and ends with the same bits."""

from __future__ import annotations

import os
import pkgutil
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoestring.core.run import Run, runs_tree
from shoestring.data.traces import TraceStore
from shoestring.models import checkpoint
from shoestring.models.dense import Dense, DenseConfig
from shoestring.recipes import quickstart
from shoestring.road import STAGES, resolve_recipe, run_recipe
from shoestring.text.tokenizer import Tokenizer
from shoestring.train import step as step_module
from shoestring.train.configs import Compute, Decoding, EvalStage, Recipe, TaskMix

KILLED_IN = ("teacher-pretrain", "teacher-sft", "teacher-rl", "teacher-more-sft", "student-pretrain", "student-base",
             "ask", "student-distilled", "student-more-textbook", "student-rl", "eval-teacher-rl")  # fmt: skip


def _hashes(root: Path) -> dict[str, dict[str, str]]:
    """Stage -> file -> sha256, of everything that finished stages left (wall-clock costs are not outputs)."""
    found = {}
    for run in runs_tree(root):
        assert run.finished, run.name
        files = {o["path"].split("checkpoints/")[-1]: o["sha256"] for o in run.manifest["outputs"]}
        exact = (".safetensors", "result.json")
        found[run.manifest["stage"]] = {k: v for k, v in files.items() if k.endswith(exact)}
    return found


def _road(until: str) -> Recipe:
    whole = quickstart.recipe("smoke")
    names = [stage.name for stage in whole.stages]
    return whole.model_copy(update={"stages": whole.stages[: names.index(until) + 1], "report": {}})


class Killed(BaseException):
    """Stands for the death of the process: nothing but BaseException handlers may see it."""


@pytest.mark.timeout(400)
def test_a_stage_that_dies_between_checkpoints_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every update of pretraining, SFT and RL is once the one before which the process dies."""
    recipe = _road("teacher-rl")
    run_recipe(recipe, tmp_path / "whole", quiet=True)
    trains = step_module.train_step
    deaths = {"pretrain": [1, 2, 5, 9, 15], "sft": [1, 3, 5], "rl": [1, 2, 3]}  # at which of its updates, counted on

    def dying(kind: str) -> Callable[..., Any]:
        count = 0

        def step(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if deaths[kind] and count == deaths[kind][0]:
                deaths[kind].pop(0)
                raise Killed
            return trains(*args, **options)

        return step

    for kind in deaths:
        monkeypatch.setattr(f"shoestring.train.{kind}.train_step", dying(kind))
    for _ in range(15):
        try:
            run_recipe(recipe, tmp_path / "killed", quiet=True)
            break
        except Killed:
            continue
    assert not any(deaths.values()), deaths
    whole = _hashes(tmp_path / "whole")
    assert whole["teacher-rl"]["step_000003/model.safetensors"] != whole["teacher-sft"]["step_000004/model.safetensors"]
    assert _hashes(tmp_path / "killed") == _hashes(tmp_path / "whole")
    for run in runs_tree(tmp_path / "killed"):
        steps = [row["step"] for row in run.metrics()]
        assert steps == sorted(set(steps)), run.name  # no step is told twice


@pytest.mark.parametrize("dies_in", ["shoestring.train.evaluate.append_line", "shoestring.core.run.Run.metric"])
def test_an_evaluation_that_dies_while_a_batch_is_kept(
    dies_in: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its two files was not written, the rows end as those of a run that nothing happened to."""
    config = DenseConfig(
        model_type="qwen2", vocab_size=tokenizer.vocab_size, hidden_size=24, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = checkpoint.save(Dense(config), tokenizer, tmp_path / "model")
    stage = EvalStage(
        name="exam", inputs={"model": str(model)}, problems=4, samples=2, rows_per_batch=2,
        mix=(TaskMix(task="questions", kinds=("sum",), difficulty=(2, 3)),), decoding=Decoding(max_new_tokens=6),
        compute=Compute(dtype="float32"),
    )  # fmt: skip
    recipe, calls = Recipe(name="x", stages=(stage,)), 0
    whole = run_recipe(recipe, tmp_path / "whole", quiet=True).runs["exam"]
    does = pkgutil.resolve_name(dies_in.replace(".Run.", ":Run."))

    def dying(*args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        does(*args, **options)

    monkeypatch.setattr(dies_in, dying)
    with pytest.raises(Killed):
        run_recipe(recipe, tmp_path / "killed", quiet=True)
    killed = run_recipe(recipe, tmp_path / "killed", quiet=True).runs["exam"]
    assert killed.metrics() == whole.metrics() and len(whole.metrics()) == 4
    assert _hashes(tmp_path / "killed") == _hashes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_inside_every_stage_ends_with_the_same_bits(tmp_path: Path) -> None:
    def start(root: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "shoestring.cli", "run", "quickstart", "--set", "size=smoke", "--quiet"]
        return subprocess.Popen([*command, "--runs", str(root)], env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert start(tmp_path / "whole").wait() == 0
    killed_in = []
    for stage in KILLED_IN:
        process = start(tmp_path / "killed")
        while process.poll() is None:
            if any((tmp_path / "killed").glob(f"{stage}-quickstart-smoke-*/metrics.jsonl")):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        process.wait()
        left = {run.manifest["stage"]: run for run in runs_tree(tmp_path / "killed")}
        if stage in left and not left[stage].finished:  # the shortest may have ended before the signal came
            killed_in.append(stage)
    assert start(tmp_path / "killed").wait() == 0
    assert len(killed_in) >= len(KILLED_IN) - 2, "the road ran ahead of the killer"
    assert _hashes(tmp_path / "killed") == _hashes(tmp_path / "whole")
    attempts = [run.manifest["attempts"] for run in runs_tree(tmp_path / "killed")]
    assert sum(attempts) >= len(attempts) + len(killed_in)
    assert isinstance(runs_tree(tmp_path / "killed")[0], Run)


EVERY_STAGE = Path(__file__).with_name("every_stage.py")
# What a stage leaves when it is in its middle; every other kind writes metrics. These two write at their end alone.
MIDDLE = {"capture": "store/shard-00002.bin", "tokenizer": "logs/attempt_001.json", "prune": "logs/attempt_001.json"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_inside_every_kind_of_stage_ends_with_the_same_bits(tmp_path: Path) -> None:
    """In its middle, and again at a moment drawn at random after the next beginning."""

    def start(root: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "shoestring.cli", "run", str(EVERY_STAGE), "--quiet", "--runs", str(root)]
        return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)

    def kill_once(stage: str, mark: str, rows: int, wait: float) -> bool:
        """Start, and kill `wait` seconds after the stage has a file `mark` with so many lines. Whether that was within
        the stage: a short one may have ended before the signal came."""
        process, until = start(tmp_path / "killed"), time.monotonic() + 200
        while process.poll() is None and time.monotonic() < until:
            found = next((tmp_path / "killed").glob(f"{stage}-every-stage-*/{mark}"), None)
            if found is not None and (rows == 0 or found.read_bytes().count(b"\n") >= rows):
                time.sleep(wait)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        if process.wait() != -signal.SIGKILL:
            return False
        return any(run.manifest["stage"] == stage and not run.finished for run in runs_tree(tmp_path / "killed"))

    recipe, draw = resolve_recipe(str(EVERY_STAGE), []), random.Random(5)
    assert {stage.stage for stage in recipe.stages} == set(STAGES)
    assert start(tmp_path / "whole").wait() == 0
    killed: dict[str, int] = {}
    for stage in recipe.stages:
        mark = MIDDLE.get(stage.stage, "metrics.jsonl")
        killed[stage.name] = kill_once(stage.name, mark, 4 if mark == "metrics.jsonl" else 0, draw.random() * 0.02)
        killed[stage.name] += kill_once(stage.name, "logs/attempt_002.json", 0, draw.random() * 0.1)
    assert start(tmp_path / "killed").wait() == 0
    left = {run.manifest["stage"]: run for run in runs_tree(tmp_path / "killed")}
    assert all(killed.values()) and sum(killed.values()) >= 2 * len(killed) - 2, killed
    assert all(left[name].manifest["attempts"] > count for name, count in killed.items())
    assert _hashes(tmp_path / "killed") == _hashes(tmp_path / "whole")
    for run in runs_tree(tmp_path / "whole"):
        other = left[run.manifest["stage"]]
        assert other.metrics() == run.metrics(), run.name
        if (run.path / "traces.db").exists():
            assert TraceStore(other.path).digest() == TraceStore(run.path).digest()
        for path in (run.path / "store").glob("*"):
            assert (other.path / "store" / path.name).read_bytes() == path.read_bytes(), path
        if run.manifest["stage"] not in ("reject", "ask", "capture-topk"):
            continue
        cost = run.manifest["cost"], other.manifest["cost"]
        assert cost[0]["flops"] == cost[1]["flops"] and cost[0]["tokens"] == cost[1]["tokens"]
