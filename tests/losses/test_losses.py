"""What every objective promises, over the folder: masks, gradients, splits; and the policy's own numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from shoestring.core.registry import list_parts, load_part
from shoestring.losses import policy
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
    objective(hidden, table, tokens)[0].backward()
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


def test_r1s_epsilon_of_ten_never_clips_ratios_below_eleven() -> None:
    _, slope = _policy_of(2.39, 1.0, clip_low=10.0, clip_high=10.0)  # ratio 10.9
    assert slope == pytest.approx(-10.913, rel=1e-3)


@pytest.mark.parametrize(("gap", "k3"), [(0.1, 0.0051709), (-0.1, 0.0048374), (1.0, 0.7182818), (0.0, 0.0)])
def test_kl_golden_values(gap: float, k3: float) -> None:
    """facts: D = ref - logp; the estimator exp(D) - D - 1, times the ratio (1 here)."""
    hidden = torch.tensor([[1.0]], dtype=torch.float64)
    table = torch.tensor([[0.3], [0.0]], dtype=torch.float64)
    logp = torch.log_softmax(hidden @ table.T, -1)[0, :1]
    tokens = Tokens(torch.tensor([0]), torch.ones(1).double(), torch.zeros(1).double(), logp, logp + gap)
    loss, metrics = policy.loss(hidden, table, tokens, kl_beta=1.0)
    assert loss.item() == pytest.approx(k3, abs=1e-6) and metrics["kl"].item() == pytest.approx(k3, abs=1e-6)


def test_missing_logprobs_raise_instead_of_falling_back() -> None:
    hidden, table, tokens = torch.randn(12, 5).double(), torch.randn(7, 5).double(), _tokens()
    tokens.ref_N = None
    with pytest.raises(ValueError, match="ref_N"):
        policy.loss(hidden, table, tokens, kl_beta=0.1)
    tokens.old_N = None
    with pytest.raises(ValueError, match="old_N"):
        policy.loss(hidden, table, tokens)
