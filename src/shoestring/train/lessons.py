"""The ways of distillation: who writes a step's examples, and what the teacher says about their tokens.

A lesson is a function of (stage, step) and of the student's weights, so a resumed run repeats. `teach` fills
`Batch.teacher` for the target tokens that carry weight; the trainer knows nothing of it.
"""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.core.errors import UserError
from shoestring.core.registry import load_part
from shoestring.data.batch import Batch, Example
from shoestring.data.logits import HEAD, LogitsStore, read_hidden, read_topk, sequence_key, unpack_ids
from shoestring.losses import next_token, policy
from shoestring.losses._several import Several
from shoestring.losses._targets import Targets
from shoestring.losses._teacher import Hidden, Sampled, TopK
from shoestring.losses._tokens import Tokens
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.beside import Beside
from shoestring.train.configs import DistillStage
from shoestring.train.context import Context, derived_seed
from shoestring.train.distill_checks import check_template, kept_examples
from shoestring.train.examples import examples_of_step
from shoestring.train.step import Objective, TrainState, flat_tokens


class TextLesson:
    """A teacher's kept answers, in a seeded order; their tokens are all that is learnt."""

    def __init__(self, stage: DistillStage, ctx: Context, tokenizer: Tokenizer):
        traces, self.all = kept_examples(ctx, tokenizer)
        check_template(ctx, traces, tokenizer)
        ctx.run.note(teachers=sorted({t.teacher for t in traces}), licences=sorted({t.licence for t in traces}))
        self.per_step, self.seed = stage.examples_per_step, derived_seed(stage.seed, 2)

    def examples(self, state: TrainState) -> tuple[list[Example], dict[str, float]]:
        """The examples of the next update, and measurements of it."""
        chosen = examples_of_step(len(self.all), state.step, self.per_step, self.seed)
        return [self.all[i] for i in chosen], {}

    def teach(self, batch: Batch) -> None:
        """Nothing: text is its own teacher."""

    def flops(self, examples: Sequence[Example]) -> float:
        """What the teacher spent on them."""
        return 0.0


class OnlineLesson(TextLesson):
    """Kept answers, and what the teachers beside the student would have said at every token of them."""

    def __init__(self, stage: DistillStage, ctx: Context, student: Any, tokenizer: Tokenizer):
        self.teacher = Beside(stage, ctx, student, tokenizer)
        super().__init__(stage, ctx, tokenizer)
        self.teach, self.flops = self.teacher.teach, self.teacher.flops  # type: ignore[method-assign]


class StoredLesson(TextLesson):
    """A teacher's kept answers, and what a store kept of its logits; of several stores their weighted divergences."""

    def __init__(self, stage: DistillStage, ctx: Context, tokenizer: Tokenizer):
        super().__init__(stage, ctx, tokenizer)
        self.shares = stage.shares
        self.kept = [_Kept(role, stage, ctx, tokenizer) for role in stage.accounts]
        self.all = [self._with_entries(example) for example in self.all]

    def _with_entries(self, example: Example) -> Example:
        """The example with a number at every target token: where `_Kept.rows` says which record it has."""
        on = np.asarray(example.weight) != 0
        on[0] = False  # nothing predicts the first token
        entry = np.zeros(len(on), np.int64)
        for kept in self.kept:
            first, count = kept.find(example)
        entry[on] = np.arange(first, first + count)
        return Example(example.ids, example.weight, entry=entry.tolist())

    def teach(self, batch: Batch) -> None:
        assert batch.entry_BT is not None
        _, keep_N = flat_tokens(batch)
        entries_N = batch.entry_BT.flatten()[keep_N].numpy()
        told = [kept.targets(entries_N) for kept in self.kept]
        batch.teacher = told[0] if len(told) == 1 else Several(told, self.shares, "divergences")


class _Kept:
    """One store of a stage: which of its records belong to the lesson's tokens, in the order they were asked for."""

    def __init__(self, role: str, stage: DistillStage, ctx: Context, tokenizer: Tokenizer):
        folder = ctx.folder_of(role, "store")
        self.store, self.role, self.run = LogitsStore(folder), role, ctx.run.name
        asked = ctx.run.manifest["parents"].get("teacher", {}).get("digest")
        self.store.expect(tokenizer=tokenizer.digest(), temperature=stage.temperature, teacher=asked)
        if self.store.spec.kind == "sampled" and stage.loss != "forward_kl":
            raise UserError(
                f"sampled logits are unbiased for forward_kl only, not for {stage.loss}; capture kind=topk."
            )
        self.head = load_head(folder) if self.store.spec.kind == "hidden" else None
        self._rows, self._count = [np.empty(0, np.int64)], 0

    def find(self, example: Example) -> tuple[int, int]:
        """(number of its first token in the lesson, tokens) of the next example. Raises UserError when it is not
        in the store."""
        try:
            first, count = self.store.find(sequence_key(example.ids, example.weight))
        except KeyError:
            which = "the logits store" if self.role == "logits" else f'the logits store of input "{self.role}"'
            raise UserError(
                f"{self.run}: {which} holds nothing for some of these traces; it was captured from other "
                "traces, or with another chat template: capture it again."
            ) from None
        self._rows.append(np.arange(first, first + count))
        self._count += count
        return self._count - count, count

    def targets(self, entries_N: np.ndarray) -> Targets:
        """What the store holds of these tokens, as the losses take it."""
        if len(self._rows) > 1:
            self._rows = [np.concatenate(self._rows)]
        spec, records = self.store.spec, self.store.records(self._rows[0][entries_N])
        if spec.kind == "topk":
            ids, logp, tail = (torch.from_numpy(array) for array in read_topk(spec, records))
            return TopK(ids, logp, tail)
        if spec.kind == "sampled":
            return sampled_targets(spec, records)
        assert self.head is not None
        head_VC, softcap = self.head
        hidden_NC = torch.from_numpy(read_hidden(spec, records))
        if head_VC.shape[1] > spec.k:  # the last column is a bias
            hidden_NC = F.pad(hidden_NC, (0, 1), value=1.0)
        return Hidden(hidden_NC, head_VC, spec.vocab, softcap)


def sampled_targets(spec: Any, records: np.ndarray) -> Sampled:
    """Draws of a store, each with share 1/n."""
    ids_NK = torch.from_numpy(unpack_ids(records, spec.k, spec.bits))
    return Sampled(ids_NK, torch.full(ids_NK.shape, 1 / spec.k))


def load_head(folder: Any) -> tuple[Tensor, float]:
    """The teacher's head that lies beside stored hidden states, a bias as its last column if it has one, and the
    softcap behind it (0: none)."""
    from safetensors.torch import load_file

    kept = load_file(folder / HEAD)
    head_VC = torch.cat([kept["head"], kept["bias"][:, None]], dim=1) if "bias" in kept else kept["head"]
    return head_VC, float(kept.get("softcap", 0.0))


def make_lesson(stage: DistillStage, ctx: Context, state: TrainState, tokenizer: Tokenizer) -> Any:
    """The lesson of the stage's way. Raises UserError for whatever does not fit together."""
    if stage.way == "text":
        return TextLesson(stage, ctx, tokenizer)
    if stage.way == "offline":
        return StoredLesson(stage, ctx, tokenizer)
    if stage.way == "on_policy":
        from shoestring.train.on_policy import OnPolicyLesson

        return OnPolicyLesson(stage, ctx, state, tokenizer)
    if stage.way in ("universal_logit", "span_likelihood"):
        from shoestring.train.across import AcrossLesson

        return AcrossLesson(stage, ctx, state.model, tokenizer)
    return OnlineLesson(stage, ctx, state.model, tokenizer)


def make_objective(stage: DistillStage, *, vocab: int) -> Objective:
    """The loss of the stage, with next-token loss added when asked. Raises UserError for an option it does not take."""
    if stage.way == "text":
        return next_token.loss
    if stage.policy_gradient:

        def sampled(hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
            total, metrics = policy.loss(hidden_ND, weight_VD[:vocab], tokens, temperature=stage.temperature)
            return total, metrics

        return sampled
    part = load_part("losses", stage.loss)
    known = [name for name, p in inspect.signature(part.loss).parameters.items() if p.kind is p.KEYWORD_ONLY]
    if unknown := [name for name in stage.loss_options if name not in known]:
        raise UserError(f'{stage.loss} has no option "{unknown[0]}"; it takes {", ".join(known) or "none"}.')
    try:
        divergence: Objective = functools.partial(
            part.loss, temperature=stage.temperature, vocab=vocab, **stage.loss_options
        )
        if stage.loss_options:
            _try(divergence)
    except ValueError as error:
        raise UserError(f"{stage.name}: {error}.") from None
    if stage.text_weight == 0:
        return divergence

    def both(hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        total, metrics = divergence(hidden_ND, weight_VD, tokens)
        text, more = next_token.loss(hidden_ND, weight_VD, tokens)
        return total + stage.text_weight * text, metrics | more

    return both


def _try(divergence: Callable[..., Any]) -> None:
    """One token of a tiny vocabulary: an option out of range is said before any work."""
    one = torch.zeros(1, 1)
    divergence(one, one, Tokens(torch.zeros(1).long(), torch.ones(1), teacher=Hidden(one, one)))


def coin(seed: int, step: int) -> float:
    """A number in [0, 1) that belongs to a step."""
    return random.Random(f"{seed}/{step}").random()
