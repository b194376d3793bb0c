"""LoRA and DoRA on models of transformers: computed, learnt and merged as by peft."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from adapting import IDS, adapters_learn_alone, next_token_loss
from torch.nn.utils import parametrize

from shoestring.core.errors import UserError
from shoestring.models import checkpoint
from shoestring.models.any import AnyModel
from shoestring.nn import lora
from shoestring.nn.kernels import Kernels

transformers = pytest.importorskip("transformers")


def _theirs(family: str, folder: Path) -> AnyModel:
    """A tiny model of a family that is not ours, written and loaded."""
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    if family == "gpt2":
        sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=50, initializer_range=0.2, pad_token_id=None, tie_word_embeddings=False, **sizes
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = checkpoint.load(folder, dtype="float32")[0]
    assert isinstance(model, AnyModel)
    return model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["olmo2", "gpt_neox"])
def test_adapters_learn_alone_and_merge_into_a_checkpoint(family: str, dora: bool, tmp_path: Path) -> None:
    model = _theirs(family, tmp_path / "base")
    names = set(model.state_dict())
    adapters_learn_alone(model, dora, steps=10)
    plain = lora.merged(model)
    assert lora.is_attached(model) and not lora.is_attached(plain) and set(plain.state_dict()) == names
    checkpoint.save(plain, None, tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_the_same_as_peft(dora: bool, tmp_path: Path) -> None:
    """The same adapters: the same logits, gradients of A, B and DoRA's lengths, and merged weights."""
    import peft  # of the dev extra: the comparison is never left out unseen

    model = _theirs("olmo2", tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(model.hf), config)
    lora.attach(model, 3, 6.0, dora, torch.Generator().manual_seed(2))
    ours = {name: part for name, part in model.hf.named_modules() if parametrize.is_parametrized(part)}
    parts = {name.removeprefix("base_model.model."): part for name, part in theirs.named_modules()
             if hasattr(part, "lora_A")}  # fmt: skip
    assert ours.keys() == parts.keys()
    with torch.no_grad():
        for name, part in ours.items():
            own = part.parametrizations.weight[0]
            own.B.normal_(generator=torch.Generator().manual_seed(len(name))).mul_(0.1)
            parts[name].lora_A["default"].weight.copy_(own.A)
            parts[name].lora_B["default"].weight.copy_(own.B)
    said, told = model(IDS).logits, theirs(IDS).logits
    torch.testing.assert_close(said, told, atol=1e-5, rtol=1e-5)
    next_token_loss(said).backward()
    next_token_loss(told).backward()
    for name, part in ours.items():
        own, other = part.parametrizations.weight[0], parts[name]
        pairs = [(own.A, other.lora_A["default"].weight), (own.B, other.lora_B["default"].weight)]
        pairs += [(own.m, other.lora_magnitude_vector["default"].weight)] if dora else []
        for mine, yours in pairs:
            torch.testing.assert_close(mine.grad, yours.grad.view_as(mine), atol=1e-6, rtol=1e-4)
    merged, unloaded = lora.merged(model).hf.state_dict(), theirs.merge_and_unload().state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, unloaded[name], atol=1e-6, rtol=1e-5)


def test_their_arithmetic_in_bf16_reads_a_sum_made_in_fp32(tmp_path: Path) -> None:
    model = _theirs("olmo2", tmp_path / "base")
    lora.attach(model, 3, 6.0, False, torch.Generator().manual_seed(2))
    with torch.no_grad():
        for parameter in lora.adapters(model).values():
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    plain = lora.merged(model)
    for each in (model, plain):
        each.kernels = Kernels(dtype="bfloat16")
    assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_transposed_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="transposed"):
        lora.attach(_theirs("gpt2", tmp_path / "base"), 3, 6.0, False)
