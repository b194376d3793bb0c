"""Decode one wave: read each distinct prompt once, then one token a row and step until all rows are finished.

Prompts are right-padded, so a token's position is its index in the cache; what padding writes beyond a prompt's end
is overwritten by the tokens sampled there before any query can see it. The rows of a group share their prompt's
prefill: the cache of the distinct prompts is gathered into one row per sample. Finished rows go on decoding, unread,
until enough of them pay for copying the cache without them (SHRINK: of 256 rows on a CPU core, dropping at 0.75 to 0.9
took 10-17 % less time than never, and never dropping or dropping at every end was the slowest). When that happens
depends on lengths alone, never on the clock, so a run repeats.

Left out, for the engine of the serving package: paged caches, rows joining while others decode, speculation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoestring.core.errors import UserError
from shoestring.core.nouns import Sampling
from shoestring.infer.sampler import sample

SHRINK = 0.85  # drop finished rows when at most this share of the rows is unfinished
PREFILL_TOKENS = 1 << 14  # tokens in one forward pass of the prefill, to bound its activations
DRAWS = 64  # steps of random numbers drawn at a time


@dataclass(slots=True)
class Decoded:
    """`tokens_RT` and `logprobs_RT` are valid up to `length_R` (the stop token included); `stopped_R`: by a stop id.

    `routed_RSLA`: the experts of every token that was fed, prompt first, when asked for (-1 beyond the end).
    """

    tokens_RT: Tensor
    logprobs_RT: Tensor
    length_R: Tensor
    stopped_R: Tensor
    routed_RSLA: Tensor | None


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, T] (padding 0, which no result depends on) and lengths [B]."""
    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths)
    rows = [[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, device=device), torch.tensor(lengths, device=device)


def decode(
    model: Any, prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int], sampling: Sampling,
    stop_ids: Sequence[int], generator: torch.Generator, device: torch.device,
) -> Decoded:  # fmt: skip
    """Sample one completion per row; row r continues `prompts[prompt_of_row[r]]`. The prompts are distinct."""
    prompt_BT, length_B = pad(prompts, device)
    gather_R = torch.tensor(prompt_of_row, device=device)
    R, T = len(prompt_of_row), sampling.max_new_tokens
    cache = model.new_cache(len(prompts), prompt_BT.shape[1] + T)
    logits_BV, prompt_routed = _prefill(model, cache, prompt_BT, length_B, sampling.routed_experts)
    cache, logits_RV, position_R = cache.select(gather_R), logits_BV[gather_R], length_B[gather_R]
    prompt_length_R = position_R

    stop_S = torch.tensor(list(stop_ids), device=device)
    tokens_RT = torch.zeros(R, T, dtype=torch.int64, device=device)
    logprobs_RT = torch.zeros(R, T, device=device)
    routed_steps: list[tuple[Tensor, Tensor]] = []
    length_R = torch.full((R,), T, device=device)
    stopped_R = torch.zeros(R, dtype=torch.bool, device=device)
    rows_R = torch.arange(R, device=device)  # which row of the wave each row of the batch is
    live_R = torch.ones(R, dtype=torch.bool, device=device)
    for step in range(T):
        if step % DRAWS == 0:  # for every row of the wave, so that a row's draws do not depend on who has finished
            u_RU = torch.rand(R, min(DRAWS, T - step), generator=generator, dtype=torch.float64).to(device)
        drawn = sample(logits_RV, u_RU[rows_R, step % DRAWS], [sampling] * len(rows_R))
        token_R, logprob_R = drawn.token_R, drawn.logprob_R
        tokens_RT[rows_R, step], logprobs_RT[rows_R, step] = token_R, logprob_R
        ended_R = torch.isin(token_R, stop_S) & live_R
        if bool(ended_R.any()):
            length_R[rows_R[ended_R]] = step + 1
            stopped_R[rows_R[ended_R]] = True
            live_R = live_R & ~ended_R
            live = int(live_R.sum())
            if live == 0:
                break
            if live <= SHRINK * len(rows_R):
                keep = live_R.nonzero().squeeze(1)
                cache = cache.select(keep)
                rows_R, live_R, token_R, position_R = rows_R[keep], live_R[keep], token_R[keep], position_R[keep]
        if step + 1 < T:
            output = model(token_R[:, None], positions_BT=position_R[:, None], cache=cache)
            logits_RV = output.logits_BTV[:, 0]
            position_R = position_R + 1
            if sampling.routed_experts:
                routed_steps.append((rows_R, output.routed[:, :, 0]))
    routed = None
    if sampling.routed_experts:
        routed = _join_routed(prompt_routed, gather_R, prompt_length_R, routed_steps)
    return Decoded(tokens_RT, logprobs_RT, length_R, stopped_R, routed)


def _prefill(model: Any, cache: Any, prompt_BT: Tensor, length_B: Tensor, routed: bool) -> tuple[Tensor, Tensor | None]:
    """Logits [B, V] at the last token of each prompt, and the experts of the prompts [L, B, T, A]."""
    B, T = prompt_BT.shape
    chunk = max(1, PREFILL_TOKENS // B)
    last_BD: Tensor | None = None
    pieces = []
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        positions_BT = None if end - start == T else torch.arange(start, end, device=prompt_BT.device).expand(B, -1)
        output = model(prompt_BT[:, start:end], positions_BT=positions_BT, cache=cache, logits=False)
        index_B = (length_B - 1 - start).clamp(0, end - start - 1)
        here_BD = output.hidden_BTD[torch.arange(B, device=prompt_BT.device), index_B]
        is_last_B1 = ((length_B > start) & (length_B <= end))[:, None]
        last_BD = here_BD if last_BD is None else torch.where(is_last_B1, here_BD, last_BD)
        if routed and output.routed is None:
            raise UserError("sampling.routed_experts is on, but the model has no routed experts; turn it off.")
        pieces.append(output.routed)
    assert last_BD is not None
    return model.unembed(last_BD), torch.cat(pieces, dim=2) if routed else None


def _join_routed(
    prompt_LBTA: Tensor | None, gather_R: Tensor, prompt_length_R: Tensor, steps: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Experts by row and position: the prompt's, then those of the sampled tokens that were fed. [R, S, L, A]."""
    assert prompt_LBTA is not None
    L, _, T, A = prompt_LBTA.shape
    R = len(gather_R)
    routed_RSLA = torch.full((R, T + len(steps), L, A), -1, dtype=prompt_LBTA.dtype, device=prompt_LBTA.device)
    routed_RSLA[:, :T] = prompt_LBTA.permute(1, 2, 0, 3)[gather_R]
    for step, (rows_r, experts_LrA) in enumerate(steps):
        routed_RSLA[rows_r, prompt_length_R[rows_r] + step] = experts_LrA.transpose(0, 1)
    return routed_RSLA
