"""What changes logits before the draw: bias, penalties, the least length, a grammar, the thinking budget.

In this order, each row by itself; a grammar goes before bans that leave it no token.
Penalties as in vLLM and CTRL (arXiv 1909.05858, section 4.1 for repetition):

    presence, frequency: logit -= presence · [count > 0] + frequency · count      tokens sampled so far
    repetition: logit = logit / r if logit > 0 else logit · r                     prompt and sampled tokens
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from shoestring.infer.grammar import mask_row
from shoestring.infer.sequence import Sequence

BANNED = float("-inf")


def adjust(logits_RV: Tensor, sequences: list[Sequence]) -> Tensor:
    """The logits with every row's changes; a copy when there are any."""
    rows = [row for row, s in enumerate(sequences) if s.request.adjusts or s.grammar is not None]
    if not rows:
        return logits_RV
    logits_RV = logits_RV.float().clone()
    shared = sequences[0].sampling.logit_bias
    if not all(sequence.sampling.logit_bias is shared for sequence in sequences):
        shared = None
    if shared:  # one request's, as when padding of the table is banned: all rows at once
        logits_RV[:, list(shared)] += torch.tensor(list(shared.values()), device=logits_RV.device)
    for row in rows:
        _adjust_row(logits_RV[row], sequences[row], biased=bool(shared))
    return logits_RV


def _adjust_row(logits_V: Tensor, sequence: Sequence, *, biased: bool) -> None:
    s = sequence.sampling
    if s.logit_bias and not biased:
        ids, values = list(s.logit_bias), list(s.logit_bias.values())
        logits_V[ids] += torch.tensor(values, dtype=logits_V.dtype, device=logits_V.device)
    if s.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.ids)), device=logits_V.device)
        logit = logits_V[seen]
        logits_V[seen] = torch.where(logit > 0, logit / s.repetition_penalty, logit * s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        counts = Counter(sequence.new_ids)
        if counts:
            ids = list(counts)
            taken = [s.presence_penalty + s.frequency_penalty * counts[token] for token in ids]
            logits_V[ids] -= torch.tensor(taken, dtype=logits_V.dtype, device=logits_V.device)
    if sequence.produced < s.min_new_tokens:
        logits_V[sorted(sequence.request.stop_ids)] = BANNED
    if (forced := sequence.forced_token()) is not None:
        logit = logits_V[forced].nan_to_num(0.0).clamp(-1e4, 1e4)  # banned or not, it is what comes next
        logits_V.fill_(BANNED)
        logits_V[forced] = logit
    elif sequence.grammar is not None:
        mask_row(logits_V, sequence)
        if s.logit_bias and float(logits_V.max()) == BANNED:  # bans that leave the grammar nothing to write
            mask_row(logits_V.fill_(0.0), sequence)
