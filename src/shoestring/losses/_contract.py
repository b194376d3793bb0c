"""What every objective promises: masked tokens give no gradient, gradients are the value's, splits change nothing.

A divergence (a part with a `form`) gives no gradient where student and teacher agree, besides. A part whose value holds
something without gradient says so in DETACHED and is not checked by finite differences; one that reads spans of text
and not distributions has SPANS = True.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from shoestring.losses._targets import Targets
from shoestring.losses._teacher import Hidden, Spans
from shoestring.losses._tokens import Tokens

N, V, D = 10, 7, 5


def _tokens(rows: slice = slice(None), spans: bool = False) -> Tokens:
    """The same N tokens every time, two of them masked, with everything an objective may read; or some of them."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    ids, weight = torch.randint(0, V, (N,), generator=generator), torch.ones(N, dtype=torch.float64)
    weight[[2, 5]] = 0
    advantage, old, ref, hidden = drawn(N), -drawn(N).abs(), -drawn(N).abs(), drawn(N, 4)
    teacher: Targets = Hidden(hidden[rows], drawn(V, 4))
    if spans:  # each token a span of its own, so that every cut keeps them whole
        teacher = Spans((torch.arange(N) * 3)[rows], old[rows])
    return Tokens(ids[rows], weight[rows], advantage[rows], old[rows], ref[rows], teacher)


def check(module: ModuleType, path: Path) -> list[str]:
    """The breaches found, one sentence each."""
    if not callable(getattr(module, "loss", None)):
        return ["it defines no function loss(hidden_ND, weight_VD, tokens)."]
    spans = bool(getattr(module, "SPANS", False))
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(N, D, dtype=torch.float64, generator=generator).requires_grad_()
    table = torch.randn(V, D, dtype=torch.float64, generator=generator).requires_grad_()
    try:
        found = module.loss(hidden, table, _tokens(spans=spans))
        total, metrics = found
    except Exception as error:
        return [f"loss raises {type(error).__name__} on ten tokens with all that an objective may read: {error}."]
    said = [f"the metric {name} carries a gradient." for name, value in metrics.items() if value.requires_grad]
    whole = torch.autograd.grad(total, (hidden, table))
    weight = _tokens().weight_N
    if bool((whole[0][weight == 0] != 0).any()):
        said.append("a token of weight 0 gives a gradient.")
    if not bool((whole[0][weight != 0] != 0).any()):
        said.append("no token gives a gradient.")
    for cut in (1, 6):
        parts = [module.loss(hidden[rows], table, _tokens(rows, spans))[0] for rows in (slice(0, cut), slice(cut, N))]
        split = torch.autograd.grad(parts[0] + parts[1], (hidden, table))
        if not all(torch.allclose(a, b) for a, b in zip(whole, split, strict=True)):
            said.append(f"cut after {cut} tokens, the gradient is another: the sum over tokens must not normalise.")
            break
    if not hasattr(module, "DETACHED"):
        try:
            torch.autograd.gradcheck(
                lambda h, w: module.loss(h, w, _tokens(spans=spans))[0], (hidden, table), atol=1e-6
            )
        except RuntimeError:
            said.append("its gradient is not that of its value (finite differences in float64).")
    if hasattr(module, "form"):
        tokens = _tokens()
        tokens.teacher = Hidden(hidden.detach(), table.detach())
        if torch.autograd.grad(module.loss(hidden, table, tokens)[0], hidden)[0].abs().max() > 1e-9:
            said.append("it gives a gradient where the student is the teacher.")
    return said
