"""GRPO's clipped policy objective with an optional KL to a reference, summed over sampled tokens.

    loss = Σ_t w_t · [ -min(ρ A, clip(ρ, 1-ε_low, 1+ε_high) A) + β · KL_t ],   ρ = exp(logp - old)

Source: DeepSeekMath (arXiv 2402.03300) eq. 3 and R1 (arXiv 2501.12948) eq. 1 for the clip, per token as in
DeepSeekMath; ε_high > ε_low is DAPO's Clip-Higher. The KL estimator is ρ·k3 (DeepSeek-V3.2's unbiased form:
its gradient is that of KL(π‖π_ref)); plain k3, whose gradient is that of KL(π_ref‖π), is left out, and so are
sequence-level ratios (GSPO) and truncated importance weights, which a same-weights sampler does not need.
The value is about 0 on the first update after a rollout and says nothing about learning; the gradient does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoestring.losses._tokens import Tokens
from shoestring.nn.head import terms_sum


def loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    tokens: Tokens,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    kl_beta: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of the objective to minimise, and detached sums: clipped, kl, entropy, ratio_error.

    Raises ValueError when advantages, old or (with kl_beta > 0) reference logprobs are missing: no fallback.
    """
    if tokens.advantage_N is None or tokens.old_N is None:
        raise ValueError("the policy loss needs advantage_N and old_N for every token")
    if kl_beta > 0 and tokens.ref_N is None:
        raise ValueError("kl_beta > 0 needs the reference's logprobs ref_N")

    def terms(logp_N: Tensor, rows: slice) -> Tensor:
        term_N = _parts(logp_N, tokens, rows, clip_low, clip_high, kl_beta)[0]
        return term_N * tokens.weight_N[rows]

    value, logp_N, entropy_N = terms_sum(
        hidden_ND,
        weight_VD,
        tokens.ids_N,
        terms,
        temperature=temperature,
        native=tokens.native,
        room=tokens.room,
        softcap=tokens.softcap,
    )
    on_N, everything = tokens.weight_N.detach(), slice(None)
    _, metrics = _parts(logp_N, tokens, everything, clip_low, clip_high, kl_beta)
    sums = {name: (on_N * metric_N).sum() for name, metric_N in (metrics | {"entropy": entropy_N}).items()}
    return value, sums


def _parts(
    logp_N: Tensor, tokens: Tokens, rows: slice, clip_low: float, clip_high: float, kl_beta: float
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The terms of some tokens, and their metrics, all without weights."""
    assert tokens.advantage_N is not None and tokens.old_N is not None
    seen_N, advantage_N = tokens.weight_N[rows] != 0, tokens.advantage_N[rows]
    # Masked rows may carry anything in old_N: keep exp() finite there, their weight is 0.
    delta_N = torch.where(seen_N, logp_N - tokens.old_N[rows], torch.zeros_like(logp_N))
    ratio_N = delta_N.exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    term_N = -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    metrics = {"clipped": ratio_N * advantage_N > clipped_N * advantage_N, "ratio_error": delta_N.abs()}
    if kl_beta > 0:
        assert tokens.ref_N is not None
        gap_N = torch.where(seen_N, tokens.ref_N[rows] - logp_N, torch.zeros_like(logp_N)).clamp(-20, 20)
        metrics["kl"] = gap_N.exp() - gap_N - 1
        term_N = term_N + kl_beta * ratio_N * metrics["kl"]
    return term_N, metrics
