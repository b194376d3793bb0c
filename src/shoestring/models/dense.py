"""Llama, Qwen2 and Qwen3: the dense decoders people use as students. Names are those of Hugging Face's config.json.

Qwen2 has biases on q, k and v; Qwen3 norms each head's q and k. Left out: sliding windows, dropout.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from shoestring.core.config import Config
from shoestring.core.errors import UserError
from shoestring.cost.shape import ModelShape
from shoestring.models._numbers import Positive, Size
from shoestring.models._rope_keys import read_rope, write_rope
from shoestring.nn.decoder import Block, Decoder
from shoestring.nn.gqa import GQA
from shoestring.nn.kernels import FP32, Kernels
from shoestring.nn.linear import SwiGLU
from shoestring.nn.rope import Rope, RopeScaling

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


class DenseConfig(Config):
    """Sizes and settings of a dense decoder. `head_dim` None means hidden_size / heads."""

    model_type: Literal["llama", "qwen2", "qwen3"] = "llama"
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size | None = None
    max_position_embeddings: Size = 4096
    rope_theta: float = Field(10000.0, gt=1)
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: Positive = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = Field(0.02, ge=0)
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} key-value heads"
            raise ValueError(f"{heads} evenly")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if self.head_width % 2:
            raise ValueError(f"heads are {self.head_width} wide; RoPE turns pairs, so it must be even")
        if self.model_type == "qwen2" and self.attention_bias:
            raise ValueError("qwen2 has no attention_bias key (q, k and v always have biases)")
        if self.model_type != "llama" and self.mlp_bias:
            raise ValueError(f"{self.model_type} has no mlp_bias")
        return self

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    def shape(self) -> ModelShape:
        return ModelShape(
            vocab=self.vocab_size, d_model=self.hidden_size, layers=self.num_hidden_layers,
            heads=self.num_attention_heads, kv_heads=self.num_key_value_heads, head_dim=self.head_width,
            ffn=self.intermediate_size, kind="gqa", qk_norm="head" if self.model_type == "qwen3" else "none",
            tied=self.tie_word_embeddings, qkv_bias=self.qkv_bias, out_bias=self.attention_bias, ffn_bias=self.mlp_bias,
        )  # fmt: skip

    def probe(self, *, device: str, generator: torch.Generator) -> Dense:
        """A small model to time kernels on: two blocks of these sizes."""
        small = {"num_hidden_layers": min(self.num_hidden_layers, 2), "vocab_size": min(self.vocab_size, 1024)}
        return Dense(self.model_copy(update=small), device=device, generator=generator)

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> DenseConfig:
        """From the contents of a config.json. Keys that change nothing here are ignored, others are refused."""
        if raw.get("hidden_act", "silu") != "silu":
            raise UserError(f"config.json: hidden_act is {raw['hidden_act']!r}; only 'silu' is supported.")
        if _slides(raw):
            raise UserError("config.json: sliding-window attention is not supported.")
        known = {name: value for name, value in raw.items() if name in cls.model_fields}
        known["rope_theta"], known["rope_scaling"] = read_rope(raw)
        if known.get("num_key_value_heads") is None:
            known["num_key_value_heads"] = raw["num_attention_heads"]
        if raw.get("model_type") == "qwen2":
            known.pop("attention_bias", None)
        if raw.get("model_type") == "qwen3":
            known.setdefault("head_dim", 128)
        elif known.get("head_dim") == raw["hidden_size"] / raw["num_attention_heads"]:
            del known["head_dim"]  # said twice
        if isinstance(known.get("eos_token_id"), list):
            known["eos_token_id"] = tuple(known["eos_token_id"])
        return cls(**known)

    def to_hf(self) -> dict[str, Any]:
        """What transformers 5 and older readers find in config.json."""
        raw = self.model_dump(mode="json") | write_rope(self.rope_theta, self.rope_scaling)
        if self.rope_scaling is None:
            raw["rope_scaling"] = None
        raw["head_dim"] = self.head_width
        if self.model_type == "qwen2":
            for name in ("attention_bias", "mlp_bias"):
                del raw[name]
        return raw | {
            "architectures": [ARCHITECTURES[self.model_type]], "hidden_act": "silu", "attention_dropout": 0.0,
            "use_cache": True,
        }  # fmt: skip


def _slides(raw: dict[str, Any]) -> bool:
    """Whether any layer sees a window only: Qwen's do from `max_window_layers` on, if they are told to at all."""
    if raw.get("layer_types"):
        return "sliding_attention" in raw["layer_types"]
    asked = raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None
    return bool(asked) and raw.get("max_window_layers", 28) < raw["num_hidden_layers"]


class Dense(Decoder):
    """The model. Parameters are fp32; `kernels` chooses how products are computed, never what."""

    def __init__(
        self, config: DenseConfig, *, kernels: Kernels = FP32, device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ):  # fmt: skip
        device = None if device is None else torch.device(device)
        qk_norm_eps = config.rms_norm_eps if config.model_type == "qwen3" else None

        def block() -> Block:
            attention = GQA(
                config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_width,
                qkv_bias=config.qkv_bias, o_bias=config.attention_bias, qk_norm_eps=qk_norm_eps, device=device,
            )  # fmt: skip
            mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, device=device)
            return Block(config.hidden_size, config.rms_norm_eps, attention, mlp, device=device)

        super().__init__(
            [block() for _ in range(config.num_hidden_layers)], vocab=config.vocab_size, d_model=config.hidden_size,
            eps=config.rms_norm_eps, tied=config.tie_word_embeddings,
            rope=Rope(config.head_width, config.rope_theta, config.rope_scaling), kernels=kernels,
            cache_width=2 * config.num_key_value_heads * config.head_width, device=device,
        )  # fmt: skip
        self.config = config
        self.init_weights(config.initializer_range, generator)


MODEL_TYPES = tuple(ARCHITECTURES)
CONFIG, MODEL = DenseConfig, Dense
