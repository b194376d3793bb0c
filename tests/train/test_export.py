"""Export: a folder that transformers loads with the same tokens, its papers true, its flags inherited."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.cli import main
from shoestring.core.nouns import Sampling, Trace
from shoestring.core.run import Run
from shoestring.data.textbook import solved
from shoestring.data.traces import TraceStore
from shoestring.infer.engine import Engine
from shoestring.models import checkpoint
from shoestring.models.dense import Dense, DenseConfig
from shoestring.recipes import quickstart
from shoestring.road import run_recipe
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import Compute, Decoding, DistillStage, EvalStage, Optim, Recipe, TaskMix

COMPUTE = Compute(dtype="float32", experts="bmm")


def _traces(folder: Path, licence: str = "MIT", teacher: str = "some-teacher", **source: Any) -> Path:
    kept = []
    for number, (problem, voice) in enumerate(islice(solved(quickstart.LEARN, 5, 1.0), 6)):
        kept.append(Trace(
            id=f"t{number}", teacher=teacher, teacher_reported=teacher, source=source,
            messages=[{"role": "user", "content": problem.prompt}], thinking=problem.voices[voice].thinking,
            answer=problem.voices[voice].answer, prompt_ids=None, token_ids=None, finish_reason="stop",
            task=problem.task, problem_id=problem.id, correct=True, decoding={"sample": number}, licence=licence,
            usage={"prompt_tokens": 1, "completion_tokens": 1}, cost_usd=0.0, date="2026-01-01T00:00:00+00:00",
        ))  # fmt: skip
    TraceStore(folder).append(kept)
    return folder


@pytest.fixture
def student(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    config = DenseConfig(
        model_type="qwen2", vocab_size=tokenizer.vocab_size, hidden_size=24, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1,
    )  # fmt: skip
    folder = checkpoint.save(Dense(config, generator=torch.Generator().manual_seed(1)), tokenizer, tmp_path / "base")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    return folder


def _distilled(model: Path, traces: Path, root: Path, *, examined: bool = False) -> Run:
    stages: list[Any] = [DistillStage(
        name="distilled", inputs={"model": str(model), "traces": str(traces)}, steps=2, row_tokens=192,
        examples_per_step=4, compute=COMPUTE, optim=Optim(lr=1e-3),
    )]  # fmt: skip
    if examined:
        mix = (TaskMix(task="questions", kinds=("sum",), difficulty=(2, 3)),)
        stages.append(EvalStage(name="exam", inputs={"model": "distilled"}, mix=mix, problems=3, samples=2,
                                compute=COMPUTE, decoding=Decoding(max_new_tokens=6)))  # fmt: skip
    return run_recipe(Recipe(name="x", stages=tuple(stages)), root, quiet=True).runs["distilled"]


def _export(*words: str) -> int:
    return main(["export", *words])


def test_transformers_says_the_same_and_the_papers_are_true(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    runs, out = tmp_path / "runs", tmp_path / "out"
    run = _distilled(student, _traces(tmp_path / "traces"), runs, examined=True)
    assert _export(run.name, str(out), "--runs", str(runs), "--license", "mit") == 0
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "base_model: base" in card
    for words in ("some-teacher", "MIT", "6 answers", "apache-2.0", "± ", "(s.e.)", "| headline |", "| everything |",
                  "## Limits", run.name, "questions"):  # fmt: skip
        assert words in card, words
    ours, tokenizer = checkpoint.load(out)
    assert tokenizer is not None
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "last digit of 3 + 4 ?"}]
    prompt = theirs_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    got = Engine(ours, tokenizer).generate([prompt], Sampling(temperature=0.0, max_new_tokens=12))[0][0].token_ids
    assert got == wanted
    capsys.readouterr()
    bare = tmp_path / "bare"
    bare.mkdir()
    assert main(["provenance", str(bare)]) == 2
    assert "neither made by a run nor exported" in capsys.readouterr().err
    assert main(["provenance", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {(s["kind"], s["name"]) for s in told["sources"]} >= {("teacher", "some-teacher"), ("model", "base")}
    assert told["hindrances"] == []
    assert main(["provenance", run.name, "--runs", str(runs)]) == 0
    assert "nothing known stands in the way" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("licence", "source", "words"),
    [
        ("unknown", {}, "licence of the teacher some-teacher is unknown"),
        ("provider terms", {"terms": "yes"}, "forbid training competing models"),
    ],
)
def test_a_flag_travels_from_trace_to_student_to_export_and_on(
    licence: str, source: dict[str, Any], words: str, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _distilled(student, _traces(tmp_path / "traces", licence, **source), tmp_path / "runs")
    out = tmp_path / "out"
    assert _export(str(run.path), str(out)) == 2
    assert words in capsys.readouterr().err and not out.exists()
    assert _export(str(run.path), str(out), "--i-have-permission") == 0
    assert words in (out / "README.md").read_text() and "states to have permission" in (out / "README.md").read_text()
    assert json.loads((out / "provenance.json").read_text())["permission_stated"] is True
    # a student of the exported student inherits the flag, though its own traces are clean
    other = _distilled(out, _traces(tmp_path / "clean", teacher="another"), tmp_path / "others")
    assert _export(str(other.path), str(tmp_path / "second")) == 2
    assert words in capsys.readouterr().err


def test_mistakes(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _distilled(student, _traces(tmp_path / "traces"), tmp_path / "runs")
    (tmp_path / "there").mkdir()
    assert _export(str(run.path), str(tmp_path / "there")) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert _export("nowhere", str(tmp_path / "x")) == 2
    (student / "README.md").unlink()
    again = _distilled(student, tmp_path / "traces", tmp_path / "more")
    assert _export(str(again.path), str(tmp_path / "x")) == 2
    assert "licence of the model base is unknown" in capsys.readouterr().err


def test_push_uploads_the_folder(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says before any work what is no name, afterwards how to go on where the hub did not answer."""
    hub = pytest.importorskip("huggingface_hub")
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repo: str, **more: Any) -> None:
            calls.append((repo, more))

        def upload_folder(self, **given: Any) -> None:
            calls.append(("upload", given))

    monkeypatch.setattr(hub, "HfApi", Api)
    run = _distilled(student, _traces(tmp_path / "traces"), tmp_path / "runs")
    assert _export(str(run.path), str(tmp_path / "out"), "--push", "me/it", "--dtype", "bfloat16") == 0
    assert calls[1] == ("upload", {"repo_id": "me/it", "folder_path": str(tmp_path / "out")})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert _export(str(run.path), str(tmp_path / "b"), "--push", "not a repo!!") == 2
    assert "owner/name" in capsys.readouterr().err and not (tmp_path / "b").exists()
    monkeypatch.setattr(Api, "upload_folder", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("gone")))
    assert _export(str(run.path), str(tmp_path / "c"), "--push", "me/it") == 2
    assert f"hf upload me/it {tmp_path / 'c'}" in capsys.readouterr().err
