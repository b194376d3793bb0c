"""Who goes to which expert with what weight, and how load moves the bias (V3 section 2.1.2)."""

from __future__ import annotations

import itertools

import model_sizes as sizes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoestring.nn import native
from shoestring.nn.moe import Gate, Routing, balance_loss, expert_load, update_router_bias

GROUPED = Routing(8, 3, n_group=4, topk_group=2, scale=2.5)
V3 = Routing(256, 8, n_group=8, topk_group=4, scale=2.5)
LOGITS = [2, -1, 0, 1, -2, 3, 0.5, 0.5]


def route(routing: Routing, logits: list[float], bias: dict[int, float], in_c: bool = False) -> dict[int, float]:
    """Expert -> weight for one token, through the gate itself (W = identity)."""
    gate = Gate(routing.n_experts, routing)
    with torch.no_grad():
        gate.weight.copy_(torch.eye(routing.n_experts))
        assert gate.e_score_correction_bias is not None
        for expert, value in bias.items():
            gate.e_score_correction_bias[expert] = value
    _, chosen, weight = gate(torch.tensor([logits], dtype=torch.float32), None, in_c and native.why_not() is None)
    return dict(zip(chosen[0].tolist(), weight[0].tolist(), strict=True))


@pytest.mark.parametrize(
    ("logits", "bias", "expected"),
    [
        (LOGITS, {}, {3: 0.924933, 6: 0.787533, 7: 0.787533}),  # 5 has the best score, in a lost group
        (LOGITS, {5: 0.3}, {5: 1.083706, 6: 0.708147, 7: 0.708147}),
        # masked groups are -inf: with 0 in their place they would beat the biased scores below 0 of chosen groups
        (
            [3, -4, -4, -4, 2, -3, -4, -4],
            dict.fromkeys((1, 3, 5, 6, 7), -0.3),
            {0: 1.266184, 4: 1.170776, 5: 0.063040},
        ),
    ],
)
def test_golden_numbers(logits: list[float], bias: dict[int, float], expected: dict[int, float]) -> None:
    for in_c in (False, True):
        found = route(GROUPED, logits, bias, in_c)
        assert found.keys() == expected.keys()
        assert [found[e] for e in expected] == pytest.approx(list(expected.values()), abs=1e-6)


def drawn(seed: int, routing: Routing, n: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    score_NE = torch.randn(n, routing.n_experts, generator=generator).sigmoid()
    return score_NE, 0.2 * torch.randn(routing.n_experts, generator=generator)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_v3_routing(seed: int) -> None:
    score_NE, bias_E = drawn(seed, V3)
    chosen_NA = V3.choose(score_NE, bias_E)
    for row in chosen_NA.tolist():
        assert len(set(row)) == 8
        assert len({expert // 32 for expert in row}) <= 4
    weight_NA = V3.weigh(score_NE, chosen_NA)
    torch.testing.assert_close(weight_NA.sum(-1), torch.full((40,), 2.5))
    torch.testing.assert_close(weight_NA, 2.5 * torch.softmax(score_NE.gather(1, chosen_NA).log(), -1))


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_the_chosen_are_the_best_of_the_best_groups(seed: int) -> None:
    """Against all possibilities, counted out."""
    score_NE, bias_E = drawn(seed, GROUPED, n=5)
    for choice_E, found in zip(score_NE + bias_E, GROUPED.choose(score_NE, bias_E).tolist(), strict=True):
        value = dict(enumerate(choice_E.tolist()))
        pairs = itertools.combinations(range(4), 2)
        groups = max(pairs, key=lambda pair: sum(value[2 * g] + value[2 * g + 1] for g in pair))
        inside = sorted((e for e in value if e // 2 in groups), key=value.__getitem__, reverse=True)
        assert found == inside[:3]


@pytest.mark.parametrize(("n_group", "topk_group"), [(8, 3), (2, 1)])
def test_groups_of_one_expert_and_two_groups(n_group: int, topk_group: int) -> None:
    """A group's score is the sum of as many of its two best as it has."""
    routing = Routing(8, 3, n_group=n_group, topk_group=topk_group)
    score_NE, bias_E = drawn(7, routing)
    for choice_E, found in zip((score_NE + bias_E).tolist(), routing.choose(score_NE, bias_E).tolist(), strict=True):
        groups = [sorted(range(i, i + 8 // n_group), key=lambda e: -choice_E[e]) for i in range(0, 8, 8 // n_group)]
        best = sorted(groups, key=lambda group: -sum(choice_E[e] for e in group[:2]))[:topk_group]
        assert found == sorted(itertools.chain(*best), key=lambda e: -choice_E[e])[:3]


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), shift=st.floats(-0.5, 0.5))
def test_a_constant_in_the_bias_changes_nothing(seed: int, shift: float) -> None:
    score_NE, bias_E = (x.double() for x in drawn(seed, V3))
    assert torch.equal(V3.choose(score_NE, bias_E), V3.choose(score_NE, bias_E + shift))


def test_weights_depend_on_the_bias_only_through_the_choice() -> None:
    routing = Routing(8, 3)
    base = route(routing, LOGITS, {})
    assert route(routing, LOGITS, {5: 0.4, 0: 0.1}) == base  # the same three are chosen: 0, 3, 5
    moved = route(routing, LOGITS, {0: -5.0})
    assert moved.keys() != base.keys()
    score = torch.tensor(LOGITS).sigmoid()
    assert moved[5] == pytest.approx((score[5] / sum(score[e] for e in moved)).item(), abs=1e-6)


def test_without_groups_it_is_top_k() -> None:
    routing = Routing(64, 6, scale=2.446)
    score_NE, bias_E = drawn(0, routing)
    assert torch.equal(routing.choose(score_NE, bias_E), (score_NE + bias_E).topk(6).indices)
    assert torch.equal(routing.choose(score_NE, torch.zeros(64)), score_NE.topk(6).indices)


def test_v2_routing() -> None:
    """Softmax scores, a group counts by its best, weights are the scores themselves times the scale."""
    routing = Routing(8, 3, scoring="softmax", n_group=4, topk_group=2, normalise=False, scale=16.0)
    gate = Gate(8, routing)
    assert gate.e_score_correction_bias is None
    with torch.no_grad():
        gate.weight.copy_(torch.eye(8))
    _, chosen, weight = gate(torch.tensor([LOGITS]), None)
    assert chosen.tolist() == [[5, 0, 1]]  # groups (4, 5) and (0, 1); 4 has the least
    torch.testing.assert_close(weight, 16 * torch.tensor(LOGITS).softmax(0)[chosen])


def test_the_bias_gets_no_gradient_and_replay_keeps_weights_live() -> None:
    gate = Gate(8, GROUPED)
    torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(0))
    x_ND = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    _, chosen, weight = gate(x_ND, None)
    _, replayed, again = gate(x_ND, chosen)
    assert torch.equal(replayed, chosen) and torch.equal(again, weight)
    weight.square().sum().backward()
    assert gate.weight.grad is not None and gate.weight.grad.any()
    assert [name for name, _ in gate.named_parameters()] == ["weight"]


# ---- balancing
def biases(model: torch.nn.Module) -> Tensor:
    return torch.stack([b.clone() for name, b in model.named_buffers() if name.endswith("correction_bias")])


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_update_of_the_bias(mtp: bool, centred: bool) -> None:
    config = sizes.deepseek(**sizes.V3)
    model = sizes.make(config)
    before = biases(model)
    out = model(sizes.tokens(config, 2, 16), mtp=mtp)
    load_LE = out.expert_load_LE
    assert load_LE is not None and load_LE.sum(-1).tolist() == [2 * 16 * 3] * 2 + [2 * 15 * 3] * mtp
    update_router_bias(model, load_LE, 0.0, centred=centred)
    assert torch.equal(biases(model), before)  # γ = 0 freezes
    update_router_bias(model, load_LE, 0.001, centred=centred)
    moved = (biases(model) - before)[: len(load_LE)]
    sign = torch.sign(load_LE.float().mean(-1, keepdim=True) - load_LE)
    if centred:
        torch.testing.assert_close(moved.sum(-1), torch.zeros(len(load_LE)), atol=1e-6, rtol=0)
        sign = sign - sign.mean(-1, keepdim=True)
    torch.testing.assert_close(moved, 0.001 * sign, atol=1e-6, rtol=0)
    if not mtp:
        assert torch.equal(biases(model)[2:], before[2:])


def test_bias_moves_by_zero_or_gamma() -> None:
    gate = Gate(4, Routing(4, 1))
    update_router_bias(gate, torch.tensor([[10, 5, 5, 0]]), 0.001)
    assert gate.e_score_correction_bias is not None
    assert gate.e_score_correction_bias.tolist() == pytest.approx([-0.001, 0, 0, 0.001])


def test_load_skips_padding() -> None:
    chosen_BTA = torch.tensor([[[0, 1], [1, 2], [3, 0]]])
    counted_BT = torch.tensor([[True, True, False]])
    assert expert_load([chosen_BTA], 4, None).tolist() == [[2, 2, 1, 1]]
    assert expert_load([chosen_BTA, chosen_BTA[:, :1]], 4, counted_BT).tolist() == [[1, 2, 1, 0], [1, 1, 0, 0]]


def test_balance_loss_is_one_when_uniform() -> None:
    B, T, E, A = 3, 16, 8, 2
    score_BTE = torch.full((B, T, E), 0.7)
    chosen_BTA = (torch.arange(T * A) % E).view(1, T, A).expand(B, T, A)
    assert balance_loss(score_BTE, chosen_BTA, None).item() == pytest.approx(1.0)
    counted_BT = torch.arange(T).expand(B, T) < 8  # half of each sequence is padding; the rest is uniform too
    assert balance_loss(score_BTE, chosen_BTA, counted_BT).item() == pytest.approx(1.0)


def test_balance_loss_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    score_BTE = torch.rand(2, 5, 4, generator=generator)
    chosen_BTA = score_BTE.topk(2).indices
    total = 0.0
    for b in range(2):
        for i in range(4):
            f = 4 / (2 * 5) * sum(i in chosen_BTA[b, t].tolist() for t in range(5))
            P = sum((score_BTE[b, t, i] / score_BTE[b, t].sum()).item() for t in range(5)) / 5
            total += f * P
    assert balance_loss(score_BTE, chosen_BTA, None).item() == pytest.approx(total / 2, rel=1e-5)


def test_a_sequence_of_one_token_counts_whole_and_one_of_none_not_at_all() -> None:
    score_BTE = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(0))
    chosen_BTA = score_BTE.topk(3).indices
    counted_BT = torch.tensor([[True] + [False] * 4] * 2)
    one = balance_loss(score_BTE[:, :1], chosen_BTA[:, :1], None)
    torch.testing.assert_close(balance_loss(score_BTE, chosen_BTA, counted_BT), one)
    assert balance_loss(score_BTE, chosen_BTA, torch.zeros_like(counted_BT)) == 0


@pytest.mark.parametrize("in_c", [False, True])
def test_scores_that_are_all_zero_weigh_nothing(in_c: bool) -> None:
    """Where every sigmoid underflows: 0 / (0 + 1e-20), as in transformers, and no NaN."""
    gate = Gate(2, Routing(8, 3))
    torch.nn.init.constant_(gate.weight, -200.0)
    _, _, weight = gate(torch.ones(4, 2), None, in_c and native.why_not() is None)
    assert (weight.abs() < 1e-15).all()


def test_all_on_the_same_experts_is_worst() -> None:
    score_BTE = torch.tensor([4.0, 4.0, 0.0, 0.0]).expand(1, 6, 4)
    chosen_BTA = torch.tensor([0, 1]).expand(1, 6, 2)
    assert balance_loss(score_BTE, chosen_BTA, None).item() == pytest.approx(2.0)  # E / A


def test_models_sum_the_balance_of_their_layers() -> None:
    config = sizes.deepseek(**sizes.V3)
    model = sizes.make(config)
    x_BT = sizes.tokens(config, 2, 16)
    main, more = model(x_BT, balance=True).balance, model(x_BT, balance=True, mtp=True).balance
    assert main is not None and more is not None
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Gate):
                module.weight.zero_()  # equal scores: P is uniform, so f·P sums to 1 whoever is chosen
    assert model(x_BT, balance=True).balance.item() == pytest.approx(2.0, abs=1e-5)  # type: ignore[union-attr]
    assert model(x_BT, balance=True, mtp=True).balance.item() == pytest.approx(3.0, abs=1e-5)  # type: ignore[union-attr]
