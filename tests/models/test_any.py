"""Models of transformers behind our interface: logits, isolation, round trip, training; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoestring.core.errors import UserError
from shoestring.models import checkpoint
from shoestring.models.any import AnyModel
from shoestring.nn.kernels import Kernels

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


def _made(folder: Path, kind: str = "olmo2", **changes: object) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TINY | changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["olmo2", "mistral", "phi3", "gpt_neox"])
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model, _ = checkpoint.load(_made(tmp_path, kind))
    assert isinstance(model, AnyModel)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 64, (2, 9))
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.config.shape().params().total == sum(p.numel() for p in theirs.parameters())


def test_packed_examples_do_not_see_each_other(tmp_path: Path) -> None:
    model, _ = checkpoint.load(_made(tmp_path))
    one, other = torch.randint(0, 64, (1, 5)), torch.randint(0, 64, (1, 7))
    packed = model(
        torch.cat([one, other], dim=1), positions_BT=torch.tensor([[*range(5), *range(7)]]),
        segments_BT=torch.tensor([[0] * 5 + [1] * 7]), logits=False,
    ).hidden_BTD  # fmt: skip
    torch.testing.assert_close(packed[:, :5], model(one).hidden_BTD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, 5:], model(other).hidden_BTD, rtol=1e-4, atol=1e-5)


def test_round_trip_and_bf16(tmp_path: Path) -> None:
    model, _ = checkpoint.load(_made(tmp_path / "a"))
    checkpoint.save(model, None, tmp_path / "b")
    again, _ = checkpoint.load(tmp_path / "b")
    ids = torch.randint(0, 64, (1, 6))
    assert torch.equal(model(ids).logits, again(ids).logits)
    again.kernels = Kernels(dtype="bfloat16")
    hidden = again(ids, logits=False).hidden_BTD
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.float(), model(ids).hidden_BTD, rtol=0.05, atol=0.05)


def test_what_the_losses_do_not_follow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more than one product"):
        checkpoint.load(_made(tmp_path, "gemma2", final_logit_softcapping=0.5))


def test_damage_is_said(tmp_path: Path) -> None:
    folder = _made(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"lm_head\.weight holds NaN"):
        checkpoint.load(folder)
    with pytest.raises(UserError, match="not sampled by this engine"):
        AnyModel(transformers.AutoModelForCausalLM.from_config(model.config)).new_cache(1, 8)


def test_an_unknown_type_is_still_said(tmp_path: Path) -> None:
    folder = _made(tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"olmo2"', '"nonsense"'))
    with pytest.raises(UserError, match='"nonsense" is not supported'):
        checkpoint.load(folder)
