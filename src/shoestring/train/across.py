"""Lessons across tokenizers: one answer, written in the student's tokens and in the teacher's, aligned by its bytes.

Each side reads the question in its own template; only answers are aligned, end token to end token. For
`universal_logit` the distributions are compared where a group of tokens begins, for there both have read the same text;
for `span_likelihood` every group is a span. Left out: hybrid matching of shared tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.data.batch import Batch, Example, packed_batches
from shoestring.losses._teacher import Hidden, Spans
from shoestring.nn.head import token_logprobs
from shoestring.text.align import Group, align, bytes_of_tokens
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import DistillStage
from shoestring.train.context import Context, derived_seed
from shoestring.train.examples import examples_of_step, trace_example, trace_examples
from shoestring.train.state import freeze, load_model
from shoestring.train.step import TrainState, flat_tokens, scoring_flops


class AcrossLesson:
    """A teacher's kept answers, and what it says of them in its own tokens."""

    def __init__(self, stage: DistillStage, ctx: Context, student: Any, tokenizer: Tokenizer):
        self.stage = stage
        self.model, self.theirs = load_model(ctx, "teacher")
        self.model.to(student.head_weight.device)
        self.model.kernels = ctx.machine.kernels(
            self.model.config, stage.compute, tokens=stage.tokens_per_microbatch, seq_len=stage.row_tokens
        )
        freeze(self.model)
        traces, _ = trace_examples(ctx, tokenizer)
        ctx.run.note(teachers=sorted({t.teacher for t in traces}), licences=sorted({t.licence for t in traces}))
        self.spellings = bytes_of_tokens(tokenizer), bytes_of_tokens(self.theirs)
        self.read = 0.0
        self.pairs = [self._pair(trace, tokenizer) for trace in traces]
        self.table: Tensor = torch.empty(0)

    def _pair(self, trace: Trace, tokenizer: Tokenizer) -> tuple[Example, Example, list[Group]]:
        """The trace in both tokenizations with weights on what is compared, and the groups by place in each."""
        ours, theirs = (trace_example(trace, t, exact=False) for t in (tokenizer, self.theirs))
        sides = []
        for example, side in ((ours, tokenizer), (theirs, self.theirs)):
            said = [place for place, weight in enumerate(example.weight) if weight]
            ended = bool(said) and example.ids[said[-1]] == side.end_id
            sides.append((said, ended))
        (said, ended), (heard, stopped) = sides
        if not said or not heard:
            raise UserError(f"trace {trace.id} holds no answer; curate the traces, for one with `correct`.")
        if ended != stopped:
            raise UserError("one chat template does not end an answer with its eos_token; give both one that does.")
        cut = -1 if ended else None
        spelt, respelt = self.spellings
        groups = align([spelt[ours.ids[p]] for p in said[:cut]], [respelt[theirs.ids[p]] for p in heard[:cut]])
        if ended:
            groups.append((range(len(said) - 1, len(said)), range(len(heard) - 1, len(heard))))
        placed = [(range(said[a.start], said[a.stop - 1] + 1), range(heard[b.start], heard[b.stop - 1] + 1))
                  for a, b in groups]  # fmt: skip
        return ours, theirs, placed

    def examples(self, state: TrainState) -> tuple[list[Example], dict[str, float]]:
        """The examples of the next update; the teacher reads its own version of them now."""
        stage = self.stage
        chosen = examples_of_step(len(self.pairs), state.step, stage.examples_per_step, derived_seed(stage.seed, 2))
        pairs = [self.pairs[i] for i in chosen]
        whole = stage.way == "span_likelihood"
        made, asked, number = [], [], 0
        for ours, theirs, groups in pairs:
            entry, weight, heard = [0] * len(ours.ids), [0.0] * len(ours.ids), [0.0] * len(theirs.ids)
            asked_entry = [0] * len(theirs.ids)
            for group, their_group in groups:
                for place in group if whole else group[:1]:
                    entry[place], weight[place] = number, 1.0
                for place in their_group if whole else their_group[:1]:
                    heard[place], asked_entry[place] = 1.0, number
                number += 1
            made.append(Example(ours.ids, weight, entry=entry))
            asked.append(Example(theirs.ids, heard, entry=asked_entry))
        self.table = self._listen(asked, number)
        self.read = scoring_flops(self.model, (len(e.ids) for e in asked))
        return made, {"groups": float(number)}

    @torch.no_grad()
    def _listen(self, asked: Sequence[Example], count: int) -> Tensor:
        """By group: the teacher's hidden state where it begins [groups, C], or its log-probability [groups]."""
        whole = self.stage.way == "span_likelihood"
        head_VC = self.model.head_weight[: self.theirs.vocab_size]
        shape = (count,) if whole else (count, head_VC.shape[1])
        table = torch.zeros(shape, dtype=torch.float32 if whole else self.model.kernels.torch_dtype)
        capacity = max(self.stage.row_tokens, max(len(e.ids) for e in asked))
        for batch in packed_batches(asked, row_tokens=capacity, pad_id=self.theirs.pad,
                                    tokens_per_microbatch=self.stage.tokens_per_microbatch):  # fmt: skip
            batch = batch.to(head_VC.device)
            tokens, keep_N = flat_tokens(batch)
            out = self.model(batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT,
                             logits=False)  # fmt: skip
            hidden_NC = out.hidden_BTD.flatten(0, 1)[keep_N]
            if not torch.isfinite(hidden_NC).all():
                raise UserError("the teacher gives NaN or infinite logits on these traces: its weights are broken.")
            assert batch.entry_BT is not None
            entry_N = batch.entry_BT.flatten()[keep_N]
            if whole:
                logp_N, _ = token_logprobs(hidden_NC, head_VC, tokens.ids_N, temperature=self.stage.temperature)
                table.index_add_(0, entry_N.cpu(), logp_N.cpu().float())
            else:
                table[entry_N.cpu()] = hidden_NC.cpu()
        return table

    def teach(self, batch: Batch) -> None:
        assert batch.entry_BT is not None
        entry_N = batch.entry_BT.flatten()[flat_tokens(batch)[1]]
        rows = self.table[entry_N]
        head_VC, vocab = self.model.head_weight, self.theirs.vocab_size
        batch.teacher = Spans(entry_N, rows) if self.table.ndim == 1 else Hidden(rows, head_VC, vocab)

    def flops(self, examples: Sequence[Example]) -> float:
        """Of the teacher's reading of its own version of them."""
        return self.read
