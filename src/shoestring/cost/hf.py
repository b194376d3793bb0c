"""A ModelShape from a Hugging Face config.json, read and never executed.

Families: deepseek_v2, deepseek_v3 (also Kimi K2, Moonlight), llama, mistral, mixtral, qwen2, qwen2_moe, qwen3,
qwen3_moe, gpt_oss, glm4_moe, olmo, olmo2, olmoe, gemma, gemma2, phi3, gpt_neox, gpt2, falcon, bloom, gpt_bigcode.
Another model_type with the usual Llama keys is read as Llama, and said to be so; encoders, and experts under names that
are not known, are refused. Left out: vision and audio towers (of a
composite config the text_config is read), linear-attention and state-space layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoestring.core.errors import UserError
from shoestring.cost.shape import ModelShape

MLA_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2", "deepseek_v32", "longcat_flash", "minicpm3")
LLAMA_TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gpt_oss", "olmo", "olmo2",
               "olmoe", "gemma", "gemma2", "phi3", "granite", "smollm3", "cohere", "glm4_moe")  # fmt: skip
OLD_TYPES = ("gpt2", "gpt_bigcode", "gpt_neox", "falcon", "bloom")
NO_ATTENTION = ("ssm_cfg", "state_size", "mamba_d_state", "ssm_state_size", "linear_num_key_heads", "attn_layer_period",
                "layers_block_type", "hybrid_override_pattern")  # fmt: skip
INSTEAD = (
    '"shoestring plan stage sft CONFIG --tokens 10B" (or distill, or logits) prices training it by parameters counted '
    "from its modules, where transformers has its model_type."
)
MOST = 10_000_000  # of any size in a config
MOST_LAYERS = 10_000


class _Keys:
    """The config with complaints that name key, file and model type."""

    def __init__(self, config: Mapping[str, Any], origin: str) -> None:
        self.config, self.origin = config, origin
        self.kind = str(config.get("model_type") or "")
        self.needs = (
            f'model_type "{self.kind}" needs it' if self.kind else "a config without model_type is read as Llama's"
        )

    def size(self, *names: str, default: int | None = None) -> int:
        """The first of `names` that is present, as a whole number of at least 0 (null counts as absent)."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 0:
                raise UserError(f"{self.origin}: {name} is {value!r}; it must be a whole number of at least 0.")
            most = MOST_LAYERS if "layer" in names[0] else MOST
            if value > most:
                raise UserError(f"{self.origin}: {name} is {value!r}; no model is that large, give at most {most:,}.")
            return int(value)
        if default is None:
            raise UserError(f'{self.origin}: key "{names[0]}" is missing, and {self.needs}.')
        return default

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.config.get(name, default)
        return default if value is None else bool(value)


def known_type(config: Mapping[str, Any]) -> bool:
    """Whether the sizes in a config are read by its own family's formulas, not by Llama's for want of better ones."""
    inner = config.get("text_config")
    merged = {**inner, "model_type": config.get("model_type")} if isinstance(inner, Mapping) else config
    if any(merged.get(key) is not None for key in NO_ATTENTION):
        return False
    return str(merged.get("model_type") or "") in (*MLA_TYPES, *LLAMA_TYPES, *OLD_TYPES, "")


def shape_from_hf(config: Mapping[str, Any], origin: str = "config.json") -> ModelShape:
    """The shape a Hugging Face config describes. Raises UserError for missing or contradictory keys."""
    if not isinstance(config, Mapping):
        raise UserError(f"{origin}: a model config is a JSON object; this is a {type(config).__name__}.")
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        config = {"model_type": config.get("model_type"), **inner}
    keys = _Keys(config, origin)
    for key in NO_ATTENTION:
        if config.get(key) is not None:
            raise UserError(f'{origin}: key "{key}" tells of layers without attention, whose layouts and decoding are '
                            f"not priced here; {INSTEAD}")  # fmt: skip
    try:
        if keys.kind in MLA_TYPES or config.get("kv_lora_rank"):
            return _latent(keys).with_(note=_latent_note(keys))
        if keys.kind in OLD_TYPES:
            return _older(keys)
        if keys.kind in (*LLAMA_TYPES, ""):
            return _llama(keys)
        if {"hidden_size", "num_attention_heads"} <= set(config):
            _known_parts(keys)
            return _llama(keys).with_(note=f'model_type "{keys.kind}" is not known: its keys are read as Llama\'s')
    except UserError as error:
        raise UserError(str(error).replace("model shape:", f"{origin}:")) from None
    known = ", ".join((*MLA_TYPES[:2], *LLAMA_TYPES, *OLD_TYPES))
    raise UserError(f'{origin}: model_type "{keys.kind}" is not known and its keys are not Llama\'s (known: {known}); '
                    f"{INSTEAD}")  # fmt: skip


def _latent_note(keys: _Keys) -> str:
    """What is taken for granted of a config with latent attention."""
    if keys.config.get("index_topk"):
        return "sparse attention (index_topk): its indexer is not counted, and attention is priced over all tokens"
    return "" if keys.kind in MLA_TYPES else f'model_type "{keys.kind}" is not known: its keys are read as DeepSeek\'s'


def _known_parts(keys: _Keys) -> None:
    """Raises UserError for an unknown type that Llama's keys cannot tell: an encoder, experts by other names."""
    config = keys.config
    if config.get("is_encoder_decoder") or config.get("type_vocab_size"):
        raise UserError(f'{keys.origin}: model_type "{keys.kind}" is an encoder; only decoders are known here.')
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    others = ("interleave_moe_layer_step", "intermediate_size_mlp")  # Llama 4: layers of two kinds
    strange = [k for k, v in config.items() if ("expert" in k or "moe" in k) and type(v) in (int, list) and v]
    if strange and (not any(config.get(name) for name in names) or any(config.get(k) for k in others)):
        raise UserError(f'{keys.origin}: model_type "{keys.kind}" is not known, nor what its "{strange[0]}" says of '
                        "experts; give the sizes in a known type's keys.")  # fmt: skip


def load_config(path: Path) -> ModelShape:
    """The shape in a config.json, or in a folder that holds one."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} does not exist; give a model name, a config.json or a folder with one.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is not JSON: {error}.") from None
    return shape_from_hf(config, str(file))


def _common(keys: _Keys) -> dict[str, Any]:
    layers = keys.size("num_hidden_layers", "n_layer", "n_layers")
    return {
        "vocab": keys.size("vocab_size"), "d_model": keys.size("hidden_size", "n_embd", "d_model"), "layers": layers,
        "heads": keys.size("num_attention_heads", "n_head", "n_heads"),
        "tied": keys.flag("tie_word_embeddings", keys.kind in ("gemma", "gemma2", "cohere", *OLD_TYPES)),
    }  # fmt: skip


def _latent(keys: _Keys) -> ModelShape:
    common, layers = _common(keys), keys.size("num_hidden_layers")
    routed = keys.size("n_routed_experts", "num_local_experts", "num_experts", default=0)
    noaux = keys.config.get("topk_method", "noaux_tc" if keys.kind == "deepseek_v3" else "") == "noaux_tc"
    experts = _latent_experts(keys, layers, routed) if routed else {}
    bias = keys.flag("attention_bias")
    return ModelShape(
        **common, kind="mla", ffn=keys.size("intermediate_size"), q_lora=keys.size("q_lora_rank", default=0) or None,
        kv_lora=keys.size("kv_lora_rank"), qk_nope=keys.size("qk_nope_head_dim"), qk_rope=keys.size("qk_rope_head_dim"),
        v_dim=keys.size("v_head_dim"), gate_bias=bool(routed) and noaux, qkv_bias=bias, out_bias=bias,
        mtp_layers=keys.size("num_nextn_predict_layers", "num_mtp_layers", default=0), **experts,
    )  # fmt: skip


def _latent_experts(keys: _Keys, layers: int, routed: int) -> dict[str, Any]:
    greedy = keys.kind == "deepseek_v2" and keys.config.get("topk_method", "greedy") == "greedy"  # knows no groups
    first, freq = keys.size("first_k_dense_replace", default=0), max(1, keys.size("moe_layer_freq", default=1))
    if first > layers:
        raise UserError(f"{keys.origin}: first_k_dense_replace {first} exceeds num_hidden_layers {layers}.")
    moe = sum(1 for i in range(first, layers) if i % freq == 0)
    return {
        "n_routed": routed, "n_active": keys.size("num_experts_per_tok"),
        "n_shared": keys.size("n_shared_experts", default=0),
        "expert_ffn": keys.size("moe_intermediate_size"), "dense_layers": layers - moe,
        "n_group": 1 if greedy else keys.size("n_group", default=1) or 1,
        "topk_group": 1 if greedy else keys.size("topk_group", default=1) or 1,
    }  # fmt: skip


def _llama(keys: _Keys) -> ModelShape:
    common, kind = _common(keys), keys.kind
    heads = common["heads"]
    bias = keys.flag("attention_bias", kind in ("gpt_oss",))
    routed = keys.size("num_local_experts", "num_experts", "n_routed_experts", default=0)
    per_head = kind in ("qwen3", "qwen3_moe") or (kind == "glm4_moe" and keys.flag("use_qk_norm"))
    return ModelShape(
        **common, kv_heads=keys.size("num_key_value_heads", default=heads), head_dim=keys.size("head_dim", default=0),
        ffn=keys.size("intermediate_size", default=0 if routed else None),
        qkv_bias=bias or kind in ("qwen2", "qwen2_moe"), ffn_bias=keys.flag("mlp_bias"),
        out_bias=bias and kind != "glm4_moe",
        qk_norm="head" if per_head else "full" if kind in ("olmoe", "olmo2") else "none",
        norms_per_layer=4 if kind == "gemma2" else 2, sinks=kind == "gpt_oss",
        mtp_layers=keys.size("num_nextn_predict_layers", default=0),
        **(_llama_experts(keys, routed) if routed else {}), **_windows(keys, common["layers"]),
    )  # fmt: skip


def _llama_experts(keys: _Keys, routed: int) -> dict[str, Any]:
    kind, layers = keys.kind, keys.size("num_hidden_layers")
    width = keys.size("moe_intermediate_size", "intermediate_size")
    step = max(1, keys.size("decoder_sparse_step", default=1))
    only_dense = keys.config.get("mlp_only_layers") or []
    first = keys.size("first_k_dense_replace", default=0)
    if first > layers:
        raise UserError(f"{keys.origin}: first_k_dense_replace {first} exceeds num_hidden_layers {layers}.")
    moe = sum(1 for i in range(first, layers) if i not in only_dense and (i + 1) % step == 0)
    shared = keys.size("shared_expert_intermediate_size", default=0)
    gpt_oss = kind == "gpt_oss"
    return {
        "n_routed": routed, "n_active": keys.size("num_experts_per_tok", "experts_per_token"), "expert_ffn": width,
        "n_shared": 1 if shared else keys.size("n_shared_experts", default=0), "shared_ffn": shared,
        "shared_gate": bool(shared), "dense_layers": layers - moe, "expert_bias": gpt_oss, "router_bias": gpt_oss,
        "gate_bias": kind == "glm4_moe", "n_group": keys.size("n_group", default=1) or 1,
        "topk_group": keys.size("topk_group", default=1) or 1,
    }  # fmt: skip


def _windows(keys: _Keys, layers: int) -> dict[str, Any]:
    """Sliding windows: by `layer_types` where given, else every layer of a model that switches them on."""
    width = keys.size("sliding_window", default=0)
    types = keys.config.get("layer_types")
    if isinstance(types, list) and types:
        if len(types) != layers:
            raise UserError(f"{keys.origin}: layer_types has {len(types)} entries for {layers} layers.")
        count = types.count("sliding_attention")
    elif keys.kind == "gemma2":
        count = (layers + 1) // 2
    elif keys.kind in ("gpt_oss",):
        count = layers // 2
    else:
        count = layers if keys.flag("use_sliding_window", keys.kind in ("mistral", "mixtral", "phi3")) else 0
    return {"window": width, "window_layers": count} if width and count else {}


def _older(keys: _Keys) -> ModelShape:
    """GPT-2, BigCode, NeoX, Falcon, BLOOM: LayerNorm, plain FFN, biases everywhere but in Falcon."""
    common, kind = _common(keys), keys.kind
    d, heads = common["d_model"], common["heads"]
    bias = keys.flag("bias", kind != "falcon")
    kv = heads
    if keys.flag("multi_query", kind == "gpt_bigcode"):
        kv = 1
    if keys.config.get("num_kv_heads") and keys.flag("new_decoder_architecture"):
        kv = keys.size("num_kv_heads")
    positions = keys.size("n_positions", "max_position_embeddings", default=0) if kind in ("gpt2", "gpt_bigcode") else 0
    common["tied"] = keys.flag("tie_word_embeddings", kind != "gpt_neox")
    width = ("intermediate_size",) if kind == "gpt_neox" else ("n_inner", "ffn_hidden_size")
    return ModelShape(
        **common, kv_heads=kv, ffn=keys.size(*width, default=4 * d), ffn_mats=2,
        qkv_bias=bias, out_bias=bias, ffn_bias=bias, norm_bias=True, embedding_norm=kind == "bloom",
        extra_tables=positions * d,
        norms_per_layer=1 if kind == "falcon" and not keys.flag("new_decoder_architecture") else 2,
    )  # fmt: skip
