"""A large table some rows at a time: values and gradients are those of whole rows, whatever is kept of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring.losses import forward_kl, reverse_kl
from shoestring.losses._teacher import Hidden
from shoestring.losses._tokens import Tokens
from shoestring.nn import native, slices
from shoestring.nn.head import cross_entropy_sum, plain_cross_entropy_sum, terms_sum, token_logprobs

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason="no compiler here")
V, D, C, N = 4_801, 96, 40, 150  # three slices, the last odd; wide enough that logits fit into the gradient
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SMALL = pytest.mark.parametrize(("kept", "rows"), [(0.0, 512), (0.5, 70), (100.0, 70)])


@pytest.fixture(autouse=True)
def sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "LARGE", 1)


def _sides(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(N, D).to(dtype).requires_grad_(), (torch.randn(V, D) * scale / 2).requires_grad_()


def _near(found: Any, wanted: Any, dtype: torch.dtype) -> None:
    """Found as near to fp64 as rounding to the dtype is: 1e-5 of the largest number, or 1.5 %."""
    for mine, theirs in zip(found, wanted, strict=True):
        far = (mine.double() - theirs.double()).abs().max() / theirs.abs().max()
        assert far < (1e-5 if dtype == torch.float32 else 1.5e-2), far


@DTYPES
@SMALL
def test_cross_entropy(dtype: torch.dtype, kept: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "KEPT", kept)
    monkeypatch.setattr(slices, "parts", lambda n: _parts(n, rows))
    hidden, table = _sides(dtype, 0.5)
    ids, weight = torch.randint(0, V, (N,)), torch.rand(N)
    ids[:2], weight[5] = torch.tensor([0, V - 1]), 0.0
    total, logp = cross_entropy_sum(hidden, table, ids, weight, native=True)
    found = (total.detach(), *torch.autograd.grad(total, (hidden, table)))
    exact = hidden.detach().double().requires_grad_(), table.detach().to(dtype).double().requires_grad_()
    wanted = plain_cross_entropy_sum(*exact, ids, weight.double())
    _near(found, (wanted.detach(), *torch.autograd.grad(wanted, exact)), dtype)
    _near((logp * weight,), ((torch.log_softmax(exact[0] @ exact[1].t(), -1)[range(N), ids] * weight).detach(),), dtype)


_parts = slices.parts


@DTYPES
def test_logprobs_entropy_and_terms_at_a_temperature(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, table = _sides(dtype)
    ids, advantage = torch.randint(0, V, (N,)), torch.randn(N)

    def found() -> tuple[Tensor, ...]:
        logp, entropy = token_logprobs(hidden, table, ids, temperature=1.7, native=True)
        one = torch.autograd.grad((logp * advantage).sum(), (hidden, table))
        total, _, again = terms_sum(
            hidden, table, ids, lambda logp_n, rows: logp_n.exp() * advantage[rows], temperature=1.7, native=True
        )  # fmt: skip
        return (logp.detach(), entropy, again, *one, *torch.autograd.grad(total, (hidden, table)))

    mine = found()
    monkeypatch.setattr(slices, "LARGE", 1 << 40)
    _near(mine, found(), dtype)


@DTYPES
@SMALL
@pytest.mark.parametrize("part", [forward_kl, reverse_kl])
@pytest.mark.parametrize("vocab", [V, V - 600])
def test_both_kls(
    part: Any, dtype: torch.dtype, kept: float, rows: int, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across kept and passing logits of both sides, several parts of the tokens, and padded rows of the table."""
    monkeypatch.setattr(slices, "KEPT", kept)
    monkeypatch.setattr("shoestring.losses._slices.parts", lambda n: _parts(n, rows))
    monkeypatch.setattr(slices, "parts", lambda n: _parts(n, rows))
    hidden, table = _sides(dtype)
    teacher = Hidden(torch.randn(N, C).to(dtype), torch.randn(V, C).to(dtype), vocab)
    tokens = Tokens(torch.zeros(N).long(), torch.rand(N), teacher=teacher, native=True)

    def found() -> tuple[Tensor, ...]:
        total, _ = part.loss(hidden, table, tokens, temperature=1.3, vocab=vocab)
        return (total.detach(), *torch.autograd.grad(total, (hidden, table)))

    mine = found()
    assert not mine[2][vocab:].any()
    tokens.native = False
    _near(mine, found(), dtype)


def test_no_tokens_give_no_gradient() -> None:
    _, table = _sides(torch.float32)
    hidden, nothing = torch.empty(0, D).requires_grad_(), torch.empty(0)
    total, _ = cross_entropy_sum(hidden, table, nothing.long(), nothing, native=True)
    tokens = Tokens(nothing.long(), nothing, teacher=Hidden(torch.empty(0, C), torch.ones(V, C)), native=True)
    total = total + reverse_kl.loss(hidden, table, tokens)[0]
    assert not torch.autograd.grad(total, table)[0].any()
