"""MLA: YaRN's numbers, one attention computed three ways, the cache, and the two layouts of RoPE."""

from __future__ import annotations

from typing import Any

import model_sizes as sizes
import pytest
import torch
from torch import Tensor

from shoestring.core.errors import UserError
from shoestring.models.deepseek import Deepseek, DeepseekConfig
from shoestring.nn.attention import Pass, cache_bias
from shoestring.nn.kernels import Kernels
from shoestring.nn.mla import MLA, heads, heads_plain
from shoestring.nn.rope import Rope, RopeScaling, rotate, rotate_plain, yarn_mscale

YARN = RopeScaling(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
V3_HEADS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}


def module(interleaved: bool = True, q_lora: int | None = 12, seed: int = 0) -> MLA:
    mla = MLA(32, 3, q_lora=q_lora, kv_lora=10, nope=8, rope=4, v=6, scale=0.3, interleaved=interleaved)
    generator = torch.Generator().manual_seed(seed)
    for parameter in mla.parameters():
        with torch.no_grad():
            parameter.normal_(0.0, 0.3, generator=generator)
    return mla


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(T: int, R: int = 4) -> Pass:
    return Pass(Rope(R, 1e4).table(torch.arange(T)), None, Kernels())


# ---- YaRN
def test_yarn_frequencies() -> None:
    plain, yarn = Rope(64, 1e4), Rope(64, 1e4, YARN)
    golden = {0: 1.0, 10: 0.0562341, 16: 0.0055, 23: 3.33380e-5}
    for i, value in golden.items():
        assert yarn.freq_R[i].item() == pytest.approx(value, rel=1e-5)
    assert torch.equal(yarn.freq_R[:11], plain.freq_R[:11])  # fast ones are untouched
    torch.testing.assert_close(yarn.freq_R[23:], plain.freq_R[23:] / 40)
    assert yarn.factor == 1.0  # mscale / mscale_all_dim
    assert Rope(64, 1e4, YARN.model_copy(update={"mscale": None})).factor == pytest.approx(1.368888, abs=1e-6)


@pytest.mark.parametrize(("mscale", "scale"), [(None, 0.0721688), (1.0, 0.1352338), (0.707, 0.1147214)])
def test_softmax_scale(mscale: float | None, scale: float) -> None:
    scaling = None if mscale is None else YARN.model_copy(update={"mscale": mscale, "mscale_all_dim": mscale})
    config = sizes.deepseek(**V3_HEADS, rope_scaling=scaling)
    assert config.softmax_scale == pytest.approx(scale, abs=5e-8)
    model = Deepseek(config, device="meta")
    assert model.model.layers[0].self_attn.scale == config.softmax_scale  # type: ignore[union-attr]


def test_mscale() -> None:
    assert yarn_mscale(40, 1.0) == pytest.approx(1.368888, abs=1e-6)
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == 1.0  # a context made no longer asks for nothing


def test_llama3_bands() -> None:
    """Llama 3.1's own 1 and 4 turns unless said otherwise; a ramp of no width would divide by 0."""
    said: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    assert RopeScaling(**said) == RopeScaling(**said, low_freq_factor=1.0, high_freq_factor=4.0)
    with pytest.raises(UserError, match=r"low_freq_factor=4\.0 must be less than high_freq_factor=4\.0"):
        RopeScaling(**said, low_freq_factor=4.0)


# ---- rotation
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_and_its_gradient(interleaved: bool) -> None:
    x = drawn(2, 7, 3, 8).requires_grad_()
    cis = Rope(8, 100.0).table(torch.arange(7))
    fast, plain = (f(x, cis, interleaved=interleaved) for f in (rotate, rotate_plain))
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(fast.norm(dim=-1), x.norm(dim=-1))
    seed = drawn(*x.shape, seed=1)
    torch.testing.assert_close(*(torch.autograd.grad((y * seed).sum(), x)[0] for y in (fast, plain)))


def test_scores_depend_on_distance_alone() -> None:
    q, k = drawn(1, 1, 1, 8), drawn(1, 1, 1, 8, seed=1)
    rope = Rope(8, 100.0)

    def score(i: int, j: int) -> float:
        turned = [rotate(x, rope.table(torch.tensor([p])), interleaved=True) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum().item()

    assert score(9, 4) == pytest.approx(score(5, 0), abs=1e-5) and score(9, 4) != pytest.approx(score(9, 3), abs=1e-3)


@pytest.mark.parametrize("q_lora", [None, 12])
def test_interleaved_is_half_split_after_permuting_rows(q_lora: int | None) -> None:
    inter, half = module(True, q_lora), module(False, q_lora)
    half.load_state_dict(inter.state_dict())
    order = torch.tensor([0, 2, 1, 3])  # evens, then odds
    with torch.no_grad():
        q = half.q_proj if q_lora is None else half.q_b_proj
        w_HKX = q.weight.view(3, 12, -1)
        w_HKX[:, 8:] = w_HKX[:, 8:][:, order]
        half.kv_a_proj_with_mqa.weight[10:] = half.kv_a_proj_with_mqa.weight[10:][order]
    x_BTD = drawn(2, 9, 32)
    torch.testing.assert_close(inter(x_BTD, step(9), 0), half(x_BTD, step(9), 0), atol=1e-5, rtol=1e-5)
    wrong = module(False, q_lora)
    assert not torch.allclose(inter(x_BTD, step(9), 0), wrong(x_BTD, step(9), 0), atol=1e-3)


# ---- heads
@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_equal_their_plain_twin(interleaved: bool) -> None:
    leaves = [x.requires_grad_() for x in (drawn(2, 5, 3, 12), drawn(2, 5, 3, 14, seed=1), drawn(2, 5, 4, seed=2))]
    found = []
    for way in (heads, heads_plain):
        out = way(*leaves, step(5).cis, 8, interleaved)
        loss = sum((y * drawn(*y.shape, seed=i)).sum() for i, y in enumerate(out))
        assert isinstance(loss, Tensor)
        found.append((*out, *torch.autograd.grad(loss, leaves)))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


# ---- absorbed and cached
@torch.no_grad()
def test_absorbed_equals_expanded() -> None:
    mla, T = module(), 11
    q, c, k_pe = mla.project(drawn(2, T, 32))
    causal = step(T)
    turned = rotate(k_pe.unsqueeze(2), causal.cis, interleaved=True).squeeze(2)
    masked = Pass(causal.cis, cache_bias(torch.arange(T)[None], T, torch.float32), Kernels())
    absorbed = mla.absorbed(q, torch.cat([c, turned], -1), masked)
    expanded = mla.naive(q, c, k_pe, causal)
    assert (absorbed - expanded).norm() <= 1e-6 * expanded.norm()


NAMED = {
    "v3": sizes.deepseek(**sizes.V3),
    "moonlight": sizes.deepseek(**sizes.MOONLIGHT),
    "half-split": sizes.deepseek(rope_interleave=False),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("pieces", [[1] * 14, [6, 1, 1, 4, 2]])
@torch.no_grad()
def test_cached_equals_whole(name: str, pieces: list[int]) -> None:
    config: DeepseekConfig = NAMED[name]
    model = sizes.make(config)
    x_BT = sizes.tokens(config, 3, 14)
    cache = model.new_cache(3, 14)
    found = torch.cat([model(x, cache=cache).hidden_BTD for x in x_BT.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(found, model(x_BT).hidden_BTD, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="position 14 does not fit"):
        model(x_BT[:, :1], cache=cache)


@torch.no_grad()
def test_rows_of_a_cache_at_their_own_positions() -> None:
    """Prompts of different lengths, then rows dropped and repeated: each row goes on as if it were alone."""
    config = NAMED["v3"]
    model = sizes.make(config)
    x_BT = sizes.tokens(config, 3, 9)
    lengths = torch.tensor([4, 6, 5])
    cache = model.new_cache(3, 10)
    model(x_BT[:, :6], cache=cache, positions_BT=torch.arange(6).expand(3, 6))  # beyond a row's length: garbage
    rows = torch.tensor([2, 0])
    cache = cache.select(rows).repeat_interleave(2)
    rows = rows.repeat_interleave(2)
    for t in range(3):
        at = lengths[rows, None] + t
        out = model(x_BT[rows].gather(1, at), cache=cache, positions_BT=at).hidden_BTD
        for i, row in enumerate(rows.tolist()):
            alone = model(x_BT[row : row + 1, : int(lengths[row]) + t + 1]).hidden_BTD[:, -1]
            torch.testing.assert_close(out[i], alone, atol=1e-5, rtol=1e-5)


def test_width_of_the_cache() -> None:
    config = sizes.deepseek(**V3_HEADS)
    cache = Deepseek(config, device="meta", kernels=sizes.BF16).new_cache(2, 5)
    assert [layer.shape for layer in cache.layers] == [(2, 5, 576)] * 3
    assert cache.nbytes == 3 * 2 * 5 * 576 * 2
    assert config.shape().kv_numbers_per_token() == 3 * 576
