"""Adapters of low rank put to learning, for models of every kind; tests/nn and tests/models share it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from shoestring.nn import lora

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def next_token_loss(logits_BTV: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss on IDS."""
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def adapters_learn_alone(model: Any, dora: bool, steps: int) -> None:
    """Attach adapters: nothing changes at first; then only they learn, and the loss falls."""
    before = model(IDS).logits.detach()
    lora.attach(model, 3, 6.0, dora, torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(IDS).logits, before)
    trained = lora.adapters(model)
    assert trained and all(name.endswith((".A", ".B", ".m")) for name in trained)
    kept = {name: p.clone() for name, p in model.named_parameters() if name not in trained}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.02)
    losses = []
    for _ in range(steps):
        loss = next_token_loss(model(IDS).logits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters() if name in kept)
