"""Ask a teacher new problems and keep the answers that curation lets through (Trace schema 1).

The teacher is a model of ours, asked in process; its answers carry exact token ids, the licence of its outputs and
what they cost. Source: R1 (arXiv 2501.12948) section 2.4.
"""

from __future__ import annotations

from functools import partial

from shoestring.infer.generator import generator_of
from shoestring.teachers.engine import EngineTeacher
from shoestring.train.answering import ask_all, curation
from shoestring.train.configs import AskStage
from shoestring.train.context import Context, Outcome
from shoestring.train.state import load_model, use_kernels
from shoestring.train.step import sampling_flops


def run(stage: AskStage, ctx: Context) -> Outcome:
    """Ask, verify, curate; traces.db is the output."""
    model, tokenizer = load_model(ctx, "teacher")
    use_kernels(model, ctx, stage.compute, tokens=stage.problems_per_batch * 64, seq_len=64)
    teacher = EngineTeacher(
        generator_of(model, tokenizer), tokenizer, name=ctx.inputs["teacher"].name, licence=stage.licence,
        usd_per_hour=ctx.usd_per_hour,
    )  # fmt: skip
    ctx.run.note(tokenizer=tokenizer.digest())
    return ask_all(stage, ctx, teacher, curation(stage.curate), partial(sampling_flops, model))
