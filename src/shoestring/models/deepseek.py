"""DeepSeek-V3 and V2: MLA, DeepSeekMoE, YaRN, multi-token prediction (V3 technical report, section 2).

`model_type` "deepseek_v3" routes by sigmoid scores with a correction bias, "deepseek_v2" by softmax. Field names and
meanings are those of Hugging Face's config.json. Left out: dropout, V2's device-level token dropping.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from shoestring.core.config import Config
from shoestring.core.errors import UserError
from shoestring.cost.shape import ModelShape
from shoestring.models._numbers import Count, Positive, Size
from shoestring.models._rope_keys import read_rope, write_rope
from shoestring.nn.decoder import Block, Decoder, Routed
from shoestring.nn.kernels import FP32, Kernels
from shoestring.nn.linear import SwiGLU
from shoestring.nn.mla import MLA
from shoestring.nn.moe import MoE, Routing, balance_loss
from shoestring.nn.mtp import MTPJoin
from shoestring.nn.rope import Rope, RopeScaling, yarn_mscale


class DeepseekConfig(Config):
    """Sizes and settings; the defaults are those of a small V3. `shape()` counts it, `to_hf()` writes it."""

    model_type: Literal["deepseek_v3", "deepseek_v2"] = "deepseek_v3"
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    moe_intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    q_lora_rank: Size | None = None
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    first_k_dense_replace: Count = 0
    n_routed_experts: Size
    n_shared_experts: Count = 1
    num_experts_per_tok: Size
    n_group: Size = 1
    topk_group: Size = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 1.0
    num_nextn_predict_layers: Count = 0
    max_position_embeddings: Size = 4096
    rope_theta: float = Field(10000.0, gt=1)
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = True
    rms_norm_eps: Positive = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = Field(0.006, ge=0)
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"{self.n_routed_experts} experts do not divide into n_group={self.n_group}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} is more than n_group={self.n_group}")
        if self.num_experts_per_tok > self.n_routed_experts // self.n_group * self.topk_group:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} is more than the chosen groups hold")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim} must be even")
        if self.model_type == "deepseek_v2" and (self.norm_topk_prob or self.num_nextn_predict_layers):
            raise ValueError("deepseek_v2 has no norm_topk_prob and no multi-token prediction; set them to false and 0")
        return self

    @property
    def routing(self) -> Routing:
        return Routing(
            self.n_routed_experts, self.num_experts_per_tok,
            scoring="sigmoid" if self.model_type == "deepseek_v3" else "softmax", n_group=self.n_group,
            topk_group=self.topk_group, normalise=self.norm_topk_prob, scale=self.routed_scaling_factor,
        )  # fmt: skip

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(nope + rope), times YaRN's mscale² (V3 at factor 40: 0.1352338)."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        if self.rope_scaling is not None and self.rope_scaling.mscale_all_dim:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    def shape(self) -> ModelShape:
        return ModelShape(
            vocab=self.vocab_size, d_model=self.hidden_size, layers=self.num_hidden_layers,
            heads=self.num_attention_heads, ffn=self.intermediate_size, kind="mla", q_lora=self.q_lora_rank,
            kv_lora=self.kv_lora_rank, qk_nope=self.qk_nope_head_dim, qk_rope=self.qk_rope_head_dim,
            v_dim=self.v_head_dim, n_routed=self.n_routed_experts, n_active=self.num_experts_per_tok,
            n_shared=self.n_shared_experts, expert_ffn=self.moe_intermediate_size,
            dense_layers=min(self.first_k_dense_replace, self.num_hidden_layers), n_group=self.n_group,
            topk_group=self.topk_group, gate_bias=self.model_type == "deepseek_v3", tied=self.tie_word_embeddings,
            qkv_bias=self.attention_bias, out_bias=self.attention_bias, mtp_layers=self.num_nextn_predict_layers,
        )  # fmt: skip

    def probe(self, *, device: str, generator: torch.Generator) -> Deepseek:
        """A small model to time kernels on: two blocks of these sizes, as many of them MoE as fit the whole."""
        dense, L = min(self.first_k_dense_replace, self.num_hidden_layers), min(self.num_hidden_layers, 2)
        first = L if dense == self.num_hidden_layers else min(dense, L - 1)
        small = {"num_hidden_layers": L, "first_k_dense_replace": first, "num_nextn_predict_layers": 0}
        few = self.model_copy(update=small | {"vocab_size": min(self.vocab_size, 1024)})
        return Deepseek(few, device=device, generator=generator)

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> DeepseekConfig:
        """From the contents of a config.json. Keys that change nothing here are ignored, others are refused."""
        _refuse(raw)
        known = {name: value for name, value in raw.items() if name in cls.model_fields}
        known["rope_theta"], known["rope_scaling"] = read_rope(raw)
        if raw.get("model_type") == "deepseek_v2":
            known |= {"norm_topk_prob": False, "num_nextn_predict_layers": 0, "rope_interleave": True}
            if raw.get("topk_method", "greedy") == "greedy":
                known |= {"n_group": 1, "topk_group": 1}
        for name in ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
            if known.get(name, 0) is None:
                del known[name]
        if isinstance(known.get("eos_token_id"), list):
            known["eos_token_id"] = tuple(known["eos_token_id"])
        return cls(**known)

    def to_hf(self) -> dict[str, Any]:
        """What transformers 5 and older readers find in config.json."""
        v3 = self.model_type == "deepseek_v3"
        raw = self.model_dump(mode="json") | write_rope(self.rope_theta, self.rope_scaling)
        if self.rope_scaling is None:
            raw["rope_scaling"] = None
        group_method = "group_limited_greedy" if self.n_group > 1 else "greedy"
        return raw | {
            "architectures": ["DeepseekV3ForCausalLM" if v3 else "DeepseekV2ForCausalLM"],
            "num_key_value_heads": self.num_attention_heads, "hidden_act": "silu", "attention_dropout": 0.0,
            "moe_layer_freq": 1, "scoring_func": "sigmoid" if v3 else "softmax",
            "topk_method": "noaux_tc" if v3 else group_method, "use_cache": True,
        }  # fmt: skip


def _refuse(raw: dict[str, Any]) -> None:
    """Settings of a config.json that would make it another model."""
    expected = {
        "hidden_act": "silu", "moe_layer_freq": 1,
        "scoring_func": "sigmoid" if raw.get("model_type") == "deepseek_v3" else "softmax",
    }  # fmt: skip
    for name, value in expected.items():
        if raw.get(name, value) != value:
            raise UserError(f"config.json: {name} is {raw[name]!r}; for {raw['model_type']} it must be {value!r}.")
    methods = ("noaux_tc",) if raw.get("model_type") == "deepseek_v3" else ("greedy", "group_limited_greedy")
    if raw.get("topk_method", methods[0]) not in methods:
        raise UserError(f"config.json: topk_method is {raw['topk_method']!r}; supported: {', '.join(methods)}.")


def _block(config: DeepseekConfig, layer: int, device: torch.device | None) -> Block:
    attention = MLA(
        config.hidden_size, config.num_attention_heads, q_lora=config.q_lora_rank, kv_lora=config.kv_lora_rank,
        nope=config.qk_nope_head_dim, rope=config.qk_rope_head_dim, v=config.v_head_dim, scale=config.softmax_scale,
        interleaved=config.rope_interleave, bias=config.attention_bias, device=device,
    )  # fmt: skip
    mlp: SwiGLU | MoE
    if layer < config.first_k_dense_replace:
        mlp = SwiGLU(config.hidden_size, config.intermediate_size, device=device)
    else:
        width, n_shared = config.moe_intermediate_size, config.n_shared_experts
        mlp = MoE(config.hidden_size, width, n_shared, config.routing, device=device)
    return Block(config.hidden_size, config.rms_norm_eps, attention, mlp, device=device)


class MTPModule(MTPJoin):
    """A full block between the join and its own norm."""

    def __init__(self, config: DeepseekConfig, layer: int, device: torch.device | None):
        super().__init__(config.hidden_size, config.rms_norm_eps, device=device)
        self.block = _block(config, layer, device)


class Deepseek(Decoder):
    """The model. Parameters are fp32; `kernels` chooses how products are computed, never what."""

    def __init__(
        self, config: DeepseekConfig, *, kernels: Kernels = FP32, device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ):  # fmt: skip
        device = None if device is None else torch.device(device)
        super().__init__(
            [_block(config, layer, device) for layer in range(config.num_hidden_layers)],
            vocab=config.vocab_size, d_model=config.hidden_size, eps=config.rms_norm_eps,
            tied=config.tie_word_embeddings, rope=Rope(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling),
            kernels=kernels, cache_width=config.kv_lora_rank + config.qk_rope_head_dim,
            n_experts=config.n_routed_experts, device=device,
        )  # fmt: skip
        L = config.num_hidden_layers
        self.mtp = nn.ModuleList(MTPModule(config, L + k, device) for k in range(config.num_nextn_predict_layers))
        self.config = config
        self.init_weights(config.initializer_range, generator)

    def predict_further(
        self, tokens_BT: Tensor, hidden_BTD: Tensor, positions_BT: Tensor | None, segments_BT: Tensor | None,
        seen: Routed, balance: bool,
    ) -> list[Tensor]:  # fmt: skip
        """Depth k: [B, T-k, D]; position i has seen tokens up to i+k and predicts t_{i+k+1}."""
        if not len(self.mtp):
            raise ValueError("this model has no multi-token prediction module (num_nextn_predict_layers is 0)")
        found = []
        T = tokens_BT.shape[1]
        counted_BT = None if segments_BT is None else segments_BT >= 0
        for k, module in enumerate(self.mtp, start=1):
            assert isinstance(module, MTPModule)
            positions = torch.arange(T, device=tokens_BT.device) if positions_BT is None else positions_BT
            segments = None if segments_BT is None else segments_BT[:, : T - k]
            step = self.prepare(tokens_BT[:, k:], positions[..., k:], segments, None)
            x_BTD = module.join(self.embed(tokens_BT[:, k:]), hidden_BTD[:, : T - k], self.kernels.native)
            x_BTD, routed = module.block(x_BTD, step, self.config.num_hidden_layers + k - 1)
            if routed is not None:
                seen.mtp_chosen.append(routed[1])
                if balance:
                    counted = None if counted_BT is None else counted_BT[:, : T - k]
                    seen.balance.append(balance_loss(routed[0], routed[1], counted))
            hidden_BTD = module.shared_head.norm(x_BTD, self.kernels.native)
            found.append(hidden_BTD)
        return found


MODEL_TYPES = ("deepseek_v3", "deepseek_v2")
CONFIG, MODEL = DeepseekConfig, Deepseek
