"""`ask` with a teacher in this process, and with recorded answers: the same store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from asked import write_questions

from shoestring.cli import main
from shoestring.core.config import Config
from shoestring.core.run import Run
from shoestring.data.traces import TraceStore
from shoestring.models.checkpoint import save
from shoestring.models.dense import Dense, DenseConfig
from shoestring.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.train(["question 0 1 2 3 4 5 6 7 8 9 answer"], 300)
    config = DenseConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("local") / "teacher"
    save(Dense(config, generator=torch.Generator().manual_seed(0)), tokenizer, folder)
    return folder


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, int]:
    assert main(["ask", "--quiet", "--json", *arguments]) == 0
    found: dict[str, int] = json.loads(capsys.readouterr().out)
    return found


def test_a_checkpoint_and_its_recorded_answers(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_questions(tmp_path / "q.jsonl", [f"question {i}" for i in range(5)])
    base = ["--teacher", str(model), "--questions", str(tmp_path / "q.jsonl"), "--max-tokens", "4", "--out"]
    found = ask(capsys, *base, str(tmp_path / "a"), "--samples", "2", "--seed", "3")
    assert found["answered"] == found["answers_now"] == 10
    traces = TraceStore(tmp_path / "a").read()
    assert all(trace.token_ids and trace.prompt_ids and trace.licence == "own model" for trace in traces)
    assert [trace.decoding["sample"] for trace in traces] == [0, 1] * 5 and traces[0].problem_id == "0"
    assert ask(capsys, *base, str(tmp_path / "a"), "--samples", "3", "--seed", "3")["answers_now"] == 5
    again = ask(capsys, *base, str(tmp_path / "b"), "--samples", "2", "--seed", "3")
    assert again["answered"] == 10
    assert [t.token_ids for t in TraceStore(tmp_path / "b")] == [t.token_ids for t in traces]  # a seed repeats
    replayed = ask(capsys, "--teacher", str(tmp_path / "a"), "--questions", str(tmp_path / "q.jsonl"), "--out",
                   str(tmp_path / "c"))  # fmt: skip
    assert replayed["answered"] == 5
    assert [t.answer for t in TraceStore(tmp_path / "c")] == [t.answer for t in traces[::2]]


class Stage(Config):
    """Of a run that is only there to be asked."""

    steps: int = 1


def test_a_run_is_asked_by_its_last_checkpoint(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_questions(tmp_path / "q.jsonl", ["question 1", "question 2"])
    run = Run.open(tmp_path / "runs", stage="sft", recipe="r", config=Stage())
    line = ["--teacher", str(run.path), "--questions", str(tmp_path / "q.jsonl"), "--max-tokens", "4", "--seed", "3",
            "--out", str(tmp_path / "a")]  # fmt: skip
    assert main(["ask", "--quiet", *line]) == 2 and "is a run without a checkpoint" in capsys.readouterr().err
    with run.attempt():
        shutil.copytree(model, run.begin_checkpoint(7), dirs_exist_ok=True)
        run.commit_checkpoint(7)
    assert ask(capsys, *line)["answered"] == 2
    line[1], line[-1] = str(model), str(tmp_path / "b")
    assert ask(capsys, *line)["answered"] == 2
    one, other = (TraceStore(tmp_path / name).read() for name in "ab")
    assert [t.token_ids for t in one] == [t.token_ids for t in other] and one[0].teacher == str(run.path)
