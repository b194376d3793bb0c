"""The fast ways to attend equal the plain one, and nobody sees what they must not."""

from __future__ import annotations

import model_sizes as sizes
import pytest
import torch
from torch import Tensor

from shoestring.data.batch import BRANCH
from shoestring.nn import native
from shoestring.nn.attention import Pass, attend_plain, cache_bias, segment_bias
from shoestring.nn.attention_native import seen_in
from shoestring.nn.kernels import Kernels

REASON = native.why_not()
NATIVE = pytest.param("native", marks=pytest.mark.skipif(REASON is not None, reason=f"no native attention: {REASON}"))
WAYS = ("blocks", "sdpa", NATIVE)


def attend(way: str, q: Tensor, k: Tensor, v: Tensor, segments_BT: Tensor | None) -> Tensor:
    kernels, bias, seen = Kernels(attention=way), None, None  # type: ignore[arg-type]
    if segments_BT is not None and way == "native":
        seen = seen_in(segments_BT)
    elif segments_BT is not None:
        bias = segment_bias(segments_BT, torch.float32)
    return Pass(torch.empty(0), bias, kernels, seen=seen).attend(q, k, v, 0.3)


def case(B: int, H: int, G: int, T: int, K: int, W: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = [(B, H, T, K), (B, G, T, K), (B, G, T, W)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def packed(B: int, T: int) -> Tensor:
    """Two documents a row, cut at another place in each."""
    return torch.stack([(torch.arange(T) >= (b + 1) * T // (B + 2)).long() for b in range(B)])


def both(way: str, leaves: list[Tensor], segments_BT: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """(ours, plain) of the output and of each gradient."""
    found = []
    bias = None if segments_BT is None else segment_bias(segments_BT, torch.float32)
    for y in (attend(way, *leaves, segments_BT), attend_plain(*leaves, 0.3, bias)):
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        found.append((y, *torch.autograd.grad((y * seed).sum(), leaves)))
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("H", "G", "T", "K", "W"),
    [(2, 2, 1, 12, 8), (2, 2, 9, 12, 8), (4, 2, 9, 8, 8), (4, 1, 33, 6, 6), (2, 2, 9, 6, 10), (2, 2, 300, 12, 8)],
)
def test_equals_plain(way: str, masked: bool, H: int, G: int, T: int, K: int, W: int) -> None:
    leaves = case(2, H, G, T, K, W)
    for got, want in both(way, leaves, packed(2, T) if masked else None):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [1, 3])  # heads in a block of scores: one, and more than there are
def test_any_size_of_blocks(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    T = 50
    monkeypatch.setattr("shoestring.nn.attention_blocks.ROWS", 16)
    monkeypatch.setattr("shoestring.nn.attention_blocks.SCORES", heads * 16 * T)
    for segments_BT in (None, packed(2, T)):
        for got, want in both("blocks", case(2, 2, 2, T, 6, 4), segments_BT):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_near(way: str) -> None:
    leaves = case(2, 2, 2, 200, 12, 8, torch.bfloat16)
    truth = attend_plain(*(x.detach().double() for x in leaves), 0.3, None)
    got = attend(way, *leaves, None)
    assert got.dtype == torch.bfloat16
    assert (got - truth).norm() <= 0.02 * truth.norm()


@pytest.mark.parametrize("way", [*WAYS, "plain"])
def test_causal(way: str) -> None:
    """What comes later changes nothing before, to the last bit, and does change what follows."""
    T, t = 140, 70
    q, k, v = (x.detach() for x in case(1, 2, 2, T, 6, 4))
    base = attend(way, q, k, v, None)
    k[:, :, t], v[:, :, t] = 5.0, -5.0
    moved = attend(way, q, k, v, None)
    assert torch.equal(base[:, :, :t], moved[:, :, :t])
    assert (base[:, :, t:] != moved[:, :, t:]).flatten(1).any(1).all()
    torch.testing.assert_close(base[:, :, 0], v[:, :, 0])  # the first sees itself alone


@pytest.mark.parametrize("way", [*WAYS, "plain"])
@pytest.mark.parametrize("family", ["deepseek", "dense"])
@torch.no_grad()
def test_documents_in_one_row_do_not_meet(way: str, family: str) -> None:
    """Changing the first changes nothing in the second, which computes as if it stood alone."""
    config = sizes.deepseek() if family == "deepseek" else sizes.dense()
    model = sizes.make(config, kernels=Kernels(attention=way))  # type: ignore[arg-type]
    x_BT = sizes.tokens(config, 1, 20)
    segments_BT = torch.tensor([[0] * 8 + [1] * 9 + [-1] * 3])
    positions_BT = torch.tensor([[*range(8), *range(9), 0, 0, 0]])
    base = model(x_BT, segments_BT=segments_BT, positions_BT=positions_BT).hidden_BTD
    other = x_BT.clone()
    other[:, :8] = (other[:, :8] + 1) % config.vocab_size
    moved = model(other, segments_BT=segments_BT, positions_BT=positions_BT).hidden_BTD
    # an expert's product over other tokens too may round otherwise; a leak would be as large as the change itself
    torch.testing.assert_close(base[:, 8:], moved[:, 8:], atol=5e-6, rtol=0)
    assert ((base[:, :8] - moved[:, :8]).abs().amax(-1) > 0.1).all()
    alone = model(x_BT[:, 8:17]).hidden_BTD
    torch.testing.assert_close(base[:, 8:17], alone, atol=1e-5, rtol=1e-5)


def test_masks() -> None:
    inf = float("-inf")
    assert segment_bias(torch.tensor([[3, 3, 4]]), torch.float32).tolist() == [
        [[[0, inf, inf], [0, 0, inf], [inf, inf, 0]]]
    ]
    branches = torch.tensor([[0, 0 + BRANCH, 0 + 2 * BRANCH, 1, 1 + BRANCH, -1]])
    assert (segment_bias(branches, torch.float32) == 0)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]  # fmt: skip
    assert cache_bias(torch.tensor([[1, 2]]), 4, torch.float32).tolist() == [[[[0, 0, inf, inf], [0, 0, 0, inf]]]]
