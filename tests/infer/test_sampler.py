"""Sampling: the right distribution, the right logprobs, nothing impossible."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoestring.core.nouns import Sampling
from shoestring.infer import uniforms as random_numbers
from shoestring.infer.sampler import draw_in_blocks, draw_natively, kept, sample
from shoestring.nn import native


def uniforms(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_kept(logits_V: Tensor, top_k: int, top_p: float) -> list[int]:
    """The readable twin: token by token, the most probable first."""
    order = logits_V.argsort(descending=True).tolist()[: top_k or None]
    p = torch.softmax(logits_V[order].double(), dim=-1).tolist()
    chosen, mass = [], 0.0
    for token, probability in zip(order, p, strict=True):
        if mass >= top_p:
            break
        chosen.append(token)
        mass += probability
    return chosen


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.6}]
)
def test_frequencies_are_the_probabilities(options: dict[str, float]) -> None:
    sampling = Sampling(**options)  # type: ignore[arg-type]
    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -30.0])
    expected_V = torch.zeros(6)
    chosen = plain_kept(logits_V / sampling.temperature, sampling.top_k, sampling.top_p)
    expected_V[chosen] = torch.softmax(logits_V[chosen] / sampling.temperature, dim=-1)
    n = 40_000
    drawn = sample(logits_V.expand(n, -1), uniforms(n), [sampling] * n)
    token_N, logprob_N = torch.tensor(drawn.tokens), torch.tensor(drawn.logprobs)
    observed_V = token_N.bincount(minlength=6) / n
    assert (observed_V - expected_V).abs().max() < 5 * 0.5 / n**0.5  # five standard errors
    assert torch.allclose(logprob_N, expected_V.log()[token_N], atol=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 400), st.integers(0, 60), st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_the_kept_set_is_that_of_the_plain_twin(seed: int, vocab: int, top_k: int, top_p: float) -> None:
    logits_RV = 2 * torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed))
    p_RS, ids_RS = kept(logits_RV.softmax(-1), [Sampling(top_k=top_k, top_p=top_p)] * 3)
    assert torch.allclose(p_RS.sum(-1), torch.ones(3))
    for row in range(3):
        ours = set(ids_RS[row][p_RS[row] > 0].tolist())
        slack = 1e-5  # the mass that reaches top_p is summed in another order
        assert set(plain_kept(logits_RV[row], top_k, max(top_p - slack, 1e-9))) <= ours
        assert ours <= set(plain_kept(logits_RV[row], top_k, min(top_p + slack, 1.0)))


def test_top_p_widens_until_it_holds_enough() -> None:
    p_RS, _ = kept(torch.full((2, 5000), 1 / 5000), [Sampling(top_p=0.9)] * 2)
    assert int((p_RS[0] > 0).sum()) in (4500, 4501)  # fp32 sums of 1/5000


def test_an_impossible_token_is_never_drawn() -> None:
    logits_RV = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(4, -1)
    edges_R = torch.tensor([0.0, 0.5, 0.5 - 1e-12, 1 - 2**-53], dtype=torch.float64)
    drawn = sample(logits_RV, edges_R, [Sampling()] * 4)
    assert drawn.tokens == [1, 3, 1, 3]
    assert torch.allclose(torch.tensor(drawn.logprobs), torch.tensor(0.5).log())


def test_greedy() -> None:
    logits_RV = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.0, 0.0]])
    drawn = sample(logits_RV, uniforms(2), [Sampling(temperature=0.0)] * 2)
    token_R, logprob_R = torch.tensor(drawn.tokens), torch.tensor(drawn.logprobs)
    assert token_R.tolist() == [1, 0]
    assert torch.allclose(logprob_R, logits_RV.log_softmax(-1).gather(1, token_R[:, None]).squeeze(1))


def test_a_low_temperature_is_nearly_greedy() -> None:
    drawn = sample(torch.tensor([[0.0, 1.0]]).expand(100, -1), uniforms(100), [Sampling(temperature=0.01)] * 100)
    assert drawn.tokens == [1] * 100


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.5}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinite_logits_are_refused(options: dict[str, float], bad: float) -> None:
    logits_RV = torch.zeros(3, 5)
    logits_RV[1, 2] = bad
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        sample(logits_RV, uniforms(3), [Sampling(**options)] * 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [8192, 8192 + 77])
def test_a_draw_by_blocks_is_the_plain_draw(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    p_RV = torch.softmax(3 * torch.randn(64, width, generator=generator), dim=-1)
    p_RV[:32, ::2] = 0  # what is banned is never drawn
    p_RV[3, :] = 0
    p_RV[3, -1] = 1.0
    p_RV[4, :] = 0
    p_RV[4, 0] = 1.0
    u_R = torch.rand(64, dtype=torch.float64, generator=generator)
    u_R[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    token_R, mass_R = draw_in_blocks(p_RV, u_R)
    cumulative_RV = p_RV.cumsum(-1, dtype=torch.float64)
    plain_R = torch.searchsorted(cumulative_RV, u_R[:, None] * cumulative_RV[:, -1:], right=True).squeeze(1)
    before_R = (cumulative_RV - p_RV).gather(1, token_R[:, None]).squeeze(1) / cumulative_RV[:, -1]
    after_R = cumulative_RV.gather(1, token_R[:, None]).squeeze(1) / cumulative_RV[:, -1]
    assert bool(((u_R > before_R - 1e-6) & (u_R < after_R + 1e-6)).all())  # fp32 sums of blocks
    assert (token_R == plain_R).float().mean() > 0.9 and bool((mass_R > 0).all())
    assert torch.equal(mass_R, p_RV.gather(1, token_R[:, None]).squeeze(1))
    alone = [draw_in_blocks(p_RV[r : r + 1], u_R[r : r + 1])[0].item() for r in range(0, 64, 9)]
    assert alone == token_R[::9].tolist()  # whoever else draws


@pytest.mark.skipif(native.why_not() is not None, reason=f"no C here: {native.why_not()}")
@pytest.mark.parametrize("width", [7, 320, 8_192, 33_001])
def test_a_draw_in_c_is_a_plain_one(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same token but at the very edge of one, the same logprob, nothing that was ruled out; `sample` takes it."""
    torch.manual_seed(2)
    logits_RV = 4 * torch.randn(64, width)
    logits_RV[::3, : width // 2] = float("-inf")
    logits_RV[3, :-1] = float("-inf")
    logits_RV[4] -= 300.0
    u_R = uniforms(64, 1)
    u_R[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    options = [Sampling(temperature=0.5 + row % 3 / 2) for row in range(64)]
    token_R, logp_R = draw_natively(logits_RV, u_R, [s.temperature for s in options])
    temperature_R1 = torch.tensor([s.temperature for s in options])[:, None]
    exact_RV = torch.log_softmax(logits_RV.double() / temperature_R1, dim=-1)
    torch.testing.assert_close(logp_R.double(), exact_RV.gather(1, token_R[:, None])[:, 0], atol=2e-6, rtol=1e-6)
    upto_RV = exact_RV.exp().cumsum(-1)
    after_R = upto_RV.gather(1, token_R[:, None])[:, 0]
    before_R = after_R - logp_R.double().exp()
    assert bool(((u_R > before_R - 1e-6) & (u_R < after_R + 1e-6)).all()) and bool((logp_R > -60).all())
    drawn = sample(logits_RV, u_R, options)
    assert drawn.tokens == token_R.tolist() and drawn.logprobs == logp_R.tolist()
    alone = sample(logits_RV[5:6].clone(), u_R[5:6], options[5:6])
    assert (alone.tokens[0], alone.logprobs[0]) == (drawn.tokens[5], drawn.logprobs[5])  # whoever else draws
    broken_RV = logits_RV.clone()
    broken_RV[7, 3] = float("nan")
    with pytest.raises(FloatingPointError):
        sample(broken_RV, u_R, options)
    monkeypatch.setattr(native, "why_not", lambda: "it is not wanted")
    plain = sample(logits_RV, u_R, options)
    assert sum(a == b for a, b in zip(plain.tokens, drawn.tokens, strict=True)) >= 62


@pytest.mark.skipif(native.why_not() is not None, reason=f"no C here: {native.why_not()}")
def test_rows_in_c_and_others_in_one_batch() -> None:
    """Greedy, free, cut and listed rows: each gets what it gets alone, to the bit."""
    torch.manual_seed(3)
    logits_RV, u_R = 4 * torch.randn(12, 700), uniforms(12, 4)
    logits_RV[0, 5] = logits_RV[0, 9] = 30.0  # equals: the first
    kinds = [
        {"temperature": 0.0},
        {},
        {"top_k": 4},
        {"temperature": 0.0, "top_logprobs": 2},
        {"top_p": 0.5},
        {"min_p": 0.1},
    ]
    options = [Sampling(**kinds[row % 6]) for row in range(12)]  # type: ignore[arg-type]
    drawn = sample(logits_RV, u_R, options)
    for row in range(12):
        alone = sample(logits_RV[row : row + 1], u_R[row : row + 1], options[row : row + 1])
        assert (alone.tokens[0], alone.logprobs[0]) == (drawn.tokens[row], drawn.logprobs[row])
        assert alone.top.get(0) == drawn.top.get(row) and (row in drawn.top) == bool(options[row].top_logprobs)
    assert drawn.tokens[0] == 5 and drawn.tokens[6] == int(logits_RV[6].argmax())
    exact_RV = torch.log_softmax(logits_RV.double(), dim=-1)
    assert drawn.logprobs[6] == pytest.approx(float(exact_RV[6].max()), abs=2e-6)


def test_one_number_for_each_draw_however_many_are_made() -> None:
    """The first is splitmix64's, published for seed 1234567; few rows, by Python's integers, get what many get."""
    keys = [1234567, 0, (1 << 64) - 1, *(random_numbers.draw_key(7, row, 0) for row in range(40))]
    positions = [0, 3, 1 << 40, *range(40)]
    many = random_numbers.uniforms(keys, positions)
    assert many[0] == (6457827717110365317 >> 11) * 2.0**-53
    one_by_one = [random_numbers.uniforms([key], [at])[0] for key, at in zip(keys, positions, strict=True)]
    assert many.tolist() == one_by_one and many.min() >= 0 and many.max() < 1


@pytest.mark.parametrize("width", [6, 600])
@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"top_k": 2}, [1, 2]), ({"top_k": 3}, [1, 2, 4]), ({"top_p": 0.5}, [1, 2]), ({"top_p": 0.2}, [1]),
        ({"top_k": 4, "top_p": 0.75}, [1, 2, 4]), ({"min_p": 1.0}, [1, 2, 4, 5]),
    ],
)  # fmt: skip
def test_of_equals_the_smaller_id_is_kept(options: dict[str, float], chosen: list[int], width: int) -> None:
    """Exactly k of them, and the fewest that reach top-p, as the documentation of the options says it; `transformers`
    keeps every token that equals the k-th. Where nothing is equal the two are the same (test_every_option.py)."""
    logits_RV = torch.full((2000, width), -40.0)
    logits_RV[:, [1, 2, 4, 5]] = 0.0  # 1/4 each
    drawn = sample(logits_RV, uniforms(2000), [Sampling(**options)] * 2000)  # type: ignore[arg-type]
    assert sorted(set(drawn.tokens)) == chosen
    assert drawn.logprobs == pytest.approx([-torch.tensor(float(len(chosen))).log().item()] * 2000, abs=1e-5)
