"""Products in C equal F.linear's and the experts' plain twin, forward and backward, whatever the number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.nn import multiply, native
from shoestring.nn.experts import experts_multiplied, experts_native, experts_plain
from shoestring.nn.head import cross_entropy_sum, plain_cross_entropy_sum
from shoestring.nn.linear import Linear, together

pytestmark = pytest.mark.skipif(
    native.why_not() is not None or not multiply.is_fast(), reason="no native products of bf16 here"
)


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


def run(way: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of a fixed sum of it."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = way(*leaves)
    return [y.detach(), *torch.autograd.grad((y * draw(*y.shape).to(y.dtype)).sum(), leaves)]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def compare(
    fast: Callable[..., Tensor], slow: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """`fast` is no further from the truth (`plain` in fp64 on the same bf16 numbers) than `slow` in bf16, and the
    same to the bit with any number of threads."""
    truth, torch_made = run(plain, [x.bfloat16().double() for x in inputs]), run(slow, [x.bfloat16() for x in inputs])
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(run(fast, inputs))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    for got, other, want in zip(found[0], torch_made, truth, strict=True):
        assert got.shape == want.shape
        assert error(got, want) <= 1.05 * error(other, want) + 1e-6


# rows, width, and outputs of the layers: whole and broken panels, sums of one part and of several, few rows
SHAPES = [(64, 2, (2,)), (65, 34, (1, 3)), (130, 96, (384,)), (700, 256, (96, 80)), (333, 700, (17, 1, 6)),
          (777, 640, (330,)), (100, 1026, (16,))]  # fmt: skip


@pytest.mark.parametrize(("n", "d", "outs"), SHAPES)
def test_linear_equals_torch(n: int, d: int, outs: tuple[int, ...]) -> None:
    inputs = [draw(n, d).bfloat16(), *(draw(out, d, scale=0.1) for out in outs)]
    assert multiply.usable(True, inputs[0], inputs[1:])

    def plain(x: Tensor, *w: Tensor) -> Tensor:
        return F.linear(x, torch.cat(w))

    compare(lambda x, *w: multiply.linear(x, w), plain, plain, inputs)


def test_strided_rows_and_weights_in_bf16() -> None:
    x, w = draw(2, 50, 70).bfloat16(), draw(30, 40).bfloat16()
    got = run(lambda x, w: multiply.linear(x[..., 10:50], (w,)), [x, w])
    want = run(lambda x, w: F.linear(x[..., 10:50], w), [x.double(), w.double()])
    assert all(g.dtype == torch.bfloat16 and error(g, t) < 4e-3 for g, t in zip(got, want, strict=True))


def test_layers_with_biases() -> None:
    layers = [Linear(32, 8, bias=True), Linear(32, 5), Linear(32, 3)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_(generator=torch.Generator().manual_seed(0))
        assert layers[0].bias is not None
        layers[0].bias.normal_(generator=torch.Generator().manual_seed(1))
    x = draw(100, 32).bfloat16()
    assert error(together(x, layers, native=True).detach(), together(x, layers).detach().double()) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_it_does_not_take(dtype: torch.dtype) -> None:
    w = [draw(8, 6)]
    assert not multiply.usable(True, draw(100, 6).to(dtype), w)
    assert not multiply.usable(True, draw(10, 6).bfloat16(), w) and not multiply.usable(False, draw(100, 6), w)
    assert not multiply.usable(True, draw(100, 5).bfloat16(), [draw(8, 5)])


# tokens, experts, chosen, widths
EXPERTS = [(300, 8, 2, 64, 32), (64, 5, 3, 34, 18), (500, 4, 1, 400, 200), (100, 64, 2, 32, 16)]


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(("n", "e", "a", "d", "f"), EXPERTS)
def test_experts_equal_their_twins(n: int, e: int, a: int, d: int, f: int, uneven: bool) -> None:
    chosen = torch.rand(n, e, generator=torch.Generator().manual_seed(n)).topk(a).indices
    if uneven:  # one expert has nearly every token, others none
        chosen = torch.arange(a).expand(n, a).clone()
        chosen[0] = torch.arange(e - a, e)
    gate_up, down = draw(e, 2 * f, d, scale=0.1), draw(e, d, f, scale=0.1)
    weight = draw(n, a).abs()
    inputs = [draw(n, d).bfloat16(), gate_up, down, weight]
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(run(lambda x, g, w, by: experts_multiplied(x, g, w, chosen, by), inputs))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    rounded = [inputs[0], gate_up.bfloat16(), down.bfloat16()]
    truth = run(lambda x, g, w, by: experts_plain(x, g, w, chosen, by),
                [*(x.double() for x in rounded), weight.double()])  # fmt: skip
    torch_made = run(lambda x, g, w, by: experts_native(x, g, w, chosen, by), [*rounded, weight])
    for got, other, want in zip(found[0], torch_made, truth, strict=True):
        assert error(got, want) <= 1.05 * error(other, want) + 1e-6


def test_head_in_chunks_of_few_rows() -> None:
    ids, weight = torch.arange(130) % 98, draw(130).abs()
    hidden, table = draw(130, 32).bfloat16(), draw(98, 32, scale=0.3)
    compare(
        lambda h, w: cross_entropy_sum(h, w, ids, weight, chunk=16, native=True)[0],
        lambda h, w: cross_entropy_sum(h, w, ids, weight, chunk=16)[0],
        lambda h, w: plain_cross_entropy_sum(h, w, ids, weight), [hidden, table],
    )  # fmt: skip
