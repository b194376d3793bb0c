"""Distillation: a student learns from a teacher's answers, from its logits (beside it or stored), or on its own text.

One loop for every way: what differs is who writes the step's examples and what the teacher says about them
(train/lessons.py), and which file of losses/ is minimised. Source: R1 (arXiv 2501.12948) section 2.4 for text, GKD
(arXiv 2306.13649) for on-policy and its mix.
"""

from __future__ import annotations

from typing import Any

from shoestring.data.batch import packed_batches
from shoestring.train.configs import DistillStage
from shoestring.train.context import Context, Outcome
from shoestring.train.distill_checks import check_memory, matched_layers, widths
from shoestring.train.lessons import make_lesson, make_objective
from shoestring.train.loop import Budget, finish_training, record
from shoestring.train.state import load_model, save_training, start_or_resume, use_kernels
from shoestring.train.states import attach, with_states
from shoestring.train.step import train_step


def run(stage: DistillStage, ctx: Context) -> Outcome:
    """Train the student to the budget, a checkpoint every `checkpoint_every` steps."""
    check_memory(stage, ctx)
    settings = stage.hidden_states
    pairs = matched_layers(stage, ctx) if settings is not None else []

    def adapt(model: Any) -> None:
        if settings is not None:
            attach(model, pairs, widths(ctx), stage.seed)

    state, tokenizer = start_or_resume(ctx, stage, lambda: load_model(ctx, "model"), adapt)
    use_kernels(state.model, ctx, stage.compute, tokens=stage.tokens_per_microbatch, seq_len=stage.row_tokens)
    lesson = make_lesson(stage, ctx, state, tokenizer)
    objective = make_objective(stage, vocab=tokenizer.vocab_size)
    if settings is not None:
        objective = with_states(objective, state.model, settings)
    budget = Budget.of(stage, ctx)
    with ctx.progress(budget.total, unit=budget.unit) as bar:
        while (spent := budget.spent(state)) < 1.0:
            examples, facts = lesson.examples(state)
            batches = packed_batches(examples, row_tokens=stage.row_tokens,
                                     tokens_per_microbatch=stage.tokens_per_microbatch,
                                     pad_id=tokenizer.pad)  # fmt: skip
            for batch in batches:
                lesson.teach(batch)
            state.flops += lesson.flops(examples)
            stats = train_step(state, batches, objective, stage, progress=spent)
            record(ctx, state, stats, **facts)
            bar.update(budget.done(state), tokens=state.spent()["tokens"], loss=stats.loss)
            if state.step % stage.checkpoint_every == 0:
                save_training(ctx, state, tokenizer)
    return finish_training(ctx, state, tokenizer)
