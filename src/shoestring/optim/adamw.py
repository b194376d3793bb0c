"""AdamW (Loshchilov & Hutter, arXiv 1711.05101), torch's fused kernel, with the usual two parameter groups.

Matrices decay; vectors (norm weights, biases) do not. Betas 0.9/0.95 and decay 0.1 are DeepSeek-V3's (section 4.2).
"""

from __future__ import annotations

import torch
from torch import nn


def adamw(model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """The optimiser over all trainable parameters of `model`."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)
