"""Capture: one forward pass of the teacher over traces, and what it says at every answer token kept on disk.

The store (data/logits.py) is written in the order of the traces, a shard at a time; a killed capture goes on behind
its last whole shard. The tail's mass is taken from full fp32 logits here, never from rounded log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoestring.core.atomic import write_bytes
from shoestring.core.errors import UserError
from shoestring.data.batch import Example, packed_batch
from shoestring.data.logits import HEAD, LogitsWriter, Spec, hidden_records, pack_ids, sequence_key, topk_records
from shoestring.losses._fused import chunk_rows
from shoestring.train.configs import CaptureStage
from shoestring.train.context import Context, Outcome, step_generator
from shoestring.train.distill_checks import check_template, kept_examples
from shoestring.train.state import load_model, use_kernels
from shoestring.train.step import flat_tokens, scoring_flops


@torch.inference_mode()
def run(stage: CaptureStage, ctx: Context) -> Outcome:
    """Write the store; the headline number is its bytes a token, everything on disk counted."""
    model, tokenizer = load_model(ctx, "teacher")
    use_kernels(model, ctx, stage.compute, tokens=stage.tokens_per_microbatch, seq_len=stage.row_tokens)
    traces, examples = kept_examples(ctx, tokenizer)
    check_template(ctx, traces, tokenizer)
    ctx.run.note(
        tokenizer=tokenizer.digest(), teachers=sorted({t.teacher for t in traces} | {ctx.inputs["teacher"].name}),
        licences=sorted({t.licence for t in traces}),
    )  # fmt: skip
    vocab = tokenizer.vocab_size
    head_VC, constant = model.head_weight[:vocab], float(model.constant)
    k = head_VC.shape[1] - bool(constant) if stage.kind == "hidden" else stage.k
    if stage.kind == "topk" and k >= vocab:
        raise UserError(f"{ctx.run.name}: k is {k}, the vocabulary only {vocab}; set k below it, or use kind=hidden.")
    teacher = ctx.run.manifest["parents"]["teacher"]["digest"]
    spec = Spec(stage.kind, vocab, k, stage.temperature, teacher, tokenizer.digest(), stage.number)
    folder = ctx.run.path / "store"
    writer = LogitsWriter(folder, spec, shard_tokens=stage.shard_tokens)
    if stage.kind == "hidden" and not (folder / HEAD).exists():
        _save_head(head_VC, constant, model.softcap, folder)
    done = writer.sequences
    with ctx.progress(len(examples), unit="traces") as bar:
        for number, batch in _batches(examples, done, stage, ctx):
            for example, records in _captured(model, batch, number, spec, stage, tokenizer.pad):
                if number >= done:  # a batch cut by a kill is computed whole again, so that its bits are the same
                    writer.append(sequence_key(example.ids, example.weight), records)
                number += 1
                bar.update(number)
    writer.close()
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != HEAD)
    metric = {"name": "bytes a token", "value": size / max(1, writer.tokens), "stderr": None}
    tokens = sum(len(example.ids) for example in examples)
    flops = scoring_flops(model, (len(example.ids) for example in examples))
    return Outcome([folder], metric, tokens, flops, train_flops=flops)


def _batches(
    examples: Sequence[Example], done: int, stage: CaptureStage, ctx: Context
) -> Iterator[tuple[int, list[Example]]]:
    """(number of its first, examples) of each micro-batch that is not on disk whole."""
    per = max(1, stage.tokens_per_microbatch // stage.row_tokens)
    longest = max(len(example.ids) for example in examples)
    if longest > stage.row_tokens:
        raise UserError(f"{ctx.run.name}: a trace has {longest} tokens; set row_tokens to that or more.")
    for start in range(done // per * per, len(examples), per):
        yield start, list(examples[start : start + per])


def _captured(
    model: Any, examples: Sequence[Example], number: int, spec: Spec, stage: CaptureStage, pad: int
) -> Iterator[tuple[Example, np.ndarray]]:
    """Each example with the records of its target tokens."""
    capacity = max(len(example.ids) for example in examples)
    batch = packed_batch(examples, [[i] for i in range(len(examples))], capacity, pad)
    batch = batch.to(model.embedding.device)
    _, keep_N = flat_tokens(batch)
    out = model(batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT, logits=False)
    records = _records(model, out.hidden_BTD.flatten(0, 1)[keep_N], number, spec, stage)
    counts = [sum(w != 0 for w in example.weight[1:]) for example in examples]
    yield from zip(examples, np.split(records, np.cumsum(counts)[:-1]), strict=True)


def _records(model: Any, hidden_NC: Tensor, number: int, spec: Spec, stage: CaptureStage) -> np.ndarray:
    try:
        if spec.kind == "hidden":
            return hidden_records(spec, hidden_NC[:, : spec.k].float().cpu().numpy())
        generator = step_generator(stage.seed, 21, number)
        rows = chunk_rows(spec.vocab)
        return np.concatenate([_of_logits(model, chunk_nC, spec, generator) for chunk_nC in hidden_NC.split(rows)])
    except ValueError as error:
        raise UserError(
            f"traces from number {number} on: {error}; the teacher's weights are broken, or it needs "
            "compute.dtype=float32."
        ) from None


def _of_logits(model: Any, hidden_nC: Tensor, spec: Spec, generator: torch.Generator) -> np.ndarray:
    logits_nV = model.unembed(hidden_nC)[:, : spec.vocab].float() / spec.temperature
    if not torch.isfinite(logits_nV).all():
        raise ValueError("logits that are not finite")
    logp_nV = torch.log_softmax(logits_nV, dim=-1)
    if spec.kind == "sampled":
        ids_nK = torch.multinomial(logp_nV.exp().cpu(), spec.k, replacement=True, generator=generator)
        return pack_ids(ids_nK.sort(dim=1).values.numpy(), spec.bits)
    logp_nK, ids_nK = logp_nV.topk(spec.k, dim=1)
    tail_n = torch.logsumexp(logp_nV.scatter(1, ids_nK, float("-inf")), dim=1)
    return topk_records(spec, ids_nK.cpu().numpy(), logp_nK.cpu().numpy(), tail_n.cpu().numpy())


def _save_head(head_VC: Tensor, constant: float, softcap: float, folder: Any) -> None:
    """The table and what else makes logits of states: a bias (its last column, met by `constant`), a softcap."""
    from safetensors.torch import save

    head_VC = head_VC.detach().cpu()
    kept = {"head": (head_VC[:, :-1] if constant else head_VC).contiguous().clone()}
    if constant:
        kept["bias"] = head_VC[:, -1] * constant
    if softcap:
        kept["softcap"] = torch.tensor([softcap], dtype=torch.float64)
    write_bytes(folder / HEAD, save(kept))
