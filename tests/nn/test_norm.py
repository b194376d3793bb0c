"""RMSNorm in its three ways against torch's own, with an eps that is felt."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shoestring.nn import native, norm
from shoestring.nn.norm import RMSNorm, rms_norm, rms_norm_plain

WAYS = {
    "plain": rms_norm_plain,
    "torch": rms_norm,
    "native": lambda x, w, eps: rms_norm(x, w, eps, native=native.why_not() is None),
}


@pytest.mark.parametrize("chunk", [7, 120, 24_000])
@pytest.mark.parametrize("way", WAYS)
def test_as_torch_s_own(way: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and both gradients; numbers as small as the root of eps, one row at a time, several, or all at once."""
    monkeypatch.setattr(norm, "CHUNK", chunk)
    torch.manual_seed(0)
    x, weight, dy = 0.3 * torch.randn(13, 24), torch.randn(24), torch.randn(13, 24)
    found = []
    for f in (WAYS[way], lambda x, w, eps: F.rms_norm(x, (24,), w, eps)):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = f(*leaves, 0.1)
        found.append((y, *torch.autograd.grad(y, leaves, dy)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_rounded_once_at_the_end(way: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(50, 24).bfloat16(), torch.randn(24)
    truth = F.rms_norm(x.double(), (24,), weight.double(), 1e-6)
    assert ((WAYS[way](x, weight, 1e-6).double() - truth).abs() <= truth.abs() * (2**-8 + 1e-5)).all()


def test_eps_unless_said_otherwise() -> None:
    """DeepSeek-V3's."""
    assert RMSNorm(4).eps == 1e-6
