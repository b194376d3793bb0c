"""Logprobs of given tokens, and what else a student or a judge wants to know of them.

The training module's own forward, without a cache: what is scored here is what a loss would see. Sequences are packed
into rows (attention stays inside each), logits exist only a chunk of rows at a time, so memory does not grow with the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.core.errors import UserError
from shoestring.infer.check import check_ids, warmth
from shoestring.nn.head_rows import CHUNK_ELEMENTS, bend_

SCORE_TOKENS = 1 << 14  # tokens in one forward pass


@dataclass(slots=True)
class Scored:
    """A sequence of T + 1 ids, scored: entry t is about token t + 1 given what stands before it. fp32.

    `top_ids_TK`, `top_logprobs_TK`: the K likeliest tokens, best first; `tail_T`: log of the mass of all others.
    `hidden_TD`: the states after the final norm that the head would turn into logits, in the compute dtype.
    """

    logprobs_T: Tensor
    top_ids_TK: Tensor | None = None
    top_logprobs_TK: Tensor | None = None
    tail_T: Tensor | None = None
    hidden_TD: Tensor | None = None


@overload
def score(
    model: Any, token_ids: Sequence[Sequence[int]], *, temperature: float = ..., top_k: Literal[0] = ...,
    hidden: Literal[False] = ...,
) -> list[list[float]]: ...  # fmt: skip
@overload
def score(
    model: Any, token_ids: Sequence[Sequence[int]], *, temperature: float = ..., top_k: int = ..., hidden: bool = ...
) -> list[list[float]] | list[Scored]: ...


@torch.no_grad()  # not inference mode: what is returned may stand in a loss
def score(
    model: Any, token_ids: Sequence[Sequence[int]], *, temperature: float = 1.0, top_k: int = 0, hidden: bool = False
) -> list[list[float]] | list[Scored]:
    """For each sequence of T ids its T-1 logprobs, at `temperature`; with `top_k` or `hidden`, a Scored each.

    Raises UserError for empty or over-long sequences, ids outside the vocabulary, a temperature that is not positive,
    and a negative `top_k`. A `top_k` beyond the vocabulary means all of it.
    """
    if not 0.0 < temperature < float("inf"):
        raise UserError(f"the scoring temperature is {temperature}; it must be a positive number.")
    temperature = warmth(temperature)
    if top_k < 0:
        raise UserError(f"the scoring top_k is {top_k}; it must be 0 (off) or positive.")
    for index, ids in enumerate(token_ids):
        check_ids(model.config, ids, f"sequence {index}", 0)
    found: list[Scored] = [_nothing(model, top_k, hidden) for _ in token_ids]
    for rows in packed([len(ids) for ids in token_ids]):
        for index, state_TD in _forward(model, token_ids, rows):
            next_T = torch.tensor(token_ids[index][1:], device=state_TD.device)
            found[index] = _read(state_TD, model.head_weight, next_T, temperature, top_k, model.softcap)
            found[index].hidden_TD = state_TD if hidden else None
    return found if top_k or hidden else [scored.logprobs_T.tolist() for scored in found]


def packed(lengths: Sequence[int]) -> Iterator[list[list[int]]]:
    """Batches of rows; a row is the sequences that stand in it. Longest first, each into the first row with room.

    A batch holds at most SCORE_TOKENS places (but one row always). Sequences of one token have nothing to score.
    """
    order = sorted((i for i, length in enumerate(lengths) if length > 1), key=lambda i: -lengths[i])
    while order:
        width = lengths[order[0]]
        count, left = max(1, SCORE_TOKENS // width), []
        rows: list[list[int]] = []
        room: list[int] = []
        for index in order:
            fits = next((row for row, places in enumerate(room) if places >= lengths[index]), None)
            if fits is not None:
                rows[fits].append(index)
                room[fits] -= lengths[index]
            elif len(rows) < count:
                rows.append([index])
                room.append(width - lengths[index])
            else:
                left.append(index)
        yield rows
        order = left


def _forward(model: Any, token_ids: Sequence[Sequence[int]], rows: list[list[int]]) -> Iterator[tuple[int, Tensor]]:
    """(sequence, its hidden states [T-1, D]) of a batch."""
    device = model.embedding.device
    width = max(sum(len(token_ids[index]) for index in row) for row in rows)
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    positions_BT, segments_BT = torch.zeros_like(tokens_BT), torch.full_like(tokens_BT, -1)
    places: list[tuple[int, int, int]] = []
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members):
            end = start + len(token_ids[index])
            tokens_BT[row, start:end] = torch.tensor(token_ids[index])
            positions_BT[row, start:end] = torch.arange(end - start)
            segments_BT[row, start:end] = segment
            places.append((index, row, start))
            start = end
    options = {}
    if any(len(members) > 1 for members in rows):  # else causal attention keeps padding at the end out by itself
        options = {"positions_BT": positions_BT.to(device), "segments_BT": segments_BT.to(device)}
    hidden_BTD = model(tokens_BT.to(device), logits=False, **options).hidden_BTD
    for index, row, start in places:
        yield index, hidden_BTD[row, start : start + len(token_ids[index]) - 1]


def _read(state_TD: Tensor, head_VD: Tensor, next_T: Tensor, temperature: float, top_k: int, softcap: float) -> Scored:
    """Logits of a chunk of positions at a time."""
    V = len(head_VD)
    table_VD, K = head_VD.to(state_TD.dtype), min(top_k, V)
    logprobs, ids, best, tails = [], [], [], []
    chunk = max(16, CHUNK_ELEMENTS // V)
    for start in range(0, len(state_TD), chunk):
        logits_tV = F.linear(state_TD[start : start + chunk], table_VD).float()
        logits_tV = (bend_(logits_tV, softcap) if softcap else logits_tV) / temperature
        mass_t1 = logits_tV.logsumexp(-1, keepdim=True)
        logprobs.append((logits_tV.gather(1, next_T[start : start + chunk, None]) - mass_t1).squeeze(1))
        if top_k:
            top = logits_tV.topk(K, dim=-1)
            ids.append(top.indices)
            best.append(top.values - mass_t1)
            rest_tV = logits_tV.scatter_(1, top.indices, float("-inf"))
            tails.append(rest_tV.logsumexp(-1) - mass_t1.squeeze(1))
    scored = Scored(torch.cat(logprobs))
    if top_k:
        scored.top_ids_TK, scored.top_logprobs_TK, scored.tail_T = torch.cat(ids), torch.cat(best), torch.cat(tails)
    return scored


def _nothing(model: Any, top_k: int, hidden: bool) -> Scored:
    """Of a sequence of one token: nothing to score, in the right shapes."""
    empty_T = model.embedding.new_empty(0, dtype=torch.float32)
    K, D = min(top_k, len(model.head_weight)), model.head_weight.shape[1]
    scored = Scored(empty_T)
    if top_k:
        scored.top_ids_TK, scored.top_logprobs_TK = empty_T.new_empty(0, K, dtype=torch.int64), empty_T.new_empty(0, K)
        scored.tail_T = empty_T
    scored.hidden_TD = empty_T.new_empty(0, D, dtype=model.kernels.torch_dtype) if hidden else None
    return scored
