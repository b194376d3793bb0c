"""Rejection sampling: the policy answers, and what the grader verifies is kept as traces for SFT.

Source: R1 (arXiv 2501.12948) section 2.3.3. At most `keep_per_problem` answers of a problem are kept, the first
ones in sampling order: keeping the shortest or longest would teach a length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from shoestring.core.nouns import Trace
from shoestring.infer.generator import generator_of
from shoestring.teachers.engine import EngineTeacher
from shoestring.train.answering import ask_all, curation
from shoestring.train.configs import RejectStage
from shoestring.train.context import Context, Outcome
from shoestring.train.state import load_model, use_kernels
from shoestring.train.step import sampling_flops


def run(stage: RejectStage, ctx: Context) -> Outcome:
    """Sample, verify, keep; traces.db is the output."""
    model, tokenizer = load_model(ctx, "model")
    use_kernels(model, ctx, stage.compute, tokens=stage.problems_per_batch * 64, seq_len=64)
    teacher = EngineTeacher(generator_of(model, tokenizer), tokenizer, name="self", licence="own model")
    curated = curation(stage.curate)

    def keep(traces: Sequence[Trace]) -> list[Trace]:
        taken: Counter[str | None] = Counter()
        kept = []
        for trace in curated(traces):
            taken[trace.problem_id] += 1
            if taken[trace.problem_id] <= stage.keep_per_problem:
                kept.append(trace)
        return kept

    ctx.run.note(tokenizer=tokenizer.digest())
    return ask_all(stage, ctx, teacher, keep, partial(sampling_flops, model))
