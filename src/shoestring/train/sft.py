"""Supervised fine-tuning: next-token loss on the completion only, examples packed with isolation.

Source: DeepSeek-V3 section 5.1. The data are the textbook rendered as chat (cold start, controls, gold solutions) or
an input of traces (rejection sampling). Left out: several turns, tools.
"""

from __future__ import annotations

from shoestring.data.batch import Example, packed_batches
from shoestring.losses import next_token
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import SftStage
from shoestring.train.context import Context, Outcome, derived_seed
from shoestring.train.examples import examples_of_step, textbook_examples, trace_examples
from shoestring.train.loop import Budget, finish_training, record
from shoestring.train.state import load_model, save_training, start_or_resume, use_kernels
from shoestring.train.step import train_step


def run(stage: SftStage, ctx: Context) -> Outcome:
    """Train to the budget, a checkpoint every `checkpoint_every` steps."""
    state, tokenizer = start_or_resume(ctx, stage, lambda: load_model(ctx, "model"))
    use_kernels(state.model, ctx, stage.compute, tokens=stage.tokens_per_microbatch, seq_len=stage.row_tokens)
    examples = _examples(stage, ctx, tokenizer)
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


def _examples(stage: SftStage, ctx: Context, tokenizer: Tokenizer) -> list[Example]:
    if stage.textbook is not None:
        seed = derived_seed(stage.seed, 3)
        return textbook_examples(stage.textbook.mix, stage.textbook.long_share, seed, stage.problems, tokenizer)
    return trace_examples(ctx, tokenizer)[1]
