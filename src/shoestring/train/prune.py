"""Prune: a student made of the most important parts of a larger model, measured on text it will have to know.

Forward passes only; what comes out needs distilling (way=forward_kl from the unpruned model) before it is of use. Text
that importance was not measured on says what was lost: next-token loss of both models, with standard errors over its
pieces. Source: Minitron (arXiv 2407.14679); see models/_prune.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from shoestring.core.errors import UserError
from shoestring.data.batch import Example, packed_batch, packed_batches
from shoestring.data.corpus import file_documents
from shoestring.models import checkpoint
from shoestring.models._prune import check_sizes, importance, kept_layers, prune
from shoestring.nn.head import token_logprobs
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import PruneStage
from shoestring.train.context import Context, Outcome
from shoestring.train.distill_checks import kept_examples
from shoestring.train.state import load_model, use_kernels
from shoestring.train.step import flat_tokens, scoring_flops

SHORTEST = 8  # tokens of a piece of text


def run(stage: PruneStage, ctx: Context) -> Outcome:
    """Measure importance, write the small model as checkpoint 0, and compare both on what was held out."""
    model, tokenizer = load_model(ctx, "model")
    check_sizes(model, **stage.kept())
    use_kernels(model, ctx, stage.compute, tokens=stage.tokens_per_microbatch, seq_len=stage.row_tokens)
    some, held = split(_examples(stage, ctx, tokenizer), stage, ctx)
    batches = packed_batches(some, row_tokens=stage.row_tokens, tokens_per_microbatch=stage.tokens_per_microbatch,
                             pad_id=tokenizer.pad)  # fmt: skip
    moved = [batch.to(model.embedding.device) for batch in batches]
    found = importance(model, ((b.tokens_BT, b.positions_BT, b.segments_BT) for b in moved))
    small = prune(model, found, **stage.kept())
    small.to(model.embedding.device)
    folder = ctx.run.begin_checkpoint(0)
    checkpoint.save(small, tokenizer, folder)
    path = ctx.run.commit_checkpoint(0)
    large, left = (m.config.shape().params().total for m in (model, small))
    sums = [losses(m, held, stage, tokenizer) for m in (model, small)]
    before, after, rise = (_mean(each, held) for each in (*sums, sums[1] - sums[0]))
    ctx.run.note(
        parameters=left, parameters_before=large, layers_kept=kept_layers(found, stage.layers),
        layer_scores=found.layers_L.sqrt().tolist(), held_out=len(held), loss_before=before, loss=after, rise=rise,
    )  # fmt: skip
    tokens = sum(len(example.ids) for example in (*some, *held, *held))
    flops = scoring_flops(model, (len(e.ids) for e in (*some, *held))) + scoring_flops(
        small, (len(e.ids) for e in held)
    )
    metric = {"name": f"held-out loss with {left / large:.0%} of the parameters", **after}
    return Outcome([path], metric, tokens, flops, train_flops=flops)


def _examples(stage: PruneStage, ctx: Context, tokenizer: Tokenizer) -> list[Example]:
    """Kept answers, or pieces of `row_tokens` of the corpus: four times as many as are needed, at most."""
    if stage.corpus is None:
        return kept_examples(ctx, tokenizer)[1]
    return list(islice(_pieces(stage, tokenizer), 4 * (stage.examples + stage.held_out)))


def _pieces(stage: PruneStage, tokenizer: Tokenizer) -> Iterator[Example]:
    assert stage.corpus is not None
    for text in file_documents(stage.corpus.files):
        ids = [*tokenizer.encode(text), *([] if tokenizer.end_id is None else [tokenizer.end_id])]
        for start in range(0, len(ids), stage.row_tokens):
            piece = ids[start : start + stage.row_tokens]
            if len(piece) >= SHORTEST:
                yield Example(piece, [1.0] * len(piece))


def split(every: Sequence[Example], stage: PruneStage, ctx: Context) -> tuple[list[Example], list[Example]]:
    """(what importance is measured on, what is held out), in a seeded order. Of too little text a fifth is held out.

    Raises UserError when there are fewer than four pieces.
    """
    if len(every) < 4:
        raise UserError(
            f"{ctx.run.name}: the text has {len(every)} pieces of at most {stage.row_tokens} tokens, and pruning needs "
            "four; give more text, or lower row_tokens."
        )
    order = [every[i] for i in np.random.default_rng(stage.seed).permutation(len(every))]
    held = min(stage.held_out, max(2, len(order) // 5))
    return order[held : held + stage.examples], order[:held]


@torch.no_grad()
def losses(model: Any, examples: Sequence[Example], stage: PruneStage, tokenizer: Tokenizer) -> np.ndarray:
    """The sum of next-token losses of each example, in nats. Raises UserError where one is longer than a row."""
    per = max(1, stage.tokens_per_microbatch // stage.row_tokens)
    sums: list[float] = []
    for start in range(0, len(examples), per):
        some = examples[start : start + per]
        batch = packed_batch(some, [[i] for i in range(len(some))], max(len(e.ids) for e in some), tokenizer.pad)
        batch = batch.to(model.embedding.device)
        tokens, keep_N = flat_tokens(batch)
        out = model(batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT, logits=False)
        head_VD = model.head_weight[: tokenizer.vocab_size]
        logp_N, _ = token_logprobs(out.hidden_BTD.flatten(0, 1)[keep_N], head_VD, tokens.ids_N)
        row_N = (keep_N // batch.tokens_BT.shape[1]).cpu().numpy()
        sums += np.bincount(row_N, -logp_N.double().cpu().numpy(), minlength=len(some)).tolist()
    return np.asarray(sums)


def _mean(sums: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
    """Nats a token and the standard error of that ratio, over the pieces of text."""
    counts = np.asarray([sum(w != 0 for w in example.weight[1:]) for example in examples], float)
    value = sums.sum() / counts.sum()
    pieces = len(sums)
    spread = ((sums - value * counts) ** 2).sum() * pieces / (pieces - 1)
    return {"value": float(value), "stderr": float(spread**0.5 / counts.sum())}
