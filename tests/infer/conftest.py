"""Small real models for the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shoestring.infer.engine import Engine
from shoestring.models.deepseek import Deepseek, DeepseekConfig
from shoestring.models.dense import Dense, DenseConfig
from shoestring.text.tokenizer import Tokenizer

V = 300


def deepseek(seed: int = 0) -> Deepseek:
    config = DeepseekConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, moe_intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
        first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        max_position_embeddings=128, num_nextn_predict_layers=1, initializer_range=0.2,
    )  # fmt: skip
    return Deepseek(config, generator=torch.Generator().manual_seed(seed))


def make_certain(model: Deepseek) -> Deepseek:
    """The next token is a function of the last one alone, and the MTP module knows it: every greedy draft is right."""
    D = model.config.hidden_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.mtp[0].eh_proj.weight.copy_(torch.cat([torch.eye(D), torch.zeros(D, D)], dim=1))
    return model


def dense(seed: int = 0) -> Dense:
    config = DenseConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    return Dense(config, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session", params=["deepseek", "dense"])
def model(request: pytest.FixtureRequest) -> Deepseek | Dense:
    return deepseek() if request.param == "deepseek" else dense()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["last digit of 3 + 8 + 4 ? 1 2 5 6 7 9 0"], V)


@pytest.fixture(scope="module", params=["auto", False], ids=["native", "plain"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Engines that are not told otherwise take native steps where there is a compiler; and then plain ones.

    For a whole module: `pytestmark = pytest.mark.usefixtures("both_ways")`. The default itself is changed, so that
    no engine of a module is forgotten, those of its helpers included.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Engine.__init__.__kwdefaults__, "native", request.param)
        yield request.param
