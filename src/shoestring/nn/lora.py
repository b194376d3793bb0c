"""LoRA and DoRA on the linear layers of a model's blocks: W + (α/r) B A, the tables and W itself frozen.

LoRA: arXiv 2106.09685; DoRA (arXiv 2402.09353): that sum with each output row scaled to a learnt length, at first that
of W. They are parametrisations of `weight`, so every kernel that reads it sees the sum; routed experts and routers are
left alone. On models of transformers the same, on the `nn.Linear`s of their blocks. Left out: dropout, merging while
training (W is summed anew in every pass), per-layer ranks, weights kept transposed (GPT-2's Conv1D: refused).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shoestring.core.errors import UserError
from shoestring.nn.linear import Linear


class LowRank(nn.Module):
    """W [out, in] -> W + scale · B A; with `dora` each row at the length `m`."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, dora: bool, generator: torch.Generator | None):
        super().__init__()
        rows, columns = weight.shape
        first = torch.empty(rank, columns).uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
        self.A = nn.Parameter(first.to(weight.device))
        self.B = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        self.m = nn.Parameter(weight.detach().float().norm(dim=1)) if dora else None
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # the sum is fp32, whatever reads it
            return self._sum(weight)

    def _sum(self, weight: Tensor) -> Tensor:
        summed = weight + self.scale * (self.B @ self.A)
        if self.m is None:
            return summed
        length = summed.detach().norm(dim=1)  # no gradient through it (DoRA section 4.3)
        return summed * (self.m / length.clamp_min(1e-12))[:, None]


def attach(model: Any, rank: int, alpha: float, dora: bool, generator: torch.Generator | None = None) -> None:
    """Freeze the model and give every linear layer of its blocks an adapter; the model computes what it did.

    Raises UserError for blocks that hold their weights transposed, or no linear layer at all.
    """
    blocks = model.blocks
    if any(type(part).__name__ == "Conv1D" for part in blocks.modules()):
        raise UserError(
            "lora: this model keeps weights transposed (Conv1D), which adapters do not follow; leave it out."
        )
    layers = [part for part in blocks.modules() if isinstance(part, (Linear, nn.Linear))]
    if not layers:
        raise UserError("lora: the blocks of this model hold no linear layer to adapt; leave it out.")
    model.requires_grad_(False)
    for layer in layers:
        part = LowRank(layer.weight, rank, alpha, dora, generator)
        parametrize.register_parametrization(layer, "weight", part)


def is_attached(model: nn.Module) -> bool:
    """Whether `attach` was called on it."""
    return any(isinstance(module, LowRank) for module in model.modules())


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """What is learnt, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def moved(model: nn.Module) -> dict[str, Tensor]:
    """All that training changes, by name: what is learnt, and the biases that balance the experts (V3 2.1.2)."""
    saved = model.state_dict().keys()
    return {**adapters(model), **{name: b for name, b in model.named_buffers() if name in saved}}


def merged(model: Any) -> Any:
    """A plain model that computes the same; the model itself when it has no adapters."""
    if not is_attached(model):
        return model
    if hasattr(model, "hf"):  # of transformers: its own classes cannot be made anew from a config alone
        plain = copy.deepcopy(model)
        for part in [part for part in plain.modules() if parametrize.is_parametrized(part)]:
            weight = part.weight.detach()
            del part.parametrizations  # not parametrize's own removal: it would undo the class that both models share
            part.__class__ = parametrize.type_before_parametrizations(part)
            part.weight = nn.Parameter(weight, requires_grad=False)
        return plain
    values = {name: value for name, value in model.state_dict().items() if ".parametrizations." not in name}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            values[f"{name}.weight"] = module.weight.detach()
    plain = type(model)(model.config, kernels=model.kernels)
    plain.load_state_dict(values)
    return plain.to(model.embedding.device)
