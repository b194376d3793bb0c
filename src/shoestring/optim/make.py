"""The optimisers of a model: AdamW for everything, or Muon for its hidden matrices and AdamW for the rest."""

from __future__ import annotations

from typing import Literal

from torch import nn

from shoestring.optim.adamw import AdamW, adamw_groups
from shoestring.optim.base import Optimizer
from shoestring.optim.muon import Muon

# Not hidden matrices, by the names of Hugging Face's layout: the tables at both ends, and the router.
NOT_MUON = ("embed_tokens", "lm_head", "mlp.gate.weight")


def optimizers(
    model: nn.Module, kind: Literal["adamw", "muon"], *, lr: float, betas: tuple[float, float], weight_decay: float
) -> list[Optimizer]:
    """One or two optimisers that together hold every trainable parameter once. One learning rate serves both."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if kind == "muon" and p.ndim >= 2 and not any(part in name for part in NOT_MUON)]
    taken = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in taken]
    adamw = AdamW(adamw_groups(rest, weight_decay), lr=lr, betas=betas)
    return [adamw] if not hidden else [Muon(hidden, lr=lr, weight_decay=weight_decay), adamw]
