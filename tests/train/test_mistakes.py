"""Bad input to a stage: one sentence, nothing lost, and the same command goes on once it is mended."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoestring import cli
from shoestring.core.atomic import DiskFull
from shoestring.core.errors import UserError
from shoestring.core.run import Run, runs_tree
from shoestring.data.traces import TraceStore
from shoestring.models.deepseek import Deepseek
from shoestring.recipes import quickstart
from shoestring.road import run_recipe
from shoestring.tasks import questions
from shoestring.tasks.grading import Grader, check_golds
from shoestring.text.tokenizer import Tokenizer
from shoestring.train import sft
from shoestring.train.configs import (
    AskStage,
    Decoding,
    EvalStage,
    ModelSpec,
    Optim,
    PretrainStage,
    Recipe,
    RejectStage,
    RlStage,
    SftStage,
    Stage,
    TaskMix,
    Textbook,
)

BOOK = Textbook(mix=quickstart.LEARN[:1])
WISH = Path(__file__).with_name("wish.py")  # a reward that an untrained model earns now and then
QUESTIONS = (TaskMix(task="questions", kinds=("sum",), difficulty=(3, 4)),)


def road(model: Path, root: Path, **options: Any) -> Run:
    stage = SftStage(
        name="sft", inputs={"model": str(model)}, textbook=BOOK, problems=32, examples_per_step=4, steps=6,
        checkpoint_every=2, optim=Optim(lr=1e-3), compute=quickstart.COMPUTE, **options,
    )  # fmt: skip
    return run_recipe(Recipe(name="t", stages=(stage,)), root, quiet=True).runs["sft"]


def weights(run: Run) -> bytes:
    _, folder = run.latest_checkpoint() or (0, Path())
    return (folder / "model.safetensors").read_bytes()


# ---- what a stage is given ----------------------------------------------------------------------------------------


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(path: Path, by: int = 1000) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def other_tokenizer(folder: Path) -> None:
    Tokenizer.train(["all sorts of other words, " * 9, "0123456789 and more"], 480, split="words").save(folder)
    config = json.loads((folder / "config.json").read_text())
    shrunk = {"vocab_size": 200}
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.shape[0] == config["vocab_size"]:
            tensors[name] = tensor[:200].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | shrunk))


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: reweigh(f, lambda s: s.pop(NORM)), f"lacks {NORM}"),
    "extra": (lambda f: reweigh(f, lambda s: s.update(stray=torch.ones(2))), "stray"),
    "misshapen": (lambda f: reweigh(f, lambda s: s.update({NORM: torch.ones(7)})), "do not belong together"),
    "NaN": (lambda f: reweigh(f, lambda s: s[NORM].fill_(float("nan"))), "NaN or infinite"),
    "truncated": (lambda f: cut(f / "model.safetensors"), "damaged or cut short"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    "another tokenizer": (other_tokenizer, "but the model only 200; they do not belong together"),
    "an unreadable tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "is not a readable tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_model_that_cannot_be_used(folder: Path, tmp_path: Path, how: str, capsys: Any) -> None:
    """One sentence, exit code 2, no traceback; and the run it was begun with is there to be looked at."""
    damage, sentence = DAMAGES[how]
    damage(folder)
    words = ["sft", "--from", f"model={folder}", "--set", "steps=2", "--runs", str(tmp_path / "runs"), "--quiet"]
    assert cli.main(words) == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert sentence in first
    assert rest == [f"run directory: {runs_tree(tmp_path / 'runs')[0].path}"]
    assert runs_tree(tmp_path / "runs")[0].manifest["status"] == "failed"


# ---- what it goes on from -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """The death of the process."""


CORRUPT: dict[str, Callable[[Path], Any]] = {
    "weights cut short": lambda f: cut(f / "model.safetensors"),
    "optimiser cut short": lambda f: cut(f / "optimizer.safetensors"),
    "optimiser gone": lambda f: (f / "optimizer.safetensors").unlink(),
    "counters torn": lambda f: (f / "training.json").write_text('{"schema": 2, "st'),
    "counters of another step": lambda f: (f / "training.json").write_text(
        json.dumps({**json.loads((f / "training.json").read_text()), "step": 3})
    ),
    "counters of another version": lambda f: (f / "training.json").write_text('{"schema": 1}'),
}  # fmt: skip


@pytest.mark.parametrize("how", CORRUPT)
def test_a_damaged_checkpoint_of_its_own(folder: Path, tmp_path: Path, monkeypatch: Any, how: str) -> None:
    """It says which to delete; without it, it goes on from the one before and ends with the same bits."""
    whole, real, steps = road(folder, tmp_path / "whole"), sft.train_step, 0

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise Killed
        return real(*arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(sft, "train_step", dying)
        road(folder, tmp_path / "killed")
    last = runs_tree(tmp_path / "killed")[0].latest_checkpoint()
    assert last is not None and last[0] == 4
    CORRUPT[how](last[1])
    with pytest.raises(UserError) as error:
        road(folder, tmp_path / "killed")
    assert str(error.value).endswith(f"; delete {last[1]} to go on from the one before it.")
    assert "\n" not in str(error.value)
    subprocess.run(["rm", "-r", last[1]], check=True)
    assert weights(road(folder, tmp_path / "killed")) == weights(whole)


# ---- a disk that fills --------------------------------------------------------------------------------------------


@contextmanager
def disk(path: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """A file system of this size at `path`, and how to give it another. Needs root and mount(2)."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    path.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", path], capture_output=True
    ).returncode:
        pytest.skip("this system does not let root mount a tmpfs")

    def resize(to: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={to}k", path], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def asking(folder: Path, root: Path, kind: str) -> Run:
    values: dict[str, Any] = {
        "name": kind, "mix": QUESTIONS, "problems": 12, "samples": 2, "decoding": Decoding(max_new_tokens=8),
        "compute": quickstart.COMPUTE,
    }  # fmt: skip
    stage: Stage
    if kind == "ask":
        stage = AskStage(inputs={"teacher": str(folder)}, curate=("dedup",), problems_per_batch=3, **values)
    elif kind == "reject":
        stage = RejectStage(inputs={"model": str(folder)}, curate=("dedup",), problems_per_batch=3, **values)
    else:
        stage = EvalStage(inputs={"model": str(folder)}, rows_per_batch=6, **values)
    return run_recipe(Recipe(name="t", stages=(stage,)), root, quiet=True).runs[kind]


def training(folder: Path, root: Path, kind: str) -> Run:
    """Pretraining from nothing with its stream of tokens; RL with a reference, both with a checkpoint every 2 steps."""
    common: dict[str, Any] = {"name": kind, "steps": 6, "checkpoint_every": 2, "compute": quickstart.COMPUTE}
    stage: Stage
    if kind == "pretrain":
        config = quickstart.TEACHER.config | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        stage = PretrainStage(
            inputs={"tokenizer": str(folder)}, model=ModelSpec(family="deepseek", config=config), corpus=BOOK,
            corpus_tokens=20_000, row_tokens=64, tokens_per_step=512, mtp_lambda=0.3, optim=Optim(kind="muon", lr=1e-2),
            **common,
        )  # fmt: skip
    else:
        stage = RlStage(
            inputs={"model": str(folder)}, mix=QUESTIONS, rewards={str(WISH): 1.0}, problems_per_step=4, group_size=4,
            max_tries=1, preflight_problems=3, minimum_mixed=0.0, kl_beta=0.01, reference_every=3,
            decoding=Decoding(max_new_tokens=12), optim=Optim(lr=3e-3, warmup_steps=0), **common,
        )  # fmt: skip
    return run_recipe(Recipe(name="t", stages=(stage,)), root, quiet=True).runs[kind]


# what is run, and what of it must be the same as where there was space
ON_A_SMALL_DISK: dict[str, tuple[Callable[[Path, Path], Run], Callable[[Run], Any]]] = {
    "pretrain": (lambda folder, root: training(folder, root, "pretrain"), weights),
    "sft": (road, weights),
    "rl": (lambda folder, root: training(folder, root, "rl"), weights),
    "reject": (lambda folder, root: asking(folder, root, "reject"), lambda run: TraceStore(run.path).digest()),
    "ask": (lambda folder, root: asking(folder, root, "ask"), lambda run: TraceStore(run.path).digest()),
    "eval": (lambda folder, root: asking(folder, root, "eval"), lambda run: (run.path / "result.json").read_text()),
}


@pytest.mark.parametrize("kind", ON_A_SMALL_DISK)
def test_a_disk_that_fills_again_and_again(folder: Path, tmp_path: Path, kind: str) -> None:
    """Whatever is being written when it is full, the sentence is one, and with more space the run goes on."""
    run, left = ON_A_SMALL_DISK[kind]
    whole = run(folder, tmp_path / "whole")
    size, full, reached = 8, 0, set[int]()
    with disk(tmp_path / "disk", size) as resize:
        while True:
            try:
                made = run(folder, tmp_path / "disk" / "runs")
                break
            except DiskFull as error:
                assert "No space left on the disk of" in str(error) and "\n" not in str(error)
                full, size = full + 1, size + max(8, size // 3)
                reached |= {(run.latest_checkpoint() or (0, ""))[0] for run in runs_tree(tmp_path / "disk" / "runs")}
                resize(size)
        if kind in ("pretrain", "sft", "rl"):
            assert {0, 2} <= reached  # before its first checkpoint, and in the middle
        assert full >= 4 and left(made) == left(whole)
        assert [row["step"] for row in made.metrics()] == [row["step"] for row in whole.metrics()]


def test_a_full_disk_is_the_users_to_mend(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Exit code 2, one sentence and the run directory; the same command goes on once there is space."""
    with disk(tmp_path / "disk", 160) as resize:
        words = ["eval", "--from", f"model={folder}", "--set", "problems=2", "--set", "samples=1", "--quiet"]
        words += ["--set", "decoding.max_new_tokens=4", "--runs", str(tmp_path / "disk" / "runs")]
        rest = tmp_path / "disk" / "ballast"
        rest.write_bytes(bytes(132 * 1024))
        assert cli.main(words) == 2
        first, *more = capsys.readouterr().err.splitlines()
        assert first.startswith("No space left on the disk of ")
        assert first.endswith("free some and run the same command again; it goes on.")
        assert more == [f"run directory: {runs_tree(tmp_path / 'disk' / 'runs')[0].path}"]
        rest.unlink()
        resize(4000)
        assert cli.main(words) == 0
        (run,) = runs_tree(tmp_path / "disk" / "runs")
        assert run.finished and run.manifest["attempts"] == 2


# ---- a task whose gold is wrong -----------------------------------------------------------------------------------

WRONG = '''
"""A task that disagrees with itself."""
from shoestring.tasks import questions
from shoestring.tasks.questions import KINDS, VERSION
from dataclasses import replace

def make(seed, difficulty, split="train", kind=None):
    return replace(questions.make(seed, difficulty, split, kind), task="wrong", gold="none")

def grade(problems, answers, *, sandbox=None):
    return [answer.strip() == problem.voices["short"].answer for problem, answer in zip(problems, answers)]
'''


@pytest.mark.parametrize("verb", ["rl", "ask", "reject", "eval"])
def test_a_task_whose_gold_is_wrong(folder: Path, tmp_path: Path, verb: str, capsys: Any) -> None:
    """Said before anything is sampled, by every stage that grades."""
    mine = tmp_path / "wrong.py"
    mine.write_text(WRONG)
    role = "teacher" if verb == "ask" else "model"
    mix = json.dumps([{"task": str(mine)}])
    words = [verb, "--from", f"{role}={folder}", "--set", f"mix={mix}", "--runs", str(tmp_path / "runs"), "--quiet"]
    assert cli.main(words) == 2
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("task wrong grades its own gold 'none' as wrong (problem ")
    assert "check-part FILE --kind tasks" in first
    assert cli.main(["check-part", str(mine), "--kind", "tasks"]) == 1
    assert "grades its own gold" in capsys.readouterr().out


def test_golds_of_every_task_are_looked_at(model: Deepseek) -> None:
    made = [questions.make(seed, 3, "train", "sum") for seed in range(9)]
    seen: list[Any] = []

    def grade(pairs: Any) -> list[bool]:
        seen.extend(pairs)
        return [True] * len(pairs)

    check_golds(grade, made)
    assert seen == [(problem, problem.gold) for problem in made[:4]]
    with Grader() as real:
        check_golds(real, made)
        check_golds(real, [])
