"""Teachers that run beside the student: their hidden states, of which the loss makes logits a chunk at a time.

Several of them (inputs "teacher", "teacher2", ...) speak as one, pooled by their shares (losses/_several.py). With
`hidden_states` the states of the matched layers come along (train/states.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shoestring.core.errors import UserError
from shoestring.data.batch import Batch, Example
from shoestring.losses._several import Several
from shoestring.losses._states import WithStates
from shoestring.losses._targets import Targets
from shoestring.losses._teacher import Hidden
from shoestring.nn.head import token_logprobs
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import DistillStage
from shoestring.train.context import Context
from shoestring.train.distill_checks import check_fit, matched_layers
from shoestring.train.state import load_frozen
from shoestring.train.states import Taps
from shoestring.train.step import flat_tokens, scoring_flops


class Reader:
    """One teacher: a frozen model of the student's vocabulary that reads what the student reads."""

    def __init__(self, stage: DistillStage, ctx: Context, role: str, student: Any, tokenizer: Tokenizer):
        self.model, theirs = load_frozen(
            ctx, role, stage.compute, tokens=stage.tokens_per_microbatch, seq_len=stage.row_tokens
        )
        check_fit(ctx, student, tokenizer, self.model, theirs, role)
        self.vocab, self.name = tokenizer.vocab_size, ctx.inputs[role].name

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """[N, C] of the target tokens that carry weight. Raises UserError when they are not finite."""
        batch = batch.to(self.model.embedding.device)
        _, keep_N = flat_tokens(batch)
        out = self.model(
            batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT, logits=False
        )  # fmt: skip
        hidden_NC: Tensor = out.hidden_BTD.flatten(0, 1)[keep_N]
        if not torch.isfinite(hidden_NC).all():
            raise UserError(
                f"the teacher {self.name} gives NaN or infinite logits on these traces: its weights are broken, or it "
                "needs compute.dtype=float32."
            )
        return hidden_NC


class Beside:
    """The stage's teachers as one."""

    def __init__(self, stage: DistillStage, ctx: Context, student: Any, tokenizer: Tokenizer):
        self.stage = stage
        self.readers = [Reader(stage, ctx, role, student, tokenizer) for role in stage.teachers]
        self.names = [reader.name for reader in self.readers]
        self.taps: Taps | None = None
        if stage.hidden_states is not None:
            self.taps = Taps(self.readers[0].model, [theirs for _, theirs in matched_layers(stage, ctx)])

    def teach(self, batch: Batch) -> None:
        """Fill `batch.teacher` with what they say of its target tokens that carry weight."""
        said: list[Targets] = [
            Hidden(r.hidden(batch), r.model.head_weight, r.vocab, r.model.softcap) for r in self.readers
        ]
        stage = self.stage
        batch.teacher = said[0] if len(said) == 1 else Several(said, stage.shares, stage.teacher_pool)
        if self.taps is not None:
            place_N = flat_tokens(batch)[1].to(self.readers[0].model.embedding.device)
            batch.teacher = WithStates(batch.teacher, self.taps.take(place_N))

    def logprobs(self, batch: Batch) -> Tensor:
        """Ln p [N] of the target tokens that carry weight, at the stage's temperature; of the pool if there are
        several (of probabilities: a pool of logits has no value for a token alone)."""
        said = []
        for reader in self.readers:
            head_VC = reader.model.head_weight[: reader.vocab]
            ids_N = flat_tokens(batch)[0].ids_N.to(head_VC.device)
            logp_N, _ = token_logprobs(
                reader.hidden(batch), head_VC, ids_N, temperature=self.stage.temperature, softcap=reader.model.softcap
            )
            said.append(logp_N)
        logs = [math.log(share) for share in self.stage.shares]
        return said[0] if len(said) == 1 else torch.logsumexp(
            torch.stack([logp_N + log for logp_N, log in zip(said, logs, strict=True)]), dim=0
        )  # fmt: skip

    def flops(self, examples: Sequence[Example]) -> float:
        """What they spent on reading them."""
        lengths = [len(example.ids) for example in examples]
        return sum(scoring_flops(reader.model, lengths) for reader in self.readers)
