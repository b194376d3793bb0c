"""What is computed in C between the products equals its twins, forward and backward, whatever the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import model_sizes as sizes
import pytest
import torch
from torch import Tensor

from shoestring.nn import native
from shoestring.nn.elements import usable
from shoestring.nn.experts import NATIVE, WAYS, Order, experts_plain, native_order
from shoestring.nn.head import cross_entropy_sum, plain_cross_entropy_sum, plain_token_logprobs, token_logprobs
from shoestring.nn.kernels import Kernels
from shoestring.nn.linear import swiglu, swiglu_plain
from shoestring.nn.mla import heads, heads_plain
from shoestring.nn.moe import Gate, Routing, balance_loss
from shoestring.nn.norm import rms_norm, rms_norm_plain
from shoestring.nn.rope import Rope, rotate, rotate_plain

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason="no native library here")
Way = Callable[..., Any]


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


def run(way: Way, inputs: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs and the gradients of a fixed sum of them, in fp32 or better."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = way(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    seeds = [draw(*y.shape, seed=7 + i).to(y.dtype) for i, y in enumerate(outs)]
    grads = torch.autograd.grad(sum((y * s).sum() for y, s in zip(outs, seeds, strict=True)), leaves)
    return [x.detach() for x in (*outs, *grads)]


def norm(f: Way) -> Way:
    return lambda x, w: f(x[..., 1:], w, 1e-6)  # a slice, as of a wider product


CIS = Rope(8, 1e4).table(torch.arange(5))
EACH = Rope(8, 1e4).table(torch.arange(15).view(3, 5))  # positions of each row of the batch
# name: (plain twin, torch's fast twin, in C, inputs)
CASES: dict[str, tuple[Way, Way, Way, list[Tensor]]] = {
    "norm": (
        norm(rms_norm_plain), norm(rms_norm), norm(lambda *a: rms_norm(*a, native=True)), [draw(3, 100, 34), draw(33)],
    ),
    "norm of many rows": (
        norm(rms_norm_plain), norm(rms_norm), norm(lambda *a: rms_norm(*a, native=True)), [draw(1300, 17), draw(16)],
    ),
    "swiglu": (swiglu_plain, swiglu, lambda h: swiglu(h, native=True), [draw(7, 300, 38, scale=4.0)]),
    "vocabulary": (
        lambda h, w: plain_cross_entropy_sum(h, w, IDS, WEIGHT),
        lambda h, w: cross_entropy_sum(h, w, IDS, WEIGHT, chunk=16)[0],
        lambda h, w: cross_entropy_sum(h, w, IDS, WEIGHT, chunk=16, native=True)[0],
        [draw(40, 24), draw(1031, 24)],
    ),
    "logprobs": (
        lambda h, w: plain_token_logprobs(h, w, IDS, temperature=0.7),
        lambda h, w: token_logprobs(h, w, IDS, temperature=0.7, chunk=16)[0],
        lambda h, w: token_logprobs(h, w, IDS, temperature=0.7, chunk=16, native=True)[0],
        [draw(40, 24), draw(1031, 24)],
    ),
}  # fmt: skip
IDS = torch.randint(0, 1031, (40,), generator=torch.Generator().manual_seed(3))
WEIGHT = draw(40).abs() / 40
for pairs in (True, False):
    for cis in (CIS, EACH):
        name = f"{'neighbours' if pairs else 'halves'}, {'one' if cis is CIS else 'each'}"
        CASES[f"rotate, {name}"] = (
            lambda x, p=pairs, c=cis: rotate_plain(x[..., 1:3, :].float(), c, interleaved=p).to(x.dtype),
            lambda x, p=pairs, c=cis: rotate(x[..., 1:3, :], c, interleaved=p),
            lambda x, p=pairs, c=cis: rotate(x[..., 1:3, :], c, interleaved=p, native=True),
            [draw(3, 5, 4, 8)],
        )
        CASES[f"heads, {name}"] = (
            lambda q, kv, pe, p=pairs, c=cis: heads_plain(q, kv, pe[..., 1:], c, 6, p),
            lambda q, kv, pe, p=pairs, c=cis: heads(q, kv, pe[..., 1:], c, 6, p),
            lambda q, kv, pe, p=pairs, c=cis: heads(q, kv, pe[..., 1:], c, 6, p, native=True),
            [draw(3, 5, 2, 14), draw(3, 5, 2, 16), draw(3, 5, 9)],
        )


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_equals_plain(name: str) -> None:
    plain, _, fast, inputs = CASES[name]
    for got, want in zip(run(fast, inputs), run(plain, inputs), strict=True):
        assert got.shape == want.shape and want.any()
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_no_further_from_the_truth_than_torch(name: str) -> None:
    plain, slow, fast, inputs = CASES[name]
    rounded = [x.bfloat16().float() for x in inputs]
    truth = run(plain, rounded)
    for got, other, want in zip(
        run(fast, rounded, torch.bfloat16), run(slow, rounded, torch.bfloat16), truth, strict=True
    ):
        assert got.dtype == other.dtype
        assert (got.float() - want).norm() <= 1.2 * (other.float() - want).norm() + 1e-6 * want.norm()


@pytest.mark.parametrize("name", ["norm of many rows", "swiglu", "vocabulary", "heads, halves, one"])
def test_threads_change_no_bit(name: str, threads: int) -> None:
    _, _, fast, inputs = CASES[name]
    inputs = inputs if name == "vocabulary" else [x.repeat(5, *[1] * (x.ndim - 1)) if x.ndim > 1 else x for x in inputs]
    got = run(fast, inputs)
    torch.set_num_threads(3)
    if name == "vocabulary":  # torch's products may differ with the threads: the C side alone
        got, want = ([_slopes(n) for n in (threads, 3)][i : i + 1] for i in (0, 1))
    else:
        want = run(fast, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def _slopes(threads: int) -> Tensor:
    from shoestring.nn import elements

    torch.set_num_threads(threads)
    logits, logp = draw(64, 1031), torch.empty(64)
    ids = torch.arange(64)
    elements.call("vocabulary", torch.float32, logits, ids, 1.0, 64, 1031, logp, None, True)
    return torch.cat([logits, logp[:, None]], dim=1)


# ---- routing
ROUTINGS = [
    Routing(8, 3, n_group=4, topk_group=2, scale=2.5),
    Routing(6, 2, normalise=False),
    Routing(8, 2, "softmax", n_group=4, topk_group=1, scale=3.0),
    Routing(5, 5, "softmax", normalise=False),
]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_equals_plain(routing: Routing, replay: bool, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    E, A = routing.n_experts, routing.top_k
    if not own:
        monkeypatch.setattr("shoestring.nn.moe.OWN_PRODUCT", 0)
    gate = Gate(12, routing)
    with torch.no_grad():
        gate.weight.copy_(draw(E, 12))
        if gate.e_score_correction_bias is not None:
            gate.e_score_correction_bias.copy_(draw(E, scale=0.1))
    given = torch.rand(70, E, generator=torch.Generator().manual_seed(1)).topk(A).indices if replay else None
    found = []
    for way in (False, True):
        x = draw(70, 12).requires_grad_()
        score, chosen, weight = gate(x, given, way)
        lost = balance_loss(score.view(7, 10, E), chosen.view(7, 10, A), None)
        order = chosen.argsort(-1)
        total = (weight.gather(1, order) * draw(70, A)).sum() + lost
        found.append(
            (score, chosen.gather(1, order), weight.gather(1, order), *torch.autograd.grad(total, [x, gate.weight]))
        )
    for want, got in zip(*found, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(("n", "d"), [(3, 64), (301, 150)])
def test_the_gates_own_product(n: int, d: int) -> None:
    """Whole strips of columns and what is left of one; in bf16 tokens are read as they are, sums are fp32."""
    gate = Gate(d, ROUTINGS[1])
    with torch.no_grad():
        gate.weight.copy_(draw(6, d))
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2e-3)):
        found = []
        for way in (False, True):
            x = draw(n, d).to(dtype).requires_grad_()
            score = gate(x, None, way)[0]
            found.append((score, *torch.autograd.grad((score * draw(n, 6)).sum(), [x, gate.weight])))
        for want, got in zip(*found, strict=True):
            assert got.dtype == want.dtype and (got - want).abs().max() <= most * want.abs().max()


def test_a_gradient_of_the_weights_alone_or_of_the_scores_alone() -> None:
    gate = Gate(12, ROUTINGS[0])
    with torch.no_grad():
        gate.weight.copy_(draw(8, 12))
    for place in (0, 2):
        wants, gots = (
            torch.autograd.grad(gate(draw(9, 12), None, way)[place].square().sum(), gate.weight)[0]
            for way in (False, True)
        )
        assert (gots - wants).abs().max() <= 1e-5 * wants.abs().max() > 0


@pytest.mark.parametrize("multiple", [1, 4])
def test_order(multiple: int) -> None:
    chosen = torch.tensor([[0, 3], [3, 1], [3, 0], [1, 3], [3, 0]])  # nobody takes 2 and 4
    got, want = native_order(chosen, 5, multiple=multiple), Order(chosen, 5, multiple=multiple)
    assert got.ends == want.ends and torch.equal(got.ends_E, want.ends_E)
    assert torch.equal(got.place_NA, want.place_NA) and torch.equal(got.token_P, want.token_P)


@pytest.mark.parametrize("name", ["loop", "bmm", "grouped"])
@pytest.mark.parametrize(("n", "few"), [(1, 6), (60, 6), (60, 2), (700, 6)])
def test_experts_equal_plain(n: int, few: int, name: str) -> None:
    """Some experts get nothing where few are chosen from."""
    chosen = torch.rand(n, few, generator=torch.Generator().manual_seed(n)).topk(2).indices
    inputs = [draw(n, 16), draw(6, 16, 16), draw(6, 16, 8), draw(n, 2)]

    def way(f: Way) -> Way:
        return lambda x, gate_up, down, weight: f(x, gate_up, down, chosen, weight)

    for got, want in zip(run(way(NATIVE[name]), inputs), run(way(experts_plain), inputs), strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    rounded = [x.bfloat16().float() for x in inputs]
    truth = run(way(experts_plain), rounded)
    ours, torchs = (run(way(f), rounded, torch.bfloat16) for f in (NATIVE[name], WAYS[name]))
    for a, b, want in zip(ours, torchs, truth, strict=True):
        assert (a.float() - want).norm() <= 1.2 * (b.float() - want).norm()


# ---- whole models
@pytest.mark.parametrize("config", [sizes.deepseek(**sizes.V3), sizes.dense(), sizes.dense(model_type="qwen3")])
def test_a_model_computes_the_same(config: Any) -> None:
    ids = torch.randint(0, config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    found = []
    for elements in ("torch", "native"):
        model = sizes.make(config, kernels=Kernels(elements=elements))  # type: ignore[arg-type]
        out = model(ids, balance=bool(model.n_experts))
        (out.logits.square().mean() + (out.balance if out.balance is not None else 0.0)).backward()
        found.append([out.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for want, got in zip(*found, strict=True):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max() + 1e-9


def test_other_numbers_take_the_twin() -> None:
    assert usable(True, torch.ones(1)) and usable(True, torch.ones(1).bfloat16())
    assert not usable(False, torch.ones(1)) and not usable(True, torch.ones(1).double())
    assert not usable(True, torch.ones(1), torch.ones(1).bfloat16())
    assert not usable(True, torch.ones(1, device="meta"))
    x, w = draw(4, 8).double(), draw(8)
    assert torch.equal(rms_norm(x, w, 1e-6, native=True), rms_norm(x, w, 1e-6))


def test_nothing_is_lost_in_odd_numbers() -> None:
    """NaN stays NaN, overflow does not, and a gate far from 0 is 0 or the identity."""
    h = torch.tensor([[200.0, -200.0, float("nan"), 1.0, 1.0, 1.0]])
    a = swiglu(h, native=True)[0]
    assert a[0] == 200 and 0 >= a[1] > -1e-30 and a[2].isnan()
    logits = torch.tensor([[0.0, -1e4, 1e4]])
    loss, logp = cross_entropy_sum(
        torch.ones(1, 1), logits.T.contiguous(), torch.tensor([2]), torch.ones(1), native=True
    )
    assert loss == 0 and logp == 0
    assert replace(Kernels(), elements="native").native and not Kernels().native
