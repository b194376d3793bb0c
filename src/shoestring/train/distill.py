"""Distillation on text: a student learns from a teacher's verified answers, next-token loss on the completion only.

Source: R1 (arXiv 2501.12948) section 2.4: SFT alone, on the teacher's kept samples. The traces' licences travel into
the manifest. Left out here: logits, on-policy (their losses take the place of `next_token.loss` below).
"""

from __future__ import annotations

from shoestring.data.batch import packed_batches
from shoestring.losses import next_token
from shoestring.train.configs import DistillStage
from shoestring.train.context import Context, Outcome, derived_seed
from shoestring.train.examples import examples_of_step, trace_examples
from shoestring.train.loop import Budget, finish_training, record
from shoestring.train.state import load_model, save_training, start_or_resume, use_kernels
from shoestring.train.step import train_step


def run(stage: DistillStage, ctx: Context) -> Outcome:
    """Train the student to the budget, a checkpoint every `checkpoint_every` steps."""
    state, tokenizer = start_or_resume(ctx, stage, lambda: load_model(ctx, "model"))
    use_kernels(state.model, ctx, stage.compute, tokens=stage.tokens_per_microbatch, seq_len=stage.row_tokens)
    traces, examples = trace_examples(ctx, tokenizer)
    ctx.run.note(teachers=sorted({t.teacher for t in traces}), licences=sorted({t.licence for t in traces}))
    budget = Budget.of(stage, ctx)
    order_seed = derived_seed(stage.seed, 2)
    with ctx.progress(budget.total, unit=budget.unit) as bar:
        while (spent := budget.spent(state)) < 1.0:
            chosen = examples_of_step(len(examples), state.step, stage.examples_per_step, order_seed)
            batches = packed_batches([examples[i] for i in chosen], row_tokens=stage.row_tokens,
                                     tokens_per_microbatch=stage.tokens_per_microbatch,
                                     pad_id=tokenizer.pad)  # fmt: skip
            stats = train_step(state, batches, next_token.loss, stage, progress=spent)
            record(ctx, state, stats)
            bar.update(budget.done(state), tokens=state.tokens, loss=stats.loss)
            if state.step % stage.checkpoint_every == 0:
                save_training(ctx, state, tokenizer)
    return finish_training(ctx, state, tokenizer)
