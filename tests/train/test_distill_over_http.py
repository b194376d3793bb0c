"""The second half of the road, end to end, as its users walk it: a teacher behind an API, and a student that learns.

serve -> ask (over HTTP) -> curate -> distill -> eval -> export -> transformers. Teacher and student are trained
here, on sums of two to four digits; the teacher works them out, the student has only ever seen bare answers.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.cli import main
from shoestring.core.nouns import Message, Sampling
from shoestring.core.run import Run
from shoestring.data.textbook import distinct_problems
from shoestring.data.traces import TraceStore
from shoestring.evals.paired import compare
from shoestring.infer.engine import Engine
from shoestring.models import checkpoint
from shoestring.recipes import quickstart
from shoestring.road import run_recipe
from shoestring.text.chat import render
from shoestring.train.configs import Compute, Optim, PretrainStage, Recipe, SftStage, TaskMix, Textbook, TokenizerStage

ROOT = Path(__file__).resolve().parents[2]
MIX = (TaskMix(task="questions", kinds=("sum",), difficulty=(1, 3)),)
COMPUTE = Compute(dtype="float32", experts="bmm", threads=1)


def _grown(root: Path) -> dict[str, Run]:
    """A teacher that works sums out, and a student that says digits."""
    worked, bare = (Textbook(mix=MIX, long_share=share) for share in (1.0, 0.0))
    reading: dict[str, Any] = {
        "model": quickstart.STUDENT, "inputs": {"tokenizer": "tokenizer"}, "corpus_tokens": 200_000, "row_tokens": 128,
        "isolate": True, "tokens_per_step": 2048, "compute": COMPUTE, "optim": Optim(kind="muon", lr=1e-2),
        "checkpoint_every": 1000,
    }  # fmt: skip
    telling: dict[str, Any] = {
        "problems": 600, "row_tokens": 128, "examples_per_step": 32, "compute": COMPUTE, "optim": Optim(lr=1e-3),
    }  # fmt: skip
    stages = (
        TokenizerStage(name="tokenizer", corpus=worked, vocab_size=400, documents=500),
        PretrainStage(name="teacher-read", corpus=worked, steps=130, **reading),
        SftStage(name="teacher", inputs={"model": "teacher-read"}, textbook=worked, steps=40, **telling),
        PretrainStage(name="student-read", corpus=bare, steps=40, **reading),
        SftStage(name="student", inputs={"model": "student-read"}, textbook=bare, steps=20, **telling),
    )
    return run_recipe(Recipe(name="grown", stages=stages), root, quiet=True).runs


@contextmanager
def _served(model: Path, folder: Path) -> Iterator[str]:
    """The address of `shoestring serve` over this checkpoint, in a process of its own."""
    command = [sys.executable, "-m", "shoestring.cli", "serve", f"teacher={model}", "--port", "0",
               "--store", str(folder / "keys.db")]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(2000):
                assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
                if found := re.search(r"^Serving on (\S+)$", (folder / "server.log").read_text(), re.MULTILINE):
                    break
                time.sleep(0.1)
            assert found, (folder / "server.log").read_text()[-2000:]
            yield found[1]
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _say(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """One verb of the command line, and the document it printed."""
    capsys.readouterr()
    code = main([*map(str, words), "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err[-2000:]
    return json.loads(said.out)


def _sets(**given: Any) -> list[str]:
    return [word for key, value in given.items() for word in ("--set", f"{key}={value}")]


def _examined(model: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    settings = _sets(mix=json.dumps([entry.to_dict() for entry in MIX]), problems=100, samples=1,
                     compute=json.dumps(COMPUTE.to_dict()), **{"decoding.max_new_tokens": 40})  # fmt: skip
    told = _say(capsys, "eval", "--from", f"model={model}", *settings, "--runs", runs, "--quiet")
    result: dict[str, Any] = json.loads((Path(told["runs"]["eval"]) / "result.json").read_text())
    return result


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_student_learns_over_http_and_leaves_with_its_papers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("fastapi")
    pytest.importorskip("aiohttp")
    runs = tmp_path / "runs"
    grown = _grown(runs)
    taught = grown["teacher"].latest_checkpoint()
    assert taught is not None

    questions, store, kept = tmp_path / "q.jsonl", tmp_path / "traces", tmp_path / "kept.jsonl"
    asked = distinct_problems(MIX, 7, 400)
    lines = [json.dumps({"question": p.prompt, "gold": p.gold, "task": p.task, "meta": p.meta}) for p in asked]
    questions.write_text("\n".join(lines) + "\n")
    with _served(taught[1], tmp_path) as address:
        told = _say(capsys, "ask", "--teacher", address, "--model", "teacher", "--questions", questions,
                    "--out", store, "--max-tokens", 40, "--temperature", 1, "--seed", 1, "--licence", "own model",
                    "--quiet")  # fmt: skip
    assert told["answered"] == len(asked) and told["failed"] == 0
    sieved = _say(capsys, "curate", store, "--filters", "finished,correct,dedup", "--export", kept, "--quiet")
    assert 0.5 * len(asked) < sieved["kept"] <= len(asked)
    assert all(trace.correct and trace.thinking for trace in TraceStore(kept).read())

    before = _examined(grown["student"].path, runs, capsys)
    settings = _sets(steps=150, row_tokens=128, examples_per_step=32, optim='{"kind": "muon", "lr": 0.01}',
                     compute=json.dumps(COMPUTE.to_dict()))  # fmt: skip
    made = _say(capsys, "distill", "--student", grown["student"].path, "--traces", kept, *settings, "--runs", runs,
                "--quiet")  # fmt: skip
    student = Path(made["runs"]["distill"])
    after = _examined(student, runs, capsys)
    scores = [{row["problem_id"]: row["correct"] / row["samples"] for row in result["rows"]}
              for result in (after, before)]  # fmt: skip
    gain = compare(*scores)
    assert gain.difference > 0.5 and gain.difference > 6 * gain.stderr, (before["overall"], after["overall"])

    out = tmp_path / "student"
    _say(capsys, "export", student, out, "--license", "mit", "--runs", runs)
    card = (out / "README.md").read_text()
    assert f"pass@1 | {after['overall']['pass@1']:.4g} ± " in card and "| own model |" in card
    ours, tokenizer = checkpoint.load(out)
    assert tokenizer is not None
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    prompts = [render([Message("user", p.prompt)], tokenizer, generation_prompt=True).ids
               for p in distinct_problems(MIX, 8, 8, split="test")]  # fmt: skip
    greedy = Engine(ours, tokenizer).generate(prompts, Sampling(temperature=0.0, max_new_tokens=40))
    # the export tells `generate` where an answer ends: nothing is passed to it but a length
    for prompt, (completion,) in zip(prompts, greedy, strict=True):
        wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
        assert completion.token_ids == wanted and completion.finish_reason == "stop"
