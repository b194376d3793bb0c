"""Pruning: importance finds what matters, nothing pruned changes nothing, what never worked can go without a trace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.core.errors import UserError
from shoestring.cost.pruned import pruned
from shoestring.models import checkpoint
from shoestring.models._prune import Importance, importance, prune
from shoestring.models.deepseek import Deepseek, DeepseekConfig
from shoestring.models.dense import Dense, DenseConfig

QWEN = {
    "model_type": "qwen2", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2,
}  # fmt: skip
V3 = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "num_nextn_predict_layers": 1, "initializer_range": 0.2,
}  # fmt: skip
IDS = torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(5))


def _dense(**changes: Any) -> Dense:
    return Dense(DenseConfig(**QWEN | changes), generator=torch.Generator().manual_seed(0))


def _v3(**changes: Any) -> Deepseek:
    return Deepseek(DeepseekConfig(**V3 | changes), generator=torch.Generator().manual_seed(0))


def _scored(model: Any) -> Importance:
    return importance(model, [(IDS, None, None), (IDS.flip(1), None, None)])


@pytest.mark.parametrize("make", [_dense, _v3])
def test_keeping_all_changes_nothing(make: Any) -> None:
    model = make()
    torch.testing.assert_close(prune(model, _scored(model))(IDS).logits, model(IDS).logits)


def test_layers_that_do_nothing_go_first_and_without_a_trace() -> None:
    model = _dense()
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.2.{name}").weight.zero_()
    small = prune(model, _scored(model), layers=3)
    assert small.config.num_hidden_layers == 3
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits)


def test_neurons_that_are_silent_go_without_a_trace() -> None:
    model = _dense()
    silent = [1, 5, 6, 30]
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[silent] = 0
    small = prune(model, _scored(model), ffn=28)
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits)


def test_channels_that_are_empty_go_without_a_trace_but_for_the_norms_mean() -> None:
    """A channel that is zero everywhere counts in the norm's mean: 24 channels with 4 empty, against 20."""
    model = _dense()
    empty = [0, 7, 8, 23]
    with torch.no_grad():
        model.embedding[:, empty] = 0
        for block in model.model.layers:
            block.self_attn.o_proj.weight[empty] = 0
            block.mlp.down_proj.weight[empty] = 0
    small = prune(model, _scored(model), hidden=20)
    assert small.config.head_width == model.config.head_width == 12
    for parameter in (small.model.norm, *(b.input_layernorm for b in small.model.layers),
                      *(b.post_attention_layernorm for b in small.model.layers)):  # fmt: skip
        parameter.weight.data *= (24 / 20) ** 0.5
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-4)


def test_experts_are_kept_by_group_with_their_router_rows() -> None:
    model = _v3(num_nextn_predict_layers=0)
    found = _scored(model)
    quiet = [2, 5]  # one in each group of four
    with torch.no_grad():
        for number in (1, 2):
            found.experts[number][:] = 1.0
            found.experts[number][quiet] = 0.0
            model.model.layers[number].mlp.gate.e_score_correction_bias[quiet] = -1e4  # never chosen
    small = prune(model, found, experts=6)
    assert small.config.n_routed_experts == 6
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits)


def test_the_busy_expert_scores_highest() -> None:
    model = _v3()
    with torch.no_grad():
        moe = model.model.layers[1].mlp
        moe.gate.e_score_correction_bias[3] = 1e4
        moe.experts.down_proj[3] *= 50
    assert int(_scored(model).experts[1].argmax()) == 3


def test_heads_of_mla_that_say_nothing_go_without_a_trace() -> None:
    model = _v3(num_attention_heads=5, num_nextn_predict_layers=0)
    nope, v = 8, 6
    silent = {0: (1, 4), 1: (0, 3), 2: (2, 3)}  # each layer has its own
    with torch.no_grad():
        for layer, heads in silent.items():
            for head in heads:
                rows = slice(head * (nope + v) + nope, (head + 1) * (nope + v))  # the values behind the keys
                model.model.layers[layer].self_attn.kv_b_proj.weight[rows] = 0
    small = prune(model, _scored(model), heads=3)
    assert small.config.num_attention_heads == 3
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_whole_groups_of_heads_that_say_nothing_go_without_a_trace(family: str) -> None:
    model = _dense(model_type=family, num_attention_heads=6, num_key_value_heads=3, attention_bias=family == "llama")
    width = model.config.head_width
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                if part.bias is not None:
                    part.bias.normal_(generator=torch.Generator().manual_seed(layer))
            gone = slice(layer % 3 * width, (layer % 3 + 1) * width)
            block.self_attn.v_proj.weight[gone] = 0
            if block.self_attn.v_proj.bias is not None:
                block.self_attn.v_proj.bias[gone] = 0
    small = prune(model, _scored(model), heads=4)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (4, 2)
    assert small.config.head_width == width
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits)


def test_as_many_heads_stay_in_each_group() -> None:
    """Where the numbers allow it the groups keep their keys and values, and lose what is least heard."""
    model = _dense(num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=2)
    found = _scored(model)
    width, deaf = model.config.head_width, [1, 5]  # one of each group of three
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            found.heads[layer][:] = torch.arange(6) + 1.0
            for head in deaf:
                found.heads[layer][head] = 0.0
                block.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
    small = prune(model, found, heads=4)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (4, 2)
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits)


def test_the_loudest_head_scores_highest_and_padding_does_not_count() -> None:
    model = _v3(num_attention_heads=4)
    with torch.no_grad():
        model.model.layers[1].self_attn.kv_b_proj.weight[2 * 14 + 8 : 3 * 14] *= 50
    found = _scored(model)
    assert int(found.heads[1].argmax()) == 2
    segments = torch.zeros_like(IDS)
    segments[:, 8:] = -1
    padded, other = IDS.clone(), IDS.clone()
    other[:, 8:] = 3
    one, two = (importance(model, [(ids, None, segments)]) for ids in (padded, other))
    for layer in range(3):
        torch.testing.assert_close(one.heads[layer], two.heads[layer])


def test_everything_at_once_is_a_checkpoint_that_transformers_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for model, sizes in (
        (_dense(), {"layers": 2, "hidden": 16, "ffn": 24}),
        (_dense(num_attention_heads=6, num_key_value_heads=3), {"layers": 2, "hidden": 16, "ffn": 24, "heads": 2}),
        (_v3(num_attention_heads=4), {"layers": 2, "hidden": 16, "ffn": 24, "experts": 4, "heads": 3}),
    ):
        small = prune(model, _scored(model), **sizes)
        counted = [*small.parameters(), *(b for n, b in small.named_buffers() if n.endswith("correction_bias"))]
        assert small.config.shape().params().total == sum(p.numel() for p in counted)
        folder = checkpoint.save(small, None, tmp_path / small.config.model_type)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(small(IDS).logits, theirs(IDS).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({"layers": 9}, "this model has 3"), ({"experts": 5}, "do not divide"), ({"experts": 2}, "too few")],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], words: str) -> None:
    model = _v3()
    with pytest.raises(UserError, match=words):
        prune(model, _scored(model), **sizes)
    with pytest.raises(UserError, match="at least one batch"):
        importance(model, [])


def test_heads_that_are_no_groups_are_refused() -> None:
    model = _dense(num_attention_heads=12, num_key_value_heads=2)
    with pytest.raises(UserError, match="neither divide into the 2 groups of this model nor are whole groups of 6"):
        prune(model, _scored(model), heads=5)


@pytest.mark.parametrize("make", [_v3, lambda: _dense(num_attention_heads=12, num_key_value_heads=2)])
@pytest.mark.parametrize("name", ["layers", "hidden", "ffn", "experts", "heads"])
def test_the_shape_foretells_every_number(name: str, make: Any) -> None:
    """What the dry run accepts is made, with as many parameters; what it refuses is refused."""
    model = make()
    found, shape = _scored(model), model.config.shape()
    most = {"layers": shape.layers, "hidden": 8, "ffn": 8, "experts": shape.n_routed, "heads": shape.heads}[name]
    for number in range(1, most + 2):
        try:
            foretold = pruned(shape, **{name: number})
        except UserError as refused:
            with pytest.raises(UserError, match=re.escape(str(refused))):
                prune(model, found, **{name: number})
            continue
        left = prune(model, found, **{name: number}).config.shape()
        if name != "layers":  # of which kind the layers are that stay, only their scores tell
            assert left == foretold
