"""Shapes from Hugging Face configs: published totals, and transformers on the meta device as the oracle."""

import json

import pytest

from shoestring.core.errors import UserError
from shoestring.cost.hf import shape_from_hf
from shoestring.cost.models import model_names, named_shape, resolve_shape

PUBLISHED = {
    "deepseek-v3": 671_026_419_200, "deepseek-v2-lite": 15_706_484_224, "moonlight-16b-a3b": 15_960_110_208,
    "deepseek-v2": 235_741_434_880, "qwen2.5-7b": 7_615_616_512, "qwen2.5-0.5b": 494_032_768, "qwen3-0.6b": 596_049_920,
    "llama-3.1-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400, "llama-3.1-405b": 405_853_388_800,
    "llama-2-70b": 68_976_648_192, "mixtral-8x7b": 46_702_792_704, "bloom-176b": 176_247_271_424,
    "qwen3-30b-a3b": 30_532_122_624, "gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_totals(name):
    assert named_shape(name).params().total == PUBLISHED[name]


def test_names_and_aliases():
    assert named_shape("deepseek-ai/DeepSeek-R1") == named_shape("deepseek-v3")
    assert len(model_names()) > 25 and all(named_shape(n).params().active > 1e8 for n in model_names())
    with pytest.raises(UserError, match='Did you mean "deepseek-v3"'):
        resolve_shape("deepsek-v3")


SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80}
CONFIGS = {
    "llama": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "mistral": {"num_key_value_heads": 2, "head_dim": 24},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2_moe": {"num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
                  "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "qwen3_moe": {"num_key_value_heads": 2, "head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 40},
    "glm4_moe": {"num_key_value_heads": 2, "head_dim": 32, "attention_bias": True, "use_qk_norm": True,
                 "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
                 "first_k_dense_replace": 1},
    "gpt_oss": {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_neox": {}, "bloom": {}, "gpt2": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False, "ffn_hidden_size": 256},
    "deepseek_v3": {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
                    "v_head_dim": 8,
                    "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "attention_bias": True,
                    "num_key_value_heads": 4},
    "deepseek_v2": {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
                    "v_head_dim": 8,
                    "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                    "first_k_dense_replace": 1, "num_key_value_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_against_transformers(kind):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **SMALL, **CONFIGS[kind])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    seen = {id(p): p.numel() for p in model.parameters()}
    bias = sum(b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    assert shape_from_hf(config.to_dict()).params().total == sum(seen.values()) + bias


BASE = json.loads(json.dumps(SMALL | CONFIGS["llama"] | {"model_type": "llama"}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, '"hidden_size" is missing'),
        ({"num_attention_heads": 3}, "no multiple of 3 heads"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"layer_types": ["full_attention"]}, "1 entries for 3 layers"),
        ({"num_local_experts": 4, "num_experts_per_tok": 9}, "9 active of 4"),
        ({"num_local_experts": 4, "num_experts_per_tok": 1, "first_k_dense_replace": 9}, "9 exceeds num_hidden_layers"),
        ({"model_type": "bert", "type_vocab_size": 2}, "is an encoder"),
        ({"model_type": "ernie4_5_moe", "moe_num_experts": 64}, '"moe_num_experts" says of experts'),
        ({"model_type": "llama4_text", "num_local_experts": 16, "intermediate_size_mlp": 320}, "says of experts"),
    ],
)
def test_bad_configs(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        shape_from_hf(BASE | changes)
    assert str(caught.value).startswith("config.json")


def test_what_is_taken_for_granted_is_said():
    """GLM-4.5-Air's published sizes are read, V3.2's sparse attention is named and not passed over in silence."""
    air = shape_from_hf({
        "model_type": "glm4_moe", "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
        "n_shared_experts": 1, "n_routed_experts": 128, "num_experts_per_tok": 8, "first_k_dense_replace": 1,
        "vocab_size": 151552, "num_nextn_predict_layers": 1, "attention_bias": True, "use_qk_norm": False,
    })  # fmt: skip
    assert air.dense_layers == 1 and not air.note and air.params().total == pytest.approx(106.85e9, rel=1e-4)
    latent = SMALL | CONFIGS["deepseek_v3"] | {"model_type": "deepseek_v32", "index_topk": 2048}
    assert "indexer is not counted" in shape_from_hf(latent).note
    assert not shape_from_hf(latent | {"index_topk": None}).note


def test_bad_files(tmp_path):
    (tmp_path / "config.json").write_text("{nonsense")
    with pytest.raises(UserError, match="not JSON"):
        resolve_shape(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        resolve_shape(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="JSON object"):
        shape_from_hf([1])
    with pytest.raises(UserError, match="not known"):
        shape_from_hf({"model_type": "whisper"})
