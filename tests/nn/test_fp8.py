"""Block-wise FP8: error bounds, scales, shapes of DeepSeek's files."""

from __future__ import annotations

import pytest
import torch

from shoestring.nn.fp8 import dequantize, quantize_activation, quantize_weight


def drawn(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[-1])


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 200), (5, 3)])
def test_weight_error(shape: tuple[int, int]) -> None:
    """At most 16 steps' worth (half the spacing of e4m3 at 448) of each tile's own amax."""
    x = drawn(*shape)
    q, scale = quantize_weight(x)
    assert q.dtype == torch.float8_e4m3fn and q.shape == x.shape and scale.dtype == torch.float32
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    back = dequantize(q, scale)
    assert back.dtype == torch.float32 and not torch.equal(back, x)
    for i in range(0, shape[0], 128):
        for j in range(0, shape[1], 128):
            tile = (slice(i, i + 128), slice(j, j + 128))
            amax = x[tile].abs().max()
            assert (back[tile] - x[tile]).abs().max() <= 16 * amax / 448 * (1 + 1e-5)
            torch.testing.assert_close(back[tile].abs().max(), amax)  # the largest is kept


def test_activation_error() -> None:
    x = drawn(3, 7, 256)
    q, scale = quantize_activation(x)
    assert q.shape == x.shape and scale.shape == (3, 7, 2)
    tiles, error = x.unflatten(-1, (2, 128)), (q.float().unflatten(-1, (2, 128)) * scale[..., None])
    amax = tiles.abs().amax(-1, keepdim=True)
    assert ((error - tiles).abs() <= 16 * amax / 448 * (1 + 1e-5)).all()
    with pytest.raises(ValueError, match="multiple of 128"):
        quantize_activation(drawn(2, 130))


@pytest.mark.parametrize(("amax", "scale"), [(1.0, 2.0**-8), (3.5, 2.0**-7), (448.0, 1.0), (449.0, 2.0)])
def test_ue8m0_scales(amax: float, scale: float) -> None:
    x = torch.linspace(-amax, amax / 2, 128)
    q, found = quantize_activation(x, power_of_two=True)
    assert found.tolist() == [scale]
    assert (q.float() * scale - x).abs().max() <= 16 * scale
    _, found = quantize_weight(x[None], power_of_two=True)
    assert found.tolist() == [[scale]]


def test_scales_multiply() -> None:
    weight = torch.tensor([[1.0, 2.0, -448.0]]).to(torch.float8_e4m3fn)
    assert dequantize(weight, torch.tensor([[0.5, 3.0]]), block=2).tolist() == [[0.5, 1.0, -1344.0]]


@pytest.mark.parametrize(("rows", "columns", "block"), [(5, 7, 3), (1, 1, 4), (8, 4, 4), (129, 130, 128)])
def test_which_scale_belongs_to_which_number(rows: int, columns: int, block: int) -> None:
    """Number (i, j) is multiplied by the scale of block (i // block, j // block), at ragged edges too."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=draw).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // block), -(-columns // block), generator=draw)
    want = [[float(weight[i, j]) * float(scale[i // block, j // block]) for j in range(columns)] for i in range(rows)]
    torch.testing.assert_close(dequantize(weight, scale, block), torch.tensor(want))


def test_e4m3_values_survive() -> None:
    """Every value of the format times the scale comes back as it was."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = every[every.isfinite()][None]
    q, scale = quantize_weight(finite, 256)
    assert scale.tolist() == [[1.0]] and torch.equal(dequantize(q, scale, 256), finite)


def test_zeros_and_tiny_values() -> None:
    q, scale = quantize_activation(torch.zeros(128))
    assert scale.item() == pytest.approx(1e-4 / 448) and not q.float().any()


def test_shape_of_kv_a_proj() -> None:
    q, scale = quantize_weight(torch.zeros(576, 7168))
    assert q.shape == (576, 7168) and scale.shape == (5, 56)
