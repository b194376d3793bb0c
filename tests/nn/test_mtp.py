"""Multi-token prediction: what a position may know, how many there are, and in which order the halves are joined."""

from __future__ import annotations

import model_sizes as sizes
import pytest
import torch

from shoestring.models.deepseek import Deepseek
from shoestring.nn.mtp import MTPJoin

CONFIG = sizes.deepseek(**sizes.V3)


@pytest.mark.parametrize("depth", [1, 2])
def test_one_position_fewer_a_depth(depth: int) -> None:
    config = sizes.deepseek(**{**sizes.V3, "num_nextn_predict_layers": depth})
    out = sizes.make(config)(sizes.tokens(config, 2, 10), mtp=True)
    assert [tuple(h.shape) for h in out.mtp_hidden] == [(2, 10 - k, 32) for k in range(1, depth + 1)]
    assert out.expert_load_LE is not None and len(out.expert_load_LE) == 2 + depth


@pytest.mark.parametrize("i", [0, 3, 7])
@torch.no_grad()
def test_position_i_knows_tokens_up_to_the_next(i: int) -> None:
    model = sizes.make(CONFIG)
    x_BT = sizes.tokens(CONFIG, 1, 10)
    base = model(x_BT, mtp=True).mtp_hidden[0]
    for changed in range(10):
        other = x_BT.clone()
        other[:, changed] = (other[:, changed] + 1) % CONFIG.vocab_size
        moved = (model(other, mtp=True).mtp_hidden[0][:, i] - base[:, i]).abs().max().item()
        if changed >= i + 2:
            assert moved < 5e-6, changed  # an expert's product over other tokens too may round otherwise
        else:
            assert moved > 1e-3, changed


def test_the_embedding_comes_first() -> None:
    join = MTPJoin(4, 1e-6)
    torch.manual_seed(0)
    embedding, hidden = torch.randn(2, 3, 4), 7 * torch.randn(2, 3, 4)
    with torch.no_grad():
        join.enorm.weight.mul_(2.0)
        join.eh_proj.weight.copy_(torch.cat([torch.eye(4), torch.zeros(4, 4)], dim=1))
        torch.testing.assert_close(join.join(embedding, hidden), join.enorm(embedding))
        join.eh_proj.weight.copy_(torch.cat([torch.zeros(4, 4), torch.eye(4)], dim=1))
        torch.testing.assert_close(join.join(embedding, hidden), join.hnorm(hidden))


@torch.no_grad()
def test_input_is_the_normed_hidden_state_and_the_next_embedding() -> None:
    """With a block that adds nothing, depth 1 is its norm of the joined halves; the output has a norm of its own."""
    model = sizes.make(CONFIG)
    assert isinstance(model, Deepseek)
    module = model.mtp[0]
    for linear in (module.block.self_attn.o_proj.weight, module.block.mlp.shared_experts.down_proj.weight):
        linear.zero_()
    module.block.mlp.experts.down_proj.zero_()
    x_BT = sizes.tokens(CONFIG, 2, 8)
    out = model(x_BT, mtp=True)
    joined = module.join(model.embed(x_BT[:, 1:]), out.hidden_BTD[:, :-1])
    torch.testing.assert_close(out.mtp_hidden[0], module.shared_head.norm(joined))


def test_gradients_reach_module_and_main_model_but_for_the_final_token() -> None:
    model = sizes.make(CONFIG)
    model(sizes.tokens(CONFIG, 2, 8), mtp=True, logits=False).mtp_hidden[0].sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("mtp.0.eh_proj", "mtp.0.enorm", "model.embed_tokens", "model.norm")):
            assert parameter.grad is not None and parameter.grad.any(), name


def test_main_outputs_do_not_depend_on_it() -> None:
    model, x_BT = sizes.make(CONFIG), sizes.tokens(CONFIG, 2, 8)
    assert torch.equal(model(x_BT).hidden_BTD, model(x_BT, mtp=True).hidden_BTD)


def test_models_without_it_say_so() -> None:
    config = sizes.deepseek()
    for model in (sizes.make(config), sizes.make(sizes.dense())):
        with pytest.raises(ValueError, match="no multi-token prediction"):
            model(sizes.tokens(config, 1, 4), mtp=True)
