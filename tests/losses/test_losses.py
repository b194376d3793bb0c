"""What every objective promises, over the folder: masks, gradients, splits; and the policy's own numbers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from shoestring.core.registry import list_parts, load_part
from shoestring.losses import next_token, policy
from shoestring.losses._teacher import Hidden, Spans
from shoestring.losses._tokens import Tokens

OPTIONS = {"policy": {"kl_beta": 0.1, "temperature": 0.8}}


def _tokens(n: int = 12, vocab: int = 7) -> Tokens:
    torch.manual_seed(1)
    weight = torch.ones(n, dtype=torch.float64)
    weight[[2, 5]] = 0
    logps = -torch.rand(2, n, dtype=torch.float64) * 3
    teacher = Hidden(torch.randn(n, 4, dtype=torch.float64), torch.randn(vocab, 4, dtype=torch.float64))
    ids, advantage = torch.randint(0, vocab, (n,)), torch.randn(n, dtype=torch.float64)
    return Tokens(ids, weight, advantage, logps[0], logps[1], teacher)


def _part(tokens: Tokens, keep: slice) -> Tokens:
    plain = (tokens.ids_N, tokens.weight_N, tokens.advantage_N, tokens.old_N, tokens.ref_N)
    teacher = tokens.teacher.index_select(torch.arange(len(tokens.ids_N))[keep])
    return Tokens(*(None if x is None else x[keep] for x in plain), teacher)


@pytest.fixture(params=sorted(list_parts("losses")))
def objective(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    part = load_part("losses", request.param)
    objective = partial(part.loss, **OPTIONS.get(request.param, {}))
    objective.detached = getattr(part, "DETACHED", None)
    objective.spans = request.param == "span_likelihood"
    return objective


@pytest.fixture
def case(objective) -> tuple[torch.Tensor, torch.Tensor, Tokens]:  # type: ignore[no-untyped-def]
    tokens = _tokens()
    if objective.spans:  # each token a span of its own, so that any split keeps them whole
        tokens.teacher = Spans(torch.arange(12) * 3, -torch.rand(12).double())
    torch.manual_seed(2)
    hidden = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    return hidden, torch.randn(7, 5, dtype=torch.float64, requires_grad=True), tokens


def test_masked_tokens_give_no_gradient(objective, case) -> None:  # type: ignore[no-untyped-def]
    hidden, table, tokens = case
    value, metrics = objective(hidden, table, tokens)
    assert not any(metric.requires_grad for metric in metrics.values())  # else a step's metrics keep its graph
    value.backward()
    assert (hidden.grad[tokens.weight_N == 0] == 0).all()
    assert (hidden.grad[tokens.weight_N != 0] != 0).any(dim=1).all()


def test_gradcheck(objective, case) -> None:  # type: ignore[no-untyped-def]
    hidden, table, tokens = case
    if objective.detached:
        pytest.skip(f"{objective.detached} carries no gradient: compared with its plain twin in test_divergences.py")
    assert torch.autograd.gradcheck(lambda h, w: objective(h, w, tokens)[0], (hidden, table), atol=1e-6)


@pytest.mark.parametrize("cut", [1, 6, 11])
def test_any_split_gives_the_same_sum_and_gradient(objective, case, cut: int) -> None:  # type: ignore[no-untyped-def]
    hidden, table, tokens = case
    whole = objective(hidden, table, tokens)[0]
    parts = [objective(hidden[s], table, _part(tokens, s))[0] for s in (slice(0, cut), slice(cut, None))]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(
        torch.autograd.grad(sum(parts), (hidden, table)), torch.autograd.grad(whole, (hidden, table))
    )


def test_behind_a_softcap() -> None:
    """c tanh(z / c) before the softmax, written out."""
    hidden, table, tokens = 3 * torch.randn(12, 5).double(), torch.randn(7, 5).double(), _tokens()
    tokens.softcap = 2.0
    logp = (2 * torch.tanh(hidden @ table.T / 2)).log_softmax(-1)[torch.arange(12), tokens.ids_N]
    tokens.old_N = logp
    value, _ = next_token.loss(hidden, table, tokens)
    assert value.item() == pytest.approx(-float((tokens.weight_N * logp).sum()))
    assert policy.loss(hidden, table, tokens)[1]["ratio_error"].item() == pytest.approx(0, abs=1e-9)


def _policy_of(delta: float, advantage: float, **options: float) -> tuple[float, float]:
    """(loss, d loss / d logp) of one token whose new logprob is `delta` above the old one."""
    hidden = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    table = torch.tensor([[0.3], [0.0]], dtype=torch.float64)
    logp = torch.log_softmax(hidden @ table.T, -1)[0, 0]
    old = (logp - delta).detach().reshape(1)
    tokens = Tokens(torch.tensor([0]), torch.ones(1, dtype=torch.float64), torch.tensor([advantage]).double(), old, old)
    loss, _ = policy.loss(hidden, table, tokens, **options)
    slope = torch.autograd.grad(logp, hidden)[0].item()
    return loss.item(), torch.autograd.grad(loss, hidden)[0].item() / slope


def test_on_policy_the_gradient_is_minus_the_advantage() -> None:
    value, slope = _policy_of(0.0, 1.5)
    assert value == pytest.approx(-1.5) and slope == pytest.approx(-1.5)


@pytest.mark.parametrize(
    ("delta", "advantage", "moves"), [(0.5, 1.0, False), (-0.5, 1.0, True), (-0.5, -1.0, False), (0.5, -1.0, True)]
)
def test_clipping_stops_only_what_went_far_enough(delta: float, advantage: float, moves: bool) -> None:
    _, slope = _policy_of(delta, advantage, clip_low=0.2, clip_high=0.28)
    assert (slope != 0) is moves


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"), [(1.27, 1.0, True), (1.29, 1.0, False), (0.81, -1.0, True), (0.79, -1.0, False)]
)
def test_clip_higher_unless_said_otherwise(ratio: float, advantage: float, moves: bool) -> None:
    """DAPO's bounds (arXiv 2503.14476): 0.2 below, 0.28 above."""
    value, slope = _policy_of(math.log(ratio), advantage)
    assert (slope != 0) is moves
    assert value == pytest.approx(-advantage * (ratio if moves else {1.29: 1.28, 0.79: 0.8}[ratio]))


def test_metrics_are_weighted_sums_by_hand() -> None:
    """One token beyond the clip, one without weight, one within; entropy at the temperature, by torch."""
    hidden, table = torch.randn(3, 5).double(), torch.randn(7, 5).double()
    now = torch.distributions.Categorical(logits=hidden @ table.T / 0.7)
    ids, weight = torch.tensor([1, 2, 3]), torch.tensor([0.5, 0.0, 0.25]).double()
    logp = now.log_prob(ids)
    old = logp - torch.tensor([1.5, 1.0, 1.25]).double().log()
    old[1] = -1e4  # whatever stands where there is no weight
    tokens = Tokens(ids, weight, torch.ones(3).double(), old, logp + torch.tensor([0.1, 5.0, -0.1]).double())
    value, metrics = policy.loss(hidden, table, tokens, kl_beta=0.3, temperature=0.7)
    k3 = [0.00517092, 0.0, 0.00483742]
    assert metrics["clipped"].item() == 0.5
    assert metrics["ratio_error"].item() == pytest.approx(0.5 * math.log(1.5) + 0.25 * math.log(1.25))
    assert metrics["kl"].item() == pytest.approx(0.5 * k3[0] + 0.25 * k3[2], rel=1e-5)
    assert metrics["entropy"].item() == pytest.approx(float((weight * now.entropy()).sum()))
    want = 0.5 * (-1.28 + 0.3 * 1.5 * k3[0]) + 0.25 * (-1.25 + 0.3 * 1.25 * k3[2])
    assert value.item() == pytest.approx(want, rel=1e-6)


def test_r1s_epsilon_of_ten_never_clips_ratios_below_eleven() -> None:
    _, slope = _policy_of(2.39, 1.0, clip_low=10.0, clip_high=10.0)  # ratio 10.9
    assert slope == pytest.approx(-10.913, rel=1e-3)


@pytest.mark.parametrize(
    ("gap", "k3"), [(0.1, 0.0051709), (-0.1, 0.0048374), (1.0, 0.7182818), (0.0, 0.0), (1e3, 485165174.4)]
)
def test_kl_golden_values(gap: float, k3: float) -> None:
    """D = ref - logp, at most 20; the estimator exp(D) - D - 1, times the ratio (1 here)."""
    hidden = torch.tensor([[1.0]], dtype=torch.float64)
    table = torch.tensor([[0.3], [0.0]], dtype=torch.float64)
    logp = torch.log_softmax(hidden @ table.T, -1)[0, :1]
    tokens = Tokens(torch.tensor([0]), torch.ones(1).double(), torch.zeros(1).double(), logp, logp + gap)
    loss, metrics = policy.loss(hidden, table, tokens, kl_beta=1.0)
    assert loss.item() == pytest.approx(k3, rel=1e-6, abs=1e-6) == metrics["kl"].item()


def test_missing_logprobs_raise_instead_of_falling_back() -> None:
    hidden, table, tokens = torch.randn(12, 5).double(), torch.randn(7, 5).double(), _tokens()
    tokens.ref_N = None
    with pytest.raises(ValueError, match="ref_N"):
        policy.loss(hidden, table, tokens, kl_beta=0.1)
    tokens.old_N = None
    with pytest.raises(ValueError, match="old_N"):
        policy.loss(hidden, table, tokens)
    tokens = _tokens()
    tokens.advantage_N = None
    with pytest.raises(ValueError, match="advantage_N"):
        policy.loss(hidden, table, tokens)
