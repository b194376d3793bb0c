"""LoRA and DoRA: nothing changes at first, only adapters learn, merging keeps what is computed."""

from __future__ import annotations

import pytest
import torch

from shoestring.models.deepseek import Deepseek, DeepseekConfig
from shoestring.models.dense import Dense, DenseConfig
from shoestring.nn import lora

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


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
    before = model(IDS).logits.detach()
    lora.attach(model, 3, 6.0, dora, torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(IDS).logits, before)
    trained = lora.adapters(model)
    assert trained and all(name.endswith((".A", ".B", ".m")) for name in trained)
    kept = {name: p.clone() for name, p in model.named_parameters() if name not in trained}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.02)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters() if name in kept)
    plain = lora.merged(model)
    assert not lora.is_attached(plain) and lora.is_attached(model)
    assert plain.state_dict().keys() == _models()[which].state_dict().keys()
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits)


def test_dora_keeps_the_length_of_rows_apart_from_their_direction() -> None:
    weight = torch.randn(5, 7)
    part = lora.LowRank(weight, 2, 4.0, True, None)
    torch.testing.assert_close(part(weight), weight)
    with torch.no_grad():
        part.B.normal_()
    assert part.m is not None
    torch.testing.assert_close(part(weight).norm(dim=1), part.m.detach())
