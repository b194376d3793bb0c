"""Several teachers as one: the fused pool is the plain pool, and the pools are what they are named after."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring.losses import _fused, adaptive, forward_kl, jsd, reverse_kl, skew_kl, total_variation
from shoestring.losses._fused import plain_divergence_sum
from shoestring.losses._several import Pool, Several
from shoestring.losses._states import WithStates, states_sum
from shoestring.losses._teacher import Hidden, Sampled, TopK
from shoestring.losses._tokens import Tokens

N, V, D = 11, 19, 5
FORMS: list[tuple[Any, dict[str, Any]]] = [
    (forward_kl, {}), (reverse_kl, {}), (jsd, {"beta": 0.3}), (skew_kl, {"alpha": 0.1}), (total_variation, {}),
    (adaptive, {}),
]  # fmt: skip
NAMES = [part.__name__.rpartition(".")[2] for part, _ in FORMS]
SHARES = (0.5, 0.2, 0.3)
POOLS: tuple[Pool, ...] = ("probabilities", "logits", "divergences")


def _drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _teachers() -> list[Hidden]:
    """Three of widths 4, 6 and 3; the second's table is padded beyond the vocabulary."""
    return [Hidden(_drawn(1, N, 4), _drawn(2, V, 4)), Hidden(_drawn(3, N, 6), _drawn(4, V + 3, 6), V),
            Hidden(_drawn(5, N, 3), _drawn(6, V, 3))]  # fmt: skip


def _case() -> tuple[Tensor, Tensor, Tensor]:
    weight = _drawn(7, N).abs()
    weight[2] = 0
    return _drawn(8, N, D).requires_grad_(), _drawn(9, V, D).requires_grad_(), weight


def _slopes(part: Any, teacher: Any, **options: Any) -> tuple[Tensor, ...]:
    hidden, table, weight = _case()
    total, _ = part.loss(hidden, table, Tokens(torch.zeros(N).long(), weight, teacher=teacher), **options)
    return torch.autograd.grad(total, (hidden, table))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize(("part", "options"), FORMS, ids=NAMES)
def test_fused_is_plain(
    part: Any, options: dict[str, Any], chunk: int, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fused, "BLOCK_ELEMENTS", 2 * V)  # blocks of two rows within a chunk
    hidden, table, weight = _case()
    teacher = Several(list(_teachers()), SHARES, pool)
    tokens = Tokens(torch.zeros(N).long(), weight, teacher=teacher)
    fused, _ = part.loss(hidden, table, tokens, temperature=1.5, chunk=chunk, **options)
    plain = plain_divergence_sum(hidden, table, tokens, partial(part.plain, **options), temperature=1.5)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(torch.autograd.grad(fused, (hidden, table)), torch.autograd.grad(plain, (hidden, table)))


@pytest.mark.parametrize(
    ("part", "pool"),
    [(forward_kl, "probabilities"), (reverse_kl, "logits"), (jsd, "divergences"), (forward_kl, "divergences")],
)
def test_the_pool_has_the_gradient_of_the_weighted_divergences(part: Any, pool: Pool) -> None:
    pooled = _slopes(part, Several(list(_teachers()), SHARES, pool), temperature=1.3)
    alone = [_slopes(part, teacher, temperature=1.3) for teacher in _teachers()]
    for got, *each in zip(pooled, *alone, strict=True):
        torch.testing.assert_close(got, sum(s * g for s, g in zip(SHARES, each, strict=True)))


@pytest.mark.parametrize("pool", POOLS)
def test_teachers_of_one_mind_are_one_teacher(pool: Pool) -> None:
    one = _teachers()[0]
    torch.testing.assert_close(_slopes(reverse_kl, Several([one, one], (0.4, 0.6), pool)), _slopes(reverse_kl, one))


def test_rows_are_selected_in_every_teacher() -> None:
    rows = torch.tensor([4, 1])
    some = Several(list(_teachers()), SHARES).index_select(rows)
    assert len(some) == 2
    logq = torch.log_softmax(_drawn(10, 2, V), -1)
    got = some.plain(logq, forward_kl.plain, 1.0)
    whole = torch.zeros(N, V).double()
    whole[rows] = logq
    torch.testing.assert_close(got, Several(list(_teachers()), SHARES).plain(whole, forward_kl.plain, 1.0)[rows])


@pytest.mark.parametrize("measure", ["mse", "cosine"])
def test_states_by_hand_and_by_finite_differences(measure: Any) -> None:
    h, W, t = _drawn(1, N, D).requires_grad_(), _drawn(2, 7, D).requires_grad_(), _drawn(3, N, 7)
    weight = _drawn(4, N).abs()
    weight[5] = 0
    total = 0.0
    for n in range(N):
        said = [sum(W[c, d].item() * h[n, d].item() for d in range(D)) for c in range(7)]
        told = t[n].tolist()
        if measure == "mse":
            apart = sum((a - b) ** 2 for a, b in zip(said, told, strict=True)) / 7
        else:
            dot = sum(a * b for a, b in zip(said, told, strict=True))
            apart = 1 - dot / (sum(a * a for a in said) * sum(b * b for b in told)) ** 0.5
        total += float(weight[n]) * apart
    assert states_sum(h, t, W, weight, measure).item() == pytest.approx(total)
    assert torch.autograd.gradcheck(lambda h, W: states_sum(h, t, W, weight, measure), (h, W))
    assert not torch.autograd.grad(states_sum(h, t, W, weight, measure), h)[0][5].any()


def test_a_teacher_with_states_teaches_as_without() -> None:
    bare = _teachers()[1]
    both = WithStates(bare, [_drawn(11, N, 6)])
    for got, want in zip(_slopes(forward_kl, both), _slopes(forward_kl, bare), strict=True):
        assert torch.equal(got, want)
    assert len(both.index_select(torch.tensor([3])).states[0]) == 1


def test_accounts_of_other_kinds_are_summed() -> None:
    """A top-k account, samples and hidden states side by side: the weighted sum of what each gives alone."""
    logp = torch.log_softmax(_drawn(11, N, V), -1)
    best = logp.topk(4)
    tail = torch.log1p(-best.values.exp().sum(-1))
    ids = torch.randint(0, V, (N, 6), generator=torch.Generator().manual_seed(1))
    accounts = [TopK(best.indices, best.values, tail), Sampled(ids, torch.full((N, 6), 1 / 6)), _teachers()[1]]
    got = _slopes(forward_kl, Several(accounts, SHARES, "divergences"), chunk=4)
    alone = [_slopes(forward_kl, account) for account in accounts]
    for one, *each in zip(got, *alone, strict=True):
        torch.testing.assert_close(one, sum(s * g for s, g in zip(SHARES, each, strict=True)))
