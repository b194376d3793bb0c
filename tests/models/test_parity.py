"""Parity with transformers: logits, greedy tokens, gradients of every parameter; on drawn and on named shapes."""

from __future__ import annotations

import model_sizes as sizes
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shoestring.models.deepseek import DeepseekConfig
from shoestring.models.dense import DenseConfig
from shoestring.nn import native
from shoestring.nn.decoder import Decoder
from shoestring.nn.kernels import Kernels
from shoestring.nn.norm import RMSNorm
from shoestring.nn.rope import Rope, RopeScaling

pytest.importorskip("transformers")
DRAWN = settings(max_examples=40 if settings().derandomize else 400)  # `make test-all` explores
WAYS = [
    Kernels(),
    Kernels(experts="bmm", attention="sdpa"),
    Kernels(experts="grouped", attention="native", elements="native") if native.why_not() is None else Kernels(),
]
NAMED = {
    "v3": sizes.deepseek(**sizes.V3),
    "moonlight": sizes.deepseek(**sizes.MOONLIGHT),
    "v2-lite": sizes.deepseek(**sizes.V2_LITE),
    "v2": sizes.deepseek(**sizes.V2),
    "llama-3.1": sizes.dense(rope_scaling=sizes.LLAMA3, rope_theta=5e5),
    "qwen2": sizes.dense(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": sizes.dense(model_type="qwen3", head_dim=16),
}


def loss(logits: Tensor, seed: int = 0) -> Tensor:
    """A loss whose gradient reaches every parameter."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    return (logits.float() * weights).sum() / logits.shape[1]


def compare(ours: Decoder, theirs: nn.Module, x_BT: Tensor) -> None:
    mine, other = ours(x_BT).logits_BTV, theirs(x_BT).logits
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    assert torch.equal(mine.argmax(-1), other.argmax(-1))
    loss(mine).backward()
    loss(other).backward()
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name.startswith("mtp."):
            continue
        want = reference[name].grad
        got = parameter.grad
        if want is None or got is None:  # an expert no token chose
            assert (want is None or not want.any()) and (got is None or not got.any()), name
            continue
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-6, f"{name}: {(got - want).norm() / want.norm()}"


@pytest.mark.parametrize("name", NAMED)
def test_named_shapes(name: str) -> None:
    model = sizes.make(NAMED[name])
    compare(model, sizes.twin(model), sizes.tokens(NAMED[name], 2, 24))


@pytest.mark.parametrize("name", NAMED)
def test_eps_of_every_norm(name: str) -> None:
    """The latent norms keep 1e-6 whatever `rms_norm_eps` says; all others are told."""
    model = sizes.make(NAMED[name].model_copy(update={"rms_norm_eps": 1e-3}))
    theirs = {
        name: m.variance_epsilon for name, m in sizes.twin(model).named_modules() if "RMSNorm" in type(m).__name__
    }
    ours = {name: m.eps for name, m in model.named_modules() if isinstance(m, RMSNorm)}
    assert {name: eps for name, eps in ours.items() if not name.startswith("mtp.")} == theirs
    assert {eps for name, eps in ours.items() if name.startswith("mtp.") and "_a_layernorm" not in name} <= {1e-3}


@DRAWN
@given(
    config=sizes.deepseek_configs(),
    seed=st.integers(0, 99),
    kernels=st.sampled_from(WAYS),
    shift=st.sampled_from([0.0, 2.0]),
)
def test_drawn_deepseek(config: DeepseekConfig, seed: int, kernels: Kernels, shift: float) -> None:
    """`shift`: with every biased score below 0, an expert of a lost group still may not be chosen."""
    model = sizes.make(config, seed, kernels=kernels)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.sub_(shift)
    compare(model, sizes.twin(model), sizes.tokens(config, 2, 17, seed))


@DRAWN
@given(config=sizes.dense_configs(), seed=st.integers(0, 99), kernels=st.sampled_from(WAYS))
def test_drawn_dense(config: DenseConfig, seed: int, kernels: Kernels) -> None:
    model = sizes.make(config, seed, kernels=kernels)
    compare(model, sizes.twin(model), sizes.tokens(config, 2, 17, seed))


@settings(max_examples=DRAWN.max_examples)
@given(
    scaling=sizes.yarn() | st.just(sizes.LLAMA3), dim=st.sampled_from([8, 64, 128]), theta=st.sampled_from([1e4, 1e6])
)
@example(scaling=sizes.YARN.model_copy(update={"original_max_position_embeddings": 6}), dim=8, theta=1e4)  # no ramp
@example(scaling=sizes.YARN.model_copy(update={"original_max_position_embeddings": 400}), dim=8, theta=10.0)  # cut
def test_drawn_frequencies(scaling: RopeScaling, dim: int, theta: float) -> None:
    """At the sizes of real heads, where every part of YaRN's ramp is met."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = sizes.dense(hidden_size=4 * dim, rope_scaling=scaling, rope_theta=theta).to_hf()
    config.pop("architectures")
    want, factor = ROPE_INIT_FUNCTIONS[scaling.rope_type](transformers.LlamaConfig(**config), "cpu")
    ours = Rope(dim, theta, scaling)
    torch.testing.assert_close(ours.freq_R, want, atol=0, rtol=1e-5)
    assert ours.factor == pytest.approx(factor)


@pytest.mark.parametrize("name", NAMED)
@torch.no_grad()
def test_greedy_continuation(name: str) -> None:
    config = NAMED[name]
    model = sizes.make(config, 3)
    prompt_BT = sizes.tokens(config, 2, 7, 3)
    cache = model.new_cache(2, 24)
    found, next_BT = [], prompt_BT
    for _ in range(12):
        next_BT = model(next_BT, cache=cache).logits_BTV[:, -1:].argmax(-1)
        found.append(next_BT)
    theirs = sizes.twin(model).generate(
        prompt_BT, max_new_tokens=12, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(prompt_BT),
        eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(torch.cat(found, 1), theirs[:, 7:])


@pytest.mark.parametrize("name", NAMED)
@torch.no_grad()
def test_bfloat16_is_as_near_the_truth(name: str) -> None:
    """Both in bf16, both against fp32: our mean error is at most 1.2 times theirs, computed in torch or in C."""
    config = NAMED[name]
    theirs, ways = 0.0, [sizes.BF16, sizes.BF16_NATIVE][: 2 if native.why_not() is None else 1]
    ours = dict.fromkeys(ways, 0.0)
    for seed in range(6):
        model = sizes.make(config, seed)
        x_BT = sizes.tokens(config, 4, 32, seed)
        truth = model(x_BT).logits_BTV
        other = sizes.twin(model).to(torch.bfloat16)
        for gate in other.modules():  # as their loader keeps it
            if hasattr(gate, "e_score_correction_bias"):
                gate.e_score_correction_bias = gate.e_score_correction_bias.float()
        theirs += (other(x_BT).logits.float() - truth).abs().mean().item()
        for kernels in ways:
            half = sizes.make(config, seed, kernels=kernels)
            ours[kernels] += (half(x_BT).logits_BTV - truth).abs().mean().item()
    for kernels, error in ours.items():
        assert 0 < error <= 1.2 * theirs, (kernels, error / theirs)
