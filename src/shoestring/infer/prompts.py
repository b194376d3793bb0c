"""Logprobs of the prompt's own tokens, while it is read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shoestring.core.nouns import TokenLogprobs
from shoestring.infer.check import warmth
from shoestring.infer.sequence import Request

ROWS = 128  # positions whose logits exist at a time


def read_prompt(request: Request, start: int, hidden_TD: Tensor, unembed: Callable[[Tensor], Tensor]) -> None:
    """Append what positions start, start + 1, ... say about the token after them, as far as the prompt goes.

    At the sampling temperature (1 when greedy). Positions that were read before (a preempted request) add nothing.
    """
    known = request.prompt_logprobs or [None]
    request.prompt_logprobs = known
    ids, count = request.prompt_ids, request.sampling.prompt_logprobs or 0
    first, last = max(start, len(known) - 1), min(start + len(hidden_TD), len(ids) - 1)
    temperature = warmth(request.sampling.temperature) or 1.0
    for begin in range(first, last, ROWS):
        end = min(begin + ROWS, last)
        logp_tV = (unembed(hidden_TD[begin - start : end - start]) / temperature).log_softmax(-1)
        own_t1 = torch.tensor(ids[begin + 1 : end + 1], device=logp_tV.device)[:, None]
        best = logp_tV.topk(min(count, logp_tV.shape[-1]), dim=-1)
        rows = zip(
            ids[begin + 1 : end + 1], logp_tV.gather(1, own_t1).squeeze(1).tolist(), best.indices.tolist(),
            best.values.tolist(), strict=True,
        )  # fmt: skip
        for token, logp, best_ids, best_logps in rows:
            pairs: TokenLogprobs = [(token, logp), *zip(best_ids, best_logps, strict=True)]
            known.append(pairs)
