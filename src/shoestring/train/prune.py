"""Prune: a student made of the most important parts of a larger model, measured on the answers it will learn from.

Forward passes only; what comes out needs distilling (way=forward_kl from the unpruned model) before it is of use.
Source: Minitron (arXiv 2407.14679); see models/_prune.py.
"""

from __future__ import annotations

from shoestring.data.batch import packed_batches
from shoestring.models import checkpoint
from shoestring.models._prune import importance, prune
from shoestring.train.configs import PruneStage
from shoestring.train.context import Context, Outcome
from shoestring.train.distill_checks import kept_examples
from shoestring.train.state import load_model, use_kernels
from shoestring.train.step import scoring_flops


def run(stage: PruneStage, ctx: Context) -> Outcome:
    """Measure importance on the first `examples` traces and write the small model as checkpoint 0."""
    model, tokenizer = load_model(ctx, "model")
    use_kernels(model, ctx, stage.compute, tokens=stage.tokens_per_microbatch, seq_len=stage.row_tokens)
    _, examples = kept_examples(ctx, tokenizer)
    some = examples[: stage.examples]
    batches = packed_batches(some, row_tokens=stage.row_tokens, tokens_per_microbatch=stage.tokens_per_microbatch,
                             pad_id=tokenizer.pad)  # fmt: skip
    moved = [batch.to(model.head_weight.device) for batch in batches]
    found = importance(model, ((b.tokens_BT, b.positions_BT, b.segments_BT) for b in moved))
    small = prune(model, found, layers=stage.layers, hidden=stage.hidden, ffn=stage.ffn, experts=stage.experts)
    folder = ctx.run.begin_checkpoint(0)
    checkpoint.save(small, tokenizer, folder)
    path = ctx.run.commit_checkpoint(0)
    large, left = (m.config.shape().params().total for m in (model, small))
    ctx.run.note(parameters=left, parameters_before=large, layer_scores=found.layers_L.sqrt().tolist())
    tokens = sum(len(example.ids) for example in some)
    flops = scoring_flops(model, (len(example.ids) for example in some))
    metric = {"name": "share of parameters kept", "value": left / large, "stderr": None}
    return Outcome([path], metric, tokens, flops, train_flops=flops)
