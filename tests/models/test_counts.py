"""Models hold exactly the numbers that the cost side counts: released sizes, on the meta device, and drawn ones."""

from __future__ import annotations

from typing import Any

import model_sizes as sizes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.models.deepseek import Deepseek, DeepseekConfig
from shoestring.models.dense import Dense, DenseConfig
from shoestring.nn.decoder import Decoder

HEADS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
V3: dict[str, Any] = {
    **HEADS, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128, "q_lora_rank": 1536,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
MOONLIGHT: dict[str, Any] = {
    **HEADS, "vocab_size": 163840, "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "first_k_dense_replace": 1, "num_attention_heads": 16, "q_lora_rank": None,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
}  # fmt: skip
V2_LITE = {
    **MOONLIGHT, "model_type": "deepseek_v2", "vocab_size": 102400, "intermediate_size": 10944, "norm_topk_prob": False,
}  # fmt: skip


def count(model: Decoder, prefix: str | tuple[str, ...] = "") -> int:
    return sum(tensor.numel() for name, tensor in model.state_dict().items() if name.startswith(prefix))


@pytest.mark.parametrize(
    ("raw", "main", "mtp"),
    [(V3, 671_026_419_200, 11_610_068_224), (MOONLIGHT, 15_960_110_208, 0), (V2_LITE, 15_706_484_224, 0)],
)
def test_released_models(raw: dict[str, Any], main: int, mtp: int) -> None:
    config = DeepseekConfig(**raw)
    model = Deepseek(config, device="meta")
    assert count(model, ("model.", "lm_head.")) == main == config.shape().params().total
    assert count(model, "mtp.") == mtp == config.shape().params().mtp


def test_qwen2_5_half_a_billion() -> None:
    config = DenseConfig(
        model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    assert count(Dense(config, device="meta")) == 494_032_768 == config.shape().params().total


@settings(max_examples=25)
@given(config=sizes.deepseek_configs(), mtp=st.integers(0, 2))
def test_drawn_deepseek(config: DeepseekConfig, mtp: int) -> None:
    if config.model_type == "deepseek_v3" and config.first_k_dense_replace < config.num_hidden_layers:
        config = config.model_copy(update={"num_nextn_predict_layers": mtp})
    model = Deepseek(config, device="meta")
    counted = config.shape().params()
    assert count(model, ("model.", "lm_head.")) == counted.total
    assert count(model, "mtp.") == counted.mtp


@settings(max_examples=25)
@given(config=sizes.dense_configs())
def test_drawn_dense(config: DenseConfig) -> None:
    assert count(Dense(config, device="meta")) == config.shape().params().total
