"""Lessons across tokenizers: one answer, written in the student's tokens and in each teacher's, aligned by its bytes.

Each side reads the question in its own template; only thinking and answer are aligned, whatever the templates write
around them, and end token with end token. For
`universal_logit` the distributions are compared where a group of tokens begins, for there both have read the same text;
for `span_likelihood` every group is a span. With several teachers a group is one text for all of them. Left out: hybrid
matching of shared tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.data.batch import Batch, Example, packed_batches
from shoestring.losses._several import Several
from shoestring.losses._targets import Targets
from shoestring.losses._teacher import Hidden, Spans
from shoestring.nn.head import token_logprobs
from shoestring.text.align import Group, align_pieces, bytes_of_tokens
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import DistillStage
from shoestring.train.context import Context, derived_seed
from shoestring.train.examples import examples_of_step, trace_example, trace_examples
from shoestring.train.state import load_frozen
from shoestring.train.step import TrainState, flat_tokens, scoring_flops


class _Teacher:
    """One teacher, its tokens, and what it said of the step's groups."""

    def __init__(self, stage: DistillStage, ctx: Context, role: str, student: Any):
        self.stage = stage
        self.model, self.tokenizer = load_frozen(
            ctx, role, stage.compute, tokens=stage.tokens_per_microbatch, seq_len=stage.row_tokens
        )
        self.spelling = bytes_of_tokens(self.tokenizer)
        self.head_VC = self.model.head_weight[: self.tokenizer.vocab_size]

    @torch.no_grad()
    def listen(self, asked: Sequence[Example], count: int) -> Tensor:
        """By group: its hidden state where the group begins [groups, C], or its log-probability of it [groups]."""
        whole = self.stage.way == "span_likelihood"
        shape = (count,) if whole else (count, self.head_VC.shape[1])
        table = torch.zeros(shape, dtype=torch.float32 if whole else self.model.kernels.torch_dtype)
        capacity = max(self.stage.row_tokens, max(len(e.ids) for e in asked))
        for batch in packed_batches(asked, row_tokens=capacity, pad_id=self.tokenizer.pad,
                                    tokens_per_microbatch=self.stage.tokens_per_microbatch):  # fmt: skip
            batch = batch.to(self.head_VC.device)
            tokens, keep_N = flat_tokens(batch)
            out = self.model(batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT,
                             logits=False)  # fmt: skip
            hidden_NC = out.hidden_BTD.flatten(0, 1)[keep_N]
            if not torch.isfinite(hidden_NC).all():
                raise UserError("the teacher gives NaN or infinite logits on these traces: its weights are broken.")
            assert batch.entry_BT is not None
            entry_N = batch.entry_BT.flatten()[keep_N]
            if whole:
                logp_N, _ = token_logprobs(
                    hidden_NC, self.head_VC, tokens.ids_N, temperature=self.stage.temperature,
                    softcap=self.model.softcap,
                )  # fmt: skip
                table.index_add_(0, entry_N.cpu(), logp_N.cpu().float())
            else:
                table[entry_N.cpu()] = hidden_NC.cpu()
        return table


class AcrossLesson:
    """Teachers' kept answers, and what each teacher says of them in its own tokens."""

    def __init__(self, stage: DistillStage, ctx: Context, student: Any, tokenizer: Tokenizer):
        self.stage = stage
        self.teachers = [_Teacher(stage, ctx, role, student) for role in stage.teachers]
        traces, _ = trace_examples(ctx, tokenizer)
        ctx.run.note(teachers=sorted({t.teacher for t in traces}), licences=sorted({t.licence for t in traces}))
        sides = [(tokenizer, bytes_of_tokens(tokenizer)), *((t.tokenizer, t.spelling) for t in self.teachers)]
        self.read = 0.0
        self.pairs = [pair for trace in traces if (pair := _pair(trace, sides)) is not None]
        lost = len(traces) - len(self.pairs)
        ctx.run.note(unaligned=lost)
        if 2 * lost >= len(traces):
            raise UserError(
                f"{ctx.run.name}: student and teacher write {lost} of {len(traces)} answers as different text (their "
                "tokenizers or chat templates change it), so their tokens cannot be aligned; give both the same "
                "template for answers."
            )
        self.tables: list[Tensor] = []

    def examples(self, state: TrainState) -> tuple[list[Example], dict[str, float]]:
        """The examples of the next update; each teacher reads its own version of them now."""
        stage = self.stage
        chosen = examples_of_step(len(self.pairs), state.step, stage.examples_per_step, derived_seed(stage.seed, 2))
        number, made = 0, []
        for i in chosen:
            versions, groups = self.pairs[i]
            made.append(_numbered(versions, groups, number, whole=stage.way == "span_likelihood"))
            number += len(groups)
        ours, *asked = zip(*made, strict=True)
        self.tables = [t.listen(version, number) for t, version in zip(self.teachers, asked, strict=True)]
        self.read = sum(
            scoring_flops(t.model, (len(e.ids) for e in version))
            for t, version in zip(self.teachers, asked, strict=True)
        )
        return list(ours), {"groups": float(number)}

    def teach(self, batch: Batch) -> None:
        """What the teachers say of the batch's groups: for spans the weighted mean of their log-probabilities, whose
        gradient is that of the weighted squares; for distributions the weighted sum of the distances from each."""
        assert batch.entry_BT is not None
        entry_N = batch.entry_BT.flatten()[flat_tokens(batch)[1]]
        shares = self.stage.shares
        if self.stage.way == "span_likelihood":
            said_N = torch.stack([share * t[entry_N] for share, t in zip(shares, self.tables, strict=True)]).sum(0)
            batch.teacher = Spans(entry_N, said_N)
            return
        said: list[Targets] = [
            Hidden(table[entry_N], t.model.head_weight, t.tokenizer.vocab_size, t.model.softcap)
            for t, table in zip(self.teachers, self.tables, strict=True)
        ]
        batch.teacher = said[0] if len(said) == 1 else Several(said, shares, "divergences")

    def flops(self, examples: Sequence[Example]) -> float:
        """Of the teachers' reading of their own versions of them."""
        return self.read


def _pair(trace: Trace, sides: Sequence[tuple[Tokenizer, list[bytes]]]) -> tuple[list[Example], list[Group]] | None:
    """The trace in every tokenization, the student's first, and the groups by place in each; None without any."""
    versions = [trace_example(trace, tokenizer, exact=False) for tokenizer, _ in sides]
    said = [[place for place, weight in enumerate(version.weight) if weight] for version in versions]
    if not all(said):
        raise UserError(f"trace {trace.id} holds no answer; curate the traces, for one with `correct`.")
    pieces = [text.strip().encode() for text in (trace.thinking or "", trace.answer) if text.strip()]
    spelt = [[table[v.ids[p]] for p in places] for v, places, (_, table) in zip(versions, said, sides, strict=True)]
    groups, covered, behind = align_pieces(pieces, *spelt)
    if not covered:
        return None
    ends = [
        [n for n in range(start, len(places)) if v.ids[places[n]] == tokenizer.end_id]
        for v, places, start, (tokenizer, _) in zip(versions, said, behind, sides, strict=True)
    ]
    if len({bool(found) for found in ends}) > 1:
        raise UserError("one chat template does not end an answer with its eos_token; give both one that does.")
    if all(ends):
        groups.append(tuple(range(found[0], found[0] + 1) for found in ends))
    return versions, [
        tuple(range(places[g.start], places[g.stop - 1] + 1) for g, places in zip(group, said, strict=True))
        for group in groups
    ]


def _numbered(versions: Sequence[Example], groups: Sequence[Group], first: int, *, whole: bool) -> list[Example]:
    """The versions with weight on what is compared, every token of a group or where it begins, and its number there."""
    found = []
    for side, version in enumerate(versions):
        entry, weight = [0] * len(version.ids), [0.0] * len(version.ids)
        for number, group in enumerate(groups, first):
            for place in group[side] if whole else group[side][:1]:
                entry[place], weight[place] = number, 1.0
        found.append(Example(version.ids, weight, entry=entry))
    return found
