"""What goes into distillation and does not fit: stores, traces of another template, rows that are no tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distilling import COMPUTE, run_stage, stage_of, trace_of

from shoestring.core.errors import UserError
from shoestring.core.nouns import Message
from shoestring.data.textbook import problems
from shoestring.models import checkpoint
from shoestring.recipes import quickstart
from shoestring.text.chat import render
from shoestring.text.tokenizer import Tokenizer
from shoestring.train import distill_checks
from shoestring.train.configs import CaptureStage, Decoding
from shoestring.train.on_policy import OnPolicyLesson

SHORT = Decoding(max_new_tokens=12)


def test_draws_of_a_teacher_serve_forward_kl_only(student: Path, folder: Path, traces: Path, tmp_path: Path) -> None:
    capture = CaptureStage(name="logits", inputs={"teacher": str(folder), "traces": str(traces)}, row_tokens=192,
                           compute=COMPUTE, kind="sampled", k=8)  # fmt: skip
    inputs = {"traces": traces, "logits": run_stage(capture, tmp_path / "runs").path}
    stage = stage_of(student, way="offline", divergence="reverse_kl", inputs=inputs)
    with pytest.raises(UserError, match="unbiased for forward_kl only"):
        run_stage(stage, tmp_path / "runs")


def test_traces_that_were_asked_in_another_template(tmp_path: Path, folder: Path) -> None:
    """They carry ids of the student's own tokenizer, so those would be learnt as they stand."""
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.chat_template is not None
    problem = next(problems(quickstart.LEARN, 5))
    asked = render([Message("user", problem.prompt)], tokenizer, generation_prompt=True).ids
    source: Any = SimpleNamespace(name="ask-mine", manifest={"facts": {"tokenizer": tokenizer.digest()}})
    ctx: Any = SimpleNamespace(run=SimpleNamespace(name="distilled"), inputs={"traces": source})
    traces = [trace_of(0, problem, prompt_ids=asked)]
    distill_checks.check_template(ctx, traces, tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|user|>'", "'<|user|> '")
    with pytest.raises(UserError, match="traces of ask-mine were asked in another chat template than the student's"):
        distill_checks.check_template(ctx, traces, tokenizer)
    source.manifest["facts"]["tokenizer"] = "another"  # their ids are not used: the text is rendered anew
    distill_checks.check_template(ctx, traces, tokenizer)


def test_rows_beyond_the_tokenizer_are_never_written(
    student: Path, folder: Path, traces: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    model, tokenizer = checkpoint.load(student)
    assert tokenizer is not None and model.config.vocab_size > tokenizer.vocab_size
    with torch.no_grad():  # unbanned, they would be all that it says
        model.head_weight[tokenizer.vocab_size :] = 50 * model.head_weight[tokenizer.vocab_size :]
    loud = checkpoint.save(model, tokenizer, tmp_path / "loud")
    real, written = OnPolicyLesson._example, []

    def watched(self: Any, prompt: list[int], completion: Any) -> Any:
        written.extend(completion.token_ids)
        return real(self, prompt, completion)

    monkeypatch.setattr(OnPolicyLesson, "_example", watched)
    run_stage(stage_of(loud, way="on_policy", inputs={"traces": traces, "teacher": folder}, decoding=SHORT, steps=1),
              tmp_path / "runs")  # fmt: skip
    assert written and max(written) < tokenizer.vocab_size
