"""Each way of computing routed experts equals the plain one, whatever the load, and none needs much more memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from shoestring.nn import native
from shoestring.nn.experts import NATIVE, WAYS, Experts, Order, experts_plain
from shoestring.nn.kernels import Kernels

FAST = sorted(set(WAYS) - {"plain"})
E, D, F, A = 6, 16, 8, 2


def choices(load: str, n: int) -> Tensor:
    """Chosen experts [n, A], distinct in each row."""
    generator = torch.Generator().manual_seed(n)
    if load == "one":  # expert 3 receives every token; its partners share the rest
        rest = torch.tensor([0, 1, 2, 4, 5])[torch.arange(n) % 5]
        return torch.stack([torch.full((n,), 3), rest], dim=1)
    few = {"drawn": E, "empty": 3, "two": 2}[load]
    return torch.rand(n, few, generator=generator).topk(A).indices


def case(load: str, n: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """[x, gate_up, down, weight] as leaves, and the chosen experts."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(n, D), (E, 2 * F, D), (E, D, F), (n, A)]
    made = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    return made, choices(load, n)


def run(way: Any, leaves: list[Tensor], chosen: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    x, gate_up, down, weight = leaves
    y = way(x, gate_up, down, chosen, weight)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return y, torch.autograd.grad((y * seed).sum(), leaves)


@pytest.mark.parametrize("load", ["drawn", "empty", "two", "one"])
@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize("way", FAST)
def test_equals_plain(way: str, n: int, load: str) -> None:
    leaves, chosen = case(load, n)
    (y, grads), (want, want_grads) = run(WAYS[way], leaves, chosen), run(experts_plain, leaves, chosen)
    for got, expected in zip((y, *grads), (want, *want_grads), strict=True):
        assert got.shape == expected.shape and expected.any()
        assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("way", FAST)
@pytest.mark.parametrize("load", ["drawn", "one"])
@pytest.mark.parametrize("n", [60, 600])  # from 512 tokens on, slices are padded in bf16
def test_bfloat16_is_near(way: str, n: int, load: str) -> None:
    leaves, chosen = case(load, n, torch.bfloat16)
    truth, truth_grads = run(experts_plain, [x.detach().float().requires_grad_() for x in leaves], chosen)
    y, grads = run(WAYS[way], leaves, chosen)
    for got, want in zip((y, *grads), (truth, *truth_grads), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("way", FAST)
@pytest.mark.parametrize("load", ["drawn", "one"])
def test_no_token_is_dropped(way: str, load: str) -> None:
    """Experts that all do the same: a token's output is the same wherever it goes, if nothing is lost."""
    (x, gate_up, down, weight), chosen = case(load, 50)
    with torch.no_grad():
        gate_up[:], down[:] = gate_up[:1].clone(), down[:1].clone()
        one = weight.abs() / weight.abs().sum(-1, keepdim=True)
        y = WAYS[way](x, gate_up, down, chosen, one)
        alone = WAYS[way](x, gate_up, down, torch.zeros(50, 1, dtype=torch.long), torch.ones(50, 1))
    torch.testing.assert_close(y, alone, atol=1e-5, rtol=1e-5)


def test_order_places_every_pair_once() -> None:
    chosen = choices("drawn", 40)
    for options in ({}, {"multiple": 32}, {"even": True}):
        order = Order(chosen, E, **options)  # type: ignore[arg-type]
        places = order.place_NA.flatten().tolist()
        assert len(set(places)) == 80
        for n, row in enumerate(order.place_NA.tolist()):
            for a, place in enumerate(row):
                assert order.token_P[place] == n
                assert any(e == chosen[n, a] and i <= place < j for e, i, j in order.slices())


def peak_bytes(layer: Experts, chosen: Tensor, kernels: Kernels) -> int:
    """The most that was held at once in a forward and backward pass, of all that torch allocated."""
    n, now, most = len(chosen), 0, 0
    x = torch.randn(n, layer.down_proj.shape[1]).to(kernels.torch_dtype).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        layer(x, chosen, torch.ones(n, 2), kernels).float().square().mean().backward()
    layer.zero_grad()
    for event in watch.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("size", [(4096, 32, 64), (8192, 8, 64), (64, 8, 512)])  # tokens, experts, width
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("elements", ["torch", "native"])
@pytest.mark.parametrize("way", FAST)
def test_one_full_expert_costs_no_more_memory(way: Any, elements: Any, dtype: Any, size: tuple[int, int, int]) -> None:
    """Than balance does in the same way; what little is allowed are slices filled up for bf16 products."""
    if elements == "native" and native.why_not() is not None:
        pytest.skip("no native library here")
    n, experts, wide = size
    generator = torch.Generator().manual_seed(0)
    layer = Experts(experts, wide, wide)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    balanced = torch.stack([torch.arange(n) % experts, (torch.arange(n) + 1) % experts], dim=1)
    one = torch.stack([torch.zeros(n, dtype=torch.long), 1 + torch.arange(n) % (experts - 1)], dim=1)
    kernels = Kernels(dtype, experts=way, elements=elements)
    even, full = peak_bytes(layer, balanced, kernels), peak_bytes(layer, one, kernels)
    assert n * wide * 4 < full <= 1.05 * even, (full, even)


@pytest.mark.parametrize("load", ["drawn", "one"])
def test_bmm_with_native_elements_equals_plain(load: str) -> None:
    if native.why_not() is not None:
        pytest.skip("no native library here")
    leaves, chosen = case(load, 60)
    (y, grads), (want, want_grads) = run(NATIVE["bmm"], leaves, chosen), run(experts_plain, leaves, chosen)
    for got, expected in zip((y, *grads), (want, *want_grads), strict=True):
        assert expected.any() and (got - expected).abs().max() <= 2e-6 * expected.abs().max()
