"""What is checked before a student learns: memory, traces, templates, vocabularies. One sentence each, with the mend.

The mismatches named here (another end token, another template, padded vocabularies) do not fail by themselves: they
train, and the student's answers run on or collapse (facts: distillation section 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoestring.core.errors import UserError
from shoestring.core.nouns import Message, Trace
from shoestring.cost.shape import ModelShape
from shoestring.data.batch import Example
from shoestring.models._counted import config_shape
from shoestring.text.chat import render
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import DistillStage
from shoestring.train.context import Context
from shoestring.train.examples import trace_examples

WEIGHTS, GRADIENT, MOMENTS = 4, 4, {"adamw": 8, "muon": 4}  # bytes a parameter, fp32
PROBE = (Message("user", "2 + 2 ?"), Message("assistant", "4", thinking="2 + 2 is 4"))


def kept_examples(ctx: Context, tokenizer: Tokenizer) -> tuple[list[Trace], list[Example]]:
    """Traces with their examples. Raises UserError when there are none, or when answers are empty."""
    traces, examples = trace_examples(ctx, tokenizer)
    end = tokenizer.end_id

    def says_nothing(example: Example) -> bool:
        return all(i == end for i, w in zip(example.ids, example.weight, strict=True) if w)

    empty = [trace for trace, example in zip(traces, examples, strict=True) if says_nothing(example)]
    if empty:
        raise UserError(
            f"{ctx.run.name}: {len(empty)} of {len(traces)} traces hold no answer (the first: {empty[0].id}); leave "
            "them out by the filter `finished`, in `shoestring curate` or in the curate=[...] of the stage that asks."
        )
    return traces, examples


def check_template(ctx: Context, traces: Sequence[Trace], tokenizer: Tokenizer) -> None:
    """Traces that carry ids of this tokenizer must have been asked in this template. Raises UserError."""
    source = ctx.inputs["traces"]
    if isinstance(source, Path) or source.manifest["facts"].get("tokenizer") != tokenizer.digest():
        return  # foreign ids are never used: the text is rendered anew
    for trace in traces[:8]:
        asked = [Message(m["role"], m["content"]) for m in trace.messages]
        if trace.prompt_ids and render(asked, tokenizer, generation_prompt=True).ids != trace.prompt_ids:
            raise UserError(
                f"{ctx.run.name}: the traces of {source.name} were asked in another chat template than the student's; "
                "give the student the teacher's chat_template.jinja, or ask again."
            )


def check_fit(
    ctx: Context, student: Any, tokenizer: Tokenizer, teacher: Any, teachers: Tokenizer, role: str = "teacher"
) -> None:
    """Vocabulary, template and end token of student and teacher must agree before logits are compared."""
    who = f"{ctx.run.name}: student and {role}"
    if tokenizer.vocabulary != teachers.vocabulary:
        raise UserError(
            f"{who} have different vocabularies ({tokenizer.vocab_size} and {teachers.vocab_size} tokens), so their "
            "logits cannot be compared; use way=universal_logit or way=span_likelihood, or way=text."
        )
    tokenizer.check_vocab(student.config.vocab_size)
    teachers.check_vocab(teacher.config.vocab_size)
    if tokenizer.end_id != teachers.end_id:
        raise UserError(
            f"{who} end a turn with different tokens (ids {tokenizer.end_id} and {teachers.end_id}); set the same "
            "eos_token in both tokenizer_config.json, or answers will not end."
        )
    if tokenizer.chat_template != teachers.chat_template:
        ours, theirs = (_rendered(t) for t in (tokenizer, teachers))
        if ours != theirs:
            raise UserError(
                f"{who} have different chat templates; copy one chat_template.jinja over the other, or the teacher "
                "judges text in a form it was not trained on."
            )


def _rendered(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    return render(PROBE, tokenizer).ids, render(PROBE[:1], tokenizer, generation_prompt=True).ids


def matched_layers(stage: DistillStage, ctx: Context) -> list[tuple[int, int]]:
    """The pairs (student's layer, teacher's) of `hidden_states`. Raises UserError for a layer that is not there."""
    assert stage.hidden_states is not None
    ours, theirs = (_shape(ctx, role).layers for role in ("model", "teacher"))
    if ours > theirs and not stage.hidden_states.layers:
        raise UserError(
            f"{ctx.run.name}: the student has more layers ({ours}) than the teacher ({theirs}); say which match: "
            "hidden_states.layers=[[0, 0], ...]."
        )
    given = stage.hidden_states.layers or [(i, (i + 1) * theirs // ours - 1) for i in range(ours)]
    for pair in given:
        for who, layer, there in zip(("student", "teacher"), pair, (ours, theirs), strict=True):
            if not 0 <= layer < there:
                raise UserError(
                    f"{ctx.run.name}: hidden_states.layers names layer {layer} of the {who}, whose layers are 0 to "
                    f"{there - 1}."
                )
    return list(given)


def widths(ctx: Context) -> tuple[int, int]:
    """Of the student and of the teacher."""
    return _shape(ctx, "model").d_model, _shape(ctx, "teacher").d_model


# ---- memory -------------------------------------------------------------------------------------------------------


def available_bytes() -> float:
    """Memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo names no MemAvailable")


def token_bytes(shape: ModelShape) -> float:
    """Activations a token of a micro-batch needs: about 34 numbers of the width a layer, in fp32."""
    return 4.0 * 34 * shape.d_model * shape.layers


def check_memory(stage: DistillStage, ctx: Context, available: float | None = None) -> None:
    """Say before loading that student and teacher will not fit, and the largest setting that does. Raises UserError."""
    if stage.compute.device != "cpu" or not Path("/proc/meminfo").exists():
        return
    available = available_bytes() if available is None else available
    student = _shape(ctx, "model")
    count = student.params().total
    teacher = WEIGHTS * sum(_shape(ctx, role).params().total for role in stage.teachers)
    fixed = (WEIGHTS + GRADIENT + MOMENTS[stage.optim.kind]) * count + teacher
    need = fixed + token_bytes(student) * stage.tokens_per_microbatch
    if need <= available:
        return
    raise UserError(
        f"{ctx.run.name}: a student of {count / 1e6:,.0f}M parameters needs about {need / 1e9:,.1f} GB to train and "
        f"{available / 1e9:,.1f} GB are free; {_mend(stage, count, student, teacher, fixed, available)}."
    )


def _mend(
    stage: DistillStage, count: float, student: ModelShape, teacher: float, fixed: float, available: float
) -> str:  # fmt: skip
    room = int((available - fixed) / token_bytes(student))
    if room >= stage.row_tokens:
        return f"the largest setting that fits is tokens_per_microbatch={room // 8 * 8}"
    muon = (WEIGHTS + GRADIENT + MOMENTS["muon"]) * count + teacher + token_bytes(student) * stage.row_tokens
    if stage.optim.kind == "adamw" and muon <= available:
        return f"the largest setting that fits is optim.kind=muon with tokens_per_microbatch={stage.row_tokens}"
    if teacher and (WEIGHTS + GRADIENT + MOMENTS[stage.optim.kind]) * count < available:
        return "it fits without the teacher beside it: capture its logits first and use way=offline"
    most = available / (WEIGHTS + GRADIENT + MOMENTS["muon"]) / 1e6
    return f"take a student of at most about {most:,.0f}M parameters"


def _shape(ctx: Context, role: str) -> ModelShape:
    return config_shape(ctx.checkpoint_of(role))
