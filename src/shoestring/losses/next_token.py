"""Next-token cross-entropy, Σ w·(-log p): pretraining, SFT, distillation on text, and MTP on shifted targets.

Source: any; DeepSeek-V3 section 2.2 eq. 24 for its use on MTP heads. Left out: label smoothing, z-loss.
"""

from __future__ import annotations

from torch import Tensor

from shoestring.losses._tokens import Tokens
from shoestring.nn.head import cross_entropy_sum


def loss(hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens in nats; the metric "nll" is the same sum, detached."""
    total, _ = cross_entropy_sum(
        hidden_ND,
        weight_VD,
        tokens.ids_N,
        tokens.weight_N,
        native=tokens.native,
        room=tokens.room,
        softcap=tokens.softcap,
    )
    return total, {"nll": total.detach()}
