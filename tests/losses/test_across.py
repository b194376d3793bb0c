"""Losses across tokenizers: golden value, plain twin for any widths, spans and their gradient."""

from __future__ import annotations

import pytest
import torch

from shoestring.losses import span_likelihood, universal_logit
from shoestring.losses._fused import plain_divergence_sum
from shoestring.losses._teacher import Hidden, Spans
from shoestring.losses._tokens import Tokens


def test_golden_sorted_distance() -> None:
    q, p = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).double(), torch.tensor([[0.6, 0.3, 0.1]]).double()
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):  # it does not see which token is which
        tokens = Tokens(torch.tensor([0]), torch.ones(1), teacher=Hidden(p.log(), torch.eye(3).double()))
        assert universal_logit.loss(q[:, order].log(), torch.eye(4).double(), tokens)[0].item() == pytest.approx(0.4)


@pytest.mark.parametrize(("ours", "theirs"), [(19, 7), (7, 19), (9, 9)])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_fused_is_plain_for_any_widths(ours: int, theirs: int, chunk: int) -> None:
    torch.manual_seed(0)
    hidden, table = torch.randn(8, 5).double().requires_grad_(), torch.randn(ours, 5).double().requires_grad_()
    tokens = Tokens(torch.zeros(8).long(), torch.rand(8).double(),
                    teacher=Hidden(torch.randn(8, 4).double(), torch.randn(theirs, 4).double()))  # fmt: skip
    fused, _ = universal_logit.loss(hidden, table, tokens, temperature=1.3, chunk=chunk)
    plain = plain_divergence_sum(hidden, table, tokens, universal_logit.plain, temperature=1.3)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(torch.autograd.grad(fused, (hidden, table)), torch.autograd.grad(plain, (hidden, table)))


def test_spans_are_sums_of_their_tokens() -> None:
    torch.manual_seed(1)
    hidden, table = torch.randn(5, 3).double().requires_grad_(), torch.randn(6, 3).double().requires_grad_()
    ids, span = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([7, 7, 9, 12, 12])
    theirs = torch.tensor([-2.0, -2.0, -1.0, -3.0, -3.0]).double()
    weight = torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0])
    total, _ = span_likelihood.loss(hidden, table, Tokens(ids, weight, teacher=Spans(span, theirs)))
    logp = torch.log_softmax(hidden @ table.T, -1).gather(1, ids[:, None]).squeeze(1)
    plain = (logp[0] + logp[1] + 2) ** 2 + 0.5 * (logp[2] + 1) ** 2
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(torch.autograd.grad(total, (hidden, table)), torch.autograd.grad(plain, (hidden, table)))


def test_spans_that_agree_teach_nothing() -> None:
    torch.manual_seed(2)
    hidden, table = torch.randn(4, 3).double().requires_grad_(), torch.randn(6, 3).double()
    ids = torch.tensor([1, 2, 3, 4])
    logp = torch.log_softmax(hidden @ table.T, -1).gather(1, ids[:, None]).squeeze(1).detach()
    spans = Spans(torch.tensor([0, 0, 1, 1]), torch.stack([logp[:2].sum()] * 2 + [logp[2:].sum()] * 2))
    total, _ = span_likelihood.loss(hidden, table, Tokens(ids, torch.ones(4), teacher=spans))
    assert torch.autograd.grad(total, hidden)[0].abs().max() < 1e-12
    with pytest.raises(ValueError, match="Spans"):
        span_likelihood.loss(hidden, table, Tokens(ids, torch.ones(4)))
