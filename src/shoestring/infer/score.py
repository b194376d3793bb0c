"""Logprobs of given tokens: the training module's own forward, without a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shoestring.core.errors import UserError
from shoestring.infer.check import check_ids
from shoestring.nn.head import token_logprobs

SCORE_TOKENS = 1 << 14  # tokens in one forward pass


@torch.inference_mode()
def score(model: Any, token_ids: Sequence[Sequence[int]], *, temperature: float = 1.0) -> list[list[float]]:
    """For each sequence of T ids its T-1 logprobs, at `temperature`. Logits exist only a chunk of rows at a time.

    Raises UserError for empty or over-long sequences, ids outside the vocabulary, and a temperature not positive.
    """
    if not 0.0 < temperature < float("inf"):
        raise UserError(f"the scoring temperature is {temperature}; it must be a positive number.")
    for index, ids in enumerate(token_ids):
        check_ids(model.config, ids, f"sequence {index}", 0)
    device = model.embedding.device
    logprobs: list[list[float]] = [[] for _ in token_ids]
    order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]))
    for batch in _batches(order, [len(ids) for ids in token_ids]):
        tokens_BT, length_B = pad([token_ids[index] for index in batch], device)
        if tokens_BT.shape[1] == 1:
            continue
        hidden_BTD = model(tokens_BT, logits=False).hidden_BTD[:, :-1]
        real_BT = torch.arange(1, tokens_BT.shape[1], device=device) < length_B[:, None]
        logp_N, _ = token_logprobs(
            hidden_BTD[real_BT], model.head_weight, tokens_BT[:, 1:][real_BT], temperature=temperature
        )
        for index, row in zip(batch, logp_N.split((length_B - 1).tolist()), strict=True):
            logprobs[index] = row.tolist()
    return logprobs


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, T] (padding 0, which no result depends on) and lengths [B]."""
    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths)
    rows = [[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, device=device), torch.tensor(lengths, device=device)


def _batches(order: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Consecutive runs of `order` (ascending lengths) whose padded size stays within SCORE_TOKENS."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[index] > SCORE_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
