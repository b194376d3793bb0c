"""Pretraining: next-token (and MTP) loss over a stream of documents, from nothing or from a checkpoint.

Source: DeepSeek-V3 section 4.1 (a stream cut into rows, without a cross-sample mask), 2.2 (MTP), 2.1.2 (bias
balancing). With `isolate` rows hold whole documents that do not see each other: short documents that
repeat the same labels are learnt far faster so (LOG.md, entry 1). Left out: FIM, batch-size ramp, EMA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from shoestring.core.registry import part_hash
from shoestring.data.batch import Batch, Example, packed_batches, stream_batch
from shoestring.data.corpus import documents_of, file_documents, make_stream, rows, textbook_ids
from shoestring.losses import next_token
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import PretrainStage, Textbook
from shoestring.train.context import Context, Outcome, derived_seed
from shoestring.train.examples import examples_of_step
from shoestring.train.loop import Budget, finish_training, record
from shoestring.train.state import load_model, make_model, save_training, start_or_resume, use_kernels
from shoestring.train.step import train_step


def run(stage: PretrainStage, ctx: Context) -> Outcome:
    """Train to the budget, a checkpoint every `checkpoint_every` steps."""

    def fresh() -> tuple[Any, Tokenizer]:
        if stage.model is None:
            return load_model(ctx, "model")
        tokenizer = Tokenizer.load(ctx.checkpoint_of("tokenizer"))
        return make_model(stage.model, vocab_size=tokenizer.vocab_size, seed=stage.seed), tokenizer

    state, tokenizer = start_or_resume(ctx, stage, fresh)
    use_kernels(state.model, ctx, stage.compute, tokens=stage.tokens_per_microbatch, seq_len=stage.row_tokens)
    stream = corpus_stream(stage, ctx, tokenizer)
    batches_of = _reader(stage, stream, tokenizer)
    budget = Budget.of(stage, ctx)

    with ctx.progress(budget.total, unit=budget.unit) as bar:
        while (spent := budget.spent(state)) < 1.0:
            batches = batches_of(state.step)
            stats = train_step(state, batches, next_token.loss, stage, progress=spent)
            record(ctx, state, stats)
            bar.update(budget.done(state), tokens=state.tokens, loss=stats.loss)
            if state.step % stage.checkpoint_every == 0:
                save_training(ctx, state, tokenizer)
    return finish_training(ctx, state, tokenizer)


def _reader(stage: PretrainStage, stream: np.ndarray, tokenizer: Tokenizer) -> Callable[[int], list[Batch]]:
    """The micro-batches of an update, as a function of its number: rows of the stream, or whole documents packed."""
    seed = derived_seed(stage.seed, 1)
    if not stage.isolate:
        count = max(1, stage.tokens_per_step // stage.row_tokens)
        per = max(1, stage.tokens_per_microbatch // stage.row_tokens)

        def cut(step: int) -> list[Batch]:
            rows_BT = rows(stream, step, rows_per_step=count, row_tokens=stage.row_tokens, seed=seed)
            return [stream_batch(rows_BT[i : i + per]) for i in range(0, count, per)]

        return cut
    spans = documents_of(stream, tokenizer.end)
    per_step = max(1, round(stage.tokens_per_step * len(spans) / len(stream)))

    def packed(step: int) -> list[Batch]:
        chosen = (spans[i] for i in examples_of_step(len(spans), step, per_step, seed))
        examples = [Example(stream[a:b].tolist(), [1.0] * int(b - a)) for a, b in chosen]
        return packed_batches(examples, row_tokens=stage.row_tokens, pad_id=tokenizer.pad,
                              tokens_per_microbatch=stage.tokens_per_microbatch)  # fmt: skip

    return packed


def corpus_stream(stage: PretrainStage, ctx: Context, tokenizer: Tokenizer) -> np.ndarray:
    """The stage's token stream, shared through `runs/data` by every stage that reads the same corpus."""
    corpus = stage.corpus
    key: dict[str, object] = {
        "corpus": corpus.to_json(), "seed": stage.corpus_seed, "tokenizer": tokenizer.digest(),
        "data": ctx.run.manifest["data"],
    }  # fmt: skip
    if isinstance(corpus, Textbook):
        key["tasks"] = {entry.task: part_hash("tasks", entry.task) for entry in corpus.mix}
        documents = textbook_ids(corpus.mix, corpus.long_share, stage.corpus_seed, tokenizer)
    else:
        end = tokenizer.end
        documents = ([*tokenizer.encode(text), end] for text in file_documents(corpus.files))
    return make_stream(ctx.run.path.parent / "data", key, documents, stage.corpus_tokens)
