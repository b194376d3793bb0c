"""Small configurations of every family, and their twins in transformers, for the parity tests."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from shoestring.models.deepseek import Deepseek, DeepseekConfig
from shoestring.models.dense import Dense, DenseConfig
from shoestring.nn.decoder import Decoder
from shoestring.nn.kernels import Kernels
from shoestring.nn.rope import RopeScaling

YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
YARN_V2 = YARN.model_copy(update={"mscale": 0.707, "mscale_all_dim": 0.707})
LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8.0, original_max_position_embeddings=32, low_freq_factor=1.0, high_freq_factor=4.0
)

BF16 = Kernels(dtype="bfloat16")
BF16_NATIVE = Kernels("bfloat16", experts="grouped", attention="native", elements="native")


def deepseek(**changes: Any) -> DeepseekConfig:
    """V3-shaped and tiny. initializer_range is large so that every path matters in the logits."""
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 3, "num_attention_heads": 2, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 1, "n_routed_experts": 8,
        "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
        "initializer_range": 0.2, "max_position_embeddings": 64,
    }  # fmt: skip
    return DeepseekConfig(**sizes | changes)


V3 = {"rope_scaling": YARN, "num_nextn_predict_layers": 1}
MOONLIGHT = {
    "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
}  # fmt: skip
V2_LITE = {
    "model_type": "deepseek_v2", "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
    "norm_topk_prob": False, "routed_scaling_factor": 1.0, "rope_scaling": YARN_V2,
}  # fmt: skip
V2 = {
    "model_type": "deepseek_v2", "n_shared_experts": 2, "norm_topk_prob": False, "routed_scaling_factor": 16.0,
    "rope_scaling": YARN_V2,
}  # fmt: skip


def dense(**changes: Any) -> DenseConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 64,
    }  # fmt: skip
    return DenseConfig(**sizes | changes)


def make(config: DeepseekConfig | DenseConfig, seed: int = 0, **more: Any) -> Decoder:
    """A model with norms and biases moved off their initial 1 and 0, so that they matter too."""
    generator = torch.Generator().manual_seed(seed)
    kind = Deepseek if isinstance(config, DeepseekConfig) else Dense
    model = kind(config, generator=generator, **more)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def twin(model: Decoder) -> nn.Module:
    """The same weights in transformers' class (MTP modules left out)."""
    import transformers

    raw = model.config.to_hf()
    name = raw.pop("architectures")[0]
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**raw)
    theirs = getattr(transformers, name)(config).eval()
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("mtp.")}
    if model.lm_head is None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, strict=True)
    return theirs


def tokens(config: DeepseekConfig | DenseConfig, B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


@st.composite
def yarn(draw: st.DrawFn) -> RopeScaling:
    """Whatever a released config.json may say: the two mscales need not be equal, nor there at all."""
    return RopeScaling(
        rope_type="yarn",
        factor=draw(st.sampled_from([1.0, 1.5, 4.0, 40.0])),
        original_max_position_embeddings=draw(st.sampled_from([8, 16, 4096])),
        beta_fast=draw(st.sampled_from([32.0, 4.0])),
        beta_slow=draw(st.sampled_from([1.0, 0.5])),
        mscale=draw(st.sampled_from([None, 0.5, 0.707, 1.0])),
        mscale_all_dim=draw(st.sampled_from([None, 0.707, 1.0])),
        attention_factor=draw(st.sampled_from([None, None, 1.25])),
        truncate=draw(st.booleans()),
    )


@st.composite
def deepseek_configs(draw: st.DrawFn) -> DeepseekConfig:
    v3 = draw(st.booleans())
    n_group = draw(st.sampled_from([1, 2, 4]))
    topk_group = draw(st.integers(1, n_group))
    per_group = draw(st.sampled_from([2, 3, 4]))
    layers = draw(st.integers(1, 3))
    changes = {
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "hidden_size": draw(st.sampled_from([16, 32])),
        "num_hidden_layers": layers,
        "num_attention_heads": draw(st.sampled_from([1, 2, 4])),
        "q_lora_rank": draw(st.sampled_from([None, 5, 12])),
        "kv_lora_rank": draw(st.sampled_from([4, 8, 12])),
        "qk_nope_head_dim": draw(st.sampled_from([4, 6, 8])),
        "qk_rope_head_dim": draw(st.sampled_from([2, 4, 8])),
        "v_head_dim": draw(st.sampled_from([4, 6, 16])),
        "first_k_dense_replace": draw(st.sampled_from([0, 0, 1, layers])),
        "n_group": n_group,
        "topk_group": topk_group,
        "n_routed_experts": n_group * per_group,
        "num_experts_per_tok": draw(st.integers(1, min(4, topk_group * per_group))),
        "n_shared_experts": draw(st.integers(1, 2)),
        "norm_topk_prob": draw(st.booleans()) if v3 else False,
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "rope_scaling": draw(st.none() | st.sampled_from([YARN, YARN_V2]) | yarn()),
        "rope_theta": draw(st.sampled_from([1e4, 5e4])),
        "rope_interleave": draw(st.booleans()) if v3 else True,
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
    }
    return deepseek(**changes)


@st.composite
def dense_configs(draw: st.DrawFn) -> DenseConfig:
    model_type = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    heads = draw(st.sampled_from([2, 4]))
    return dense(
        model_type=model_type,
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([1, 2, heads])),
        head_dim=draw(st.sampled_from([4, 8])) if model_type == "qwen3" else None,
        num_hidden_layers=draw(st.integers(1, 3)),
        rope_scaling=draw(st.none() | st.just(LLAMA3) | yarn()) if model_type == "llama" else None,
        rope_theta=draw(st.sampled_from([1e4, 1e6])),
        attention_bias=draw(st.booleans()) if model_type != "qwen2" else False,
        mlp_bias=draw(st.booleans()) if model_type == "llama" else False,
        tie_word_embeddings=draw(st.booleans()),
    )
