"""The paged cache: equal to the plain forward however the tokens arrive."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoestring.core.nouns import Completion, Sampling
from shoestring.infer import chunks as chunks_module
from shoestring.infer.attend import attend_blocks, attend_gathered, make_plan
from shoestring.infer.runner import ModelRunner
from shoestring.infer.scheduler import Work
from shoestring.infer.sequence import Request, Sequence
from shoestring.models.deepseek import Deepseek, DeepseekConfig
from shoestring.models.dense import Dense, DenseConfig

from .conftest import V, deepseek, dense

IDS = torch.randint(0, V, (60,), generator=torch.Generator().manual_seed(5)).tolist()


def qwen3() -> Dense:
    config = DenseConfig(
        model_type="qwen3", vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=12, max_position_embeddings=128, initializer_range=0.2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Dense(config, generator=torch.Generator().manual_seed(1))


def qwen2() -> Dense:
    config = DenseConfig(
        model_type="qwen2", vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    model = Dense(config, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    return model


def v3(**changes: Any) -> Deepseek:
    """With a query latent, groups of experts, YaRN, biases; `changes` make the projections too wide to fuse."""
    settings = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
        "num_hidden_layers": 3, "num_attention_heads": 2, "q_lora_rank": 20, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "n_shared_experts": 2,
        "routed_scaling_factor": 2.5, "max_position_embeddings": 256, "initializer_range": 0.2, "attention_bias": True,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    }  # fmt: skip
    model = Deepseek(DeepseekConfig(**(settings | changes)), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(2))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1, generator=torch.Generator().manual_seed(4))
    return model


FAMILIES = {
    "deepseek": deepseek, "dense": dense, "qwen3": qwen3, "qwen2": qwen2, "v3": v3,
    "v3 unfused": lambda: v3(kv_lora_rank=64, qk_nope_head_dim=4, v_head_dim=4, q_lora_rank=32),
    "v2": lambda: v3(model_type="deepseek_v2", norm_topk_prob=False, q_lora_rank=None, rope_interleave=True),
    "half-split": lambda: v3(rope_interleave=False, num_experts_per_tok=1),
}  # fmt: skip


@pytest.fixture(params=list(FAMILIES))
def any_model(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]()


def hidden_of(
    model: Any, cuts: list[int], *, size: int = 8, tile: int = 0, native: bool = False
) -> torch.Tensor:  # fmt: skip
    """All hidden states of IDS, computed in pieces that end at `cuts`."""
    return torch.cat([ran.hidden_ND for ran in pieces_of(model, cuts, size=size, tile=tile, native=native)])


def pieces_of(model: Any, cuts: list[int], *, size: int, tile: int, native: bool, routed: bool = False) -> list[Any]:
    runner = ModelRunner(model, blocks=20, block_size=size, tile=tile, native=native)
    sequence = Sequence(Request("r", IDS, Sampling(), frozenset()), 0)
    sequence.blocks = [(7 * i + 3) % 20 for i in range(-(-len(IDS) // size))]  # scattered
    pieces = []
    for table, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(IDS)], strict=True)):
        sequence.table = table
        pieces.append(runner.run([Work(sequence, start, end)], routed=routed))
    return pieces


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(
    "cuts", [[], list(range(1, 60)), [1, 2, 33], [40], [10, 58]], ids=["whole", "tokens", "mixed", "late", "tail"]
)
def test_logits_are_those_of_the_plain_forward(any_model: Any, cuts: list[int]) -> None:
    with torch.no_grad():
        expected = any_model(torch.tensor([IDS])).logits_BTV[0]
        found = any_model.unembed(hidden_of(any_model, cuts))
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("expand", [True, False])
def test_expanded_and_absorbed_chunks_are_the_same(expand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = v3()
    monkeypatch.setattr("shoestring.infer.layers.expands", lambda *_: expand)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).hidden_BTD[0]
    assert relative(hidden_of(model, [20, 45]), expected) < 1e-5


def test_the_border_is_that_of_the_facts() -> None:
    """V3: 512 · (128 + 128) / (2 · 512 + 64 - (128 + 64 + 128)) = 170.7 new tokens against a long history."""

    def first(start: int) -> int:
        cost, saved = 512 * 256, 2 * 512 - 256
        none = torch.empty(0)
        return next(
            n
            for n in range(1, 400)
            if chunks_module.expands(chunks_module.Chunk(slice(0, n), start, none), cost, saved)
        )

    assert first(10**6) == 171
    assert first(0) == 1


@pytest.mark.parametrize("tables", [
    [[0], [1], [2]], [[4], [0], [9]], [[0, 1], [2], [3, 4, 5]], [[5, 0], [5, 1], [5, 2, 8]], [[5, 6], [5, 6], [1, 6]],
    [[11, 0, 6]],
])  # fmt: skip
@pytest.mark.parametrize("G", [1, 2])
def test_attention_where_the_blocks_lie(tables: list[list[int]], G: int) -> None:
    generator = torch.Generator().manual_seed(1)
    size, H, K = 4, 4, 6
    keys, values = (torch.randn(12, G, size, K, generator=generator) for _ in range(2))
    q_RHK = torch.randn(len(tables), H, K, generator=generator)
    length_R = torch.tensor([len(table) * size - i % size for i, table in enumerate(tables)])
    plan = make_plan(tables, torch.device("cpu"))
    for v in (values, keys):
        found = attend_blocks(q_RHK, keys, v, plan, plan.bias(length_R, size), 0.3)
        assert torch.allclose(found, attend_gathered(q_RHK, keys, v, tables, length_R, 0.3), atol=1e-6)


def ids_of(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]
