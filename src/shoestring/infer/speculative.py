"""Drafts by multi-token prediction: the model's own MTP module guesses one token ahead, the next step checks it.

    h¹_i = Block(W_eh [norm_e(Emb(t_{i+1})); norm_h(h_i)])        draft of t_{i+2} = argmax head(norm_s(h¹_i))

(V3 section 2.2; the module keeps keys of its own, in one more layer of the cache.) The next step computes t_{i+1} and
the draft together. The token after t_{i+1} is drawn from the model's own distribution exactly as without a draft; if
it is the draft, the second row was computed from the right past and the token after it is drawn too. With a draft that
is certain (q one-hot), accepting with min(1, p/q) and redrawing from max(p - q, 0) is this very rule, and since a draw
depends on its position alone, the tokens are those of plain decoding, whatever the temperature (rounding apart).

Left out: drafting from q at the temperature (accepts more when hot), more than one draft, trees.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.infer.layers import Norm, Step
from shoestring.infer.native import Rows
from shoestring.infer.runner import ModelRunner, PreparedBlock, Ran
from shoestring.infer.scheduler import Counts, Work
from shoestring.infer.sequence import Sequence
from shoestring.models.deepseek import MTPModule

TRIAL = 12  # steps of each way before one is chosen
AGAIN = 1024  # steps after which both are tried again


class Drafter:
    """The first MTP module, prepared; it uses the runner's table, head and cache (layer L)."""

    def __init__(self, module: MTPModule, runner: ModelRunner):
        make = runner.making()
        self._runner, self._layer = runner, len(runner.model.model.layers)
        self._enorm, self._hnorm = Norm(module.enorm, runner.dtype), Norm(module.hnorm, runner.dtype)
        self._join = make(module.eh_proj.weight)
        self._block = PreparedBlock(module.block, make)
        self._norm = Norm(module.shared_head.norm, runner.dtype)
        self._native = (
            runner.native_layers([module.block], module.shared_head.norm, self._layer) if runner.native else None
        )

    @torch.inference_mode()
    def draft(self, ran: Ran, next_N: list[int], rows: list[int]) -> list[int]:
        """The likeliest token after the next one, for some rows of a step.

        `next_N`: for every row of the step the token after it; all rows leave their keys in the module's layer.
        """
        start, found = 0, []
        next_ids_N = torch.tensor(next_N, device=self._runner.device)
        for step in ran.steps:
            count = len(step) if isinstance(step, Rows) else len(step[1])
            pad = count - len(next_ids_N[start : start + count])
            ids_n = F.pad(next_ids_N[start : start + count], (0, pad))
            hidden_nD = F.pad(ran.hidden_ND[start : start + count], (0, 0, 0, pad))
            joined_nD = self._join(torch.cat([self._enorm(self._runner.embed(ids_n)), self._hnorm(hidden_nD)], -1))
            found.append(self._through(joined_nD, step))
            start += count
        if not rows:
            return []
        hidden_RD = torch.cat(found).index_select(0, torch.tensor(rows, device=self._runner.device))
        drafts: list[int] = self._runner.logits(hidden_RD).argmax(-1).tolist()
        return drafts

    def _through(self, joined_ND: Tensor, step: tuple[Step, Tensor] | Rows) -> Tensor:
        """The module's block over the tokens of a step, one position later, and its norm."""
        if isinstance(step, Rows):
            assert self._native is not None
            return self._native.run(joined_ND, step, ahead=1)[0]
        was, position_N = step
        cis_N = self._runner.model.rope.table(position_N + 1)
        ahead = Step(was.R, cis_N, was.slot_M, was.store, was.plan, was.bias_R1S, was.chunks)
        return self._norm(self._block(joined_ND, ahead, self._layer)[0])


def check_drafts(works: list[Work], ran: Ran, counts: Counts) -> list[tuple[Sequence, int]]:
    """The rows of drafts that turned out right; their sequences go one token further."""
    accepted, row = [], -1
    for work in works:
        row += work.end - work.start + work.drafted
        sequence = work.sequence
        if not work.drafted:
            continue
        counts.drafts += 1
        right = sequence.ids[-1] == sequence.draft
        sequence.draft = None
        if right and sequence.finish_reason is None:
            sequence.computed += 1
            if sequence.sampling.routed_experts and ran.routed_LNA is not None:
                sequence.record(work.end, ran.routed_LNA[:, row : row + 1].transpose(0, 1))
            accepted.append((sequence, row))
        counts.accepted += right
    return accepted


def make_drafts(drafter: Drafter, works: list[Work], ran: Ran) -> None:
    """Show the drafter every token that was computed with the one after it; ask it about the last ones."""
    after: list[int] = []
    rows, sequences = [], []
    for work in works:
        ids = work.sequence.ids
        begin = len(after)
        after += [ids[at + 1] if at + 1 < len(ids) else 0 for at in range(work.start, work.end + work.drafted)]
        if work.sequence.blocks is not None and work.sequence.decodes:
            rows.append(begin + work.sequence.computed - 1 - work.start)
            sequences.append(work.sequence)
    for sequence, draft in zip(sequences, drafter.draft(ran, after, rows), strict=True):
        sequence.draft = draft


@dataclass(slots=True)
class Tally:
    """Steps, seconds and tokens of one way of decoding."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0

    @property
    def pace(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Choice:
    """Whether drafts pay, by measurement: both ways are tried for a while at each size of the batch.

    It decides about speed only. The first step of a trial is not counted: it warms up.
    """

    tallies: dict[tuple[int, bool], Tally] = field(default_factory=dict)
    steps: int = 0

    def drafts(self, running: int) -> bool:
        self.steps += 1
        if self.steps % AGAIN == 0:
            self.tallies.clear()
        on, off = (self._tally(running, way) for way in (True, False))
        if on.steps <= TRIAL:
            return True
        return off.steps > TRIAL and on.pace > off.pace

    def record(self, running: int, way: bool, seconds: float, tokens: int) -> None:
        tally = self._tally(running, way)
        tally.steps += 1
        if tally.steps > 1:
            tally.seconds += seconds
            tally.tokens += tokens

    def _tally(self, running: int, way: bool) -> Tally:
        return self.tallies.setdefault((running.bit_length(), way), Tally())
