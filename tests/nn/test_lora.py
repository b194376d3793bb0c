"""LoRA and DoRA: nothing changes at first, only adapters learn, merging keeps what is computed."""

from __future__ import annotations

import pytest
import torch
from adapting import IDS, adapters_learn_alone

from shoestring.models.deepseek import Deepseek, DeepseekConfig
from shoestring.models.dense import Dense, DenseConfig
from shoestring.nn import lora


def _models() -> list:  # type: ignore[type-arg]
    dense = DenseConfig(
        model_type="qwen2", vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    v3 = DeepseekConfig(
        vocab_size=50, hidden_size=24, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
        first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    return [
        Dense(dense, generator=torch.Generator().manual_seed(1)),
        Deepseek(v3, generator=torch.Generator().manual_seed(1)),
    ]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_learn_alone_and_merge(which: int, dora: bool) -> None:
    model = _models()[which]
    adapters_learn_alone(model, dora, steps=12)
    plain = lora.merged(model)
    assert not lora.is_attached(plain) and lora.is_attached(model)
    assert plain.state_dict().keys() == _models()[which].state_dict().keys()
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits)


def test_dora_keeps_the_length_of_rows_apart_from_their_direction() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 7)
    part = lora.LowRank(weight, 2, 4.0, True, None)
    torch.testing.assert_close(part(weight), weight)
    with torch.no_grad():
        part.B.normal_()
    assert part.m is not None
    torch.testing.assert_close(part(weight).norm(dim=1), part.m.detach())
