"""AdamW and Muon against torch's own, the split of parameters, and schedules."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from shoestring.models.deepseek import Deepseek, DeepseekConfig
from shoestring.optim.adamw import AdamW, adamw_groups
from shoestring.optim.make import optimizers
from shoestring.optim.muon import Muon
from shoestring.optim.schedules import lr_at
from shoestring.train.configs import Optim


def test_adamw_is_torchs_to_the_bit() -> None:
    """Two groups, two dtypes, a parameter without a gradient at times, a learning rate that moves."""
    torch.manual_seed(0)
    start = [torch.randn(3, 5), torch.randn(7), torch.randn(4, 4).bfloat16()]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    options = {"lr": 0.02, "betas": (0.9, 0.95)}
    a = AdamW(adamw_groups(ours, 0.1), **options)  # type: ignore[arg-type]
    b = torch.optim.AdamW(adamw_groups(theirs, 0.1), **options, eps=1e-8, fused=True)  # type: ignore[arg-type]
    for step in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = None if step == 2 and mine.ndim == 1 else torch.randn_like(mine)
            other.grad = None if mine.grad is None else mine.grad.clone()
        for optimizer in (a, b):
            optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
            optimizer.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)
            moments = b.state[other]
            assert all(torch.equal(value, moments[name]) for name, value in a.state[mine].items())
            assert a.state[mine].keys() == moments.keys()
    a.zero_grad()
    assert all(p.grad is None for p in ours)


def test_matrices_decay_and_vectors_do_not() -> None:
    matrix, stack, vector = torch.zeros(3, 4), torch.zeros(2, 3, 4), torch.zeros(4)
    decay, none = adamw_groups([matrix, vector, stack], 0.1)
    assert decay["weight_decay"] == 0.1 and [p.ndim for p in decay["params"]] == [2, 3]
    assert none["weight_decay"] == 0.0 and [p.ndim for p in none["params"]] == [1]
    assert len(adamw_groups([matrix], 0.1)) == 1


def test_an_update_imports_no_compiler() -> None:
    """torch.optim.Optimizer would: 76 MB and more than a second of every training process."""
    code = """
import sys, torch
from shoestring.optim.make import optimizers
model = torch.nn.Linear(4, 4)
model(torch.randn(2, 4)).sum().backward()
for optimizer in optimizers(model, "muon", lr=0.1, betas=(0.9, 0.95), weight_decay=0.1):
    optimizer.step()
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_muon_equals_torchs(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        grad = torch.randn(shape)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    # torch orthogonalises in bf16, we in fp32
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)
    assert (ours - start).norm() > 10 * (ours - theirs).norm()


@pytest.mark.parametrize("size", [1.0, 1e-5, 0.0])
@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_muon_by_its_formula(shape: tuple[int, int], size: float) -> None:
    """Jordan's iteration and Moonlight's scale written out in numpy, gradients of any size; the options' defaults."""
    rng = np.random.default_rng(0)
    weight, m = rng.standard_normal(shape), np.zeros(shape)
    parameter = nn.Parameter(torch.tensor(weight))
    optimizer = Muon([parameter], lr=0.02)
    for _ in range(3):
        g = size * rng.standard_normal(shape)
        parameter.grad = torch.tensor(g)
        optimizer.step()
        m = 0.95 * m + 0.05 * g
        x = 0.05 * g + 0.95 * m
        x = x / max(np.linalg.norm(x), 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * 0.2 * 20**0.5 * x
    np.testing.assert_allclose(parameter.detach().numpy(), weight, atol=1e-9)


def test_a_stack_of_matrices_is_updated_as_its_matrices() -> None:
    """More of them than they have rows or columns: the scale is that of one matrix."""
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(9, 4, 6))
    single = [nn.Parameter(stack[i].detach().clone()) for i in range(9)]
    stack.grad = torch.randn(9, 4, 6)
    for i, p in enumerate(single):
        p.grad = stack.grad[i].clone()
    Muon([stack], lr=0.1).step()
    for p in single:
        Muon([p], lr=0.1).step()
    torch.testing.assert_close(stack, torch.stack([p.detach() for p in single]))


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="shape"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer(kind: str) -> None:
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(5, 4), "layer": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    made = optimizers(model, kind, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)  # type: ignore[arg-type]
    held = [p for o in made for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    muon = {id(p) for o in made if isinstance(o, Muon) for g in o.param_groups for p in g["params"]}
    assert muon == ({id(model["layer"].weight)} if kind == "muon" else set())


def test_only_hidden_matrices_go_to_muon() -> None:
    """As in Moonlight; the tables at both ends, the routers and all vectors do not. Frozen ones go nowhere."""
    config = DeepseekConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, moe_intermediate_size=4, num_hidden_layers=2, kv_lora_rank=4,
        num_attention_heads=1, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4, first_k_dense_replace=1,
        n_routed_experts=4, num_experts_per_tok=2, num_nextn_predict_layers=1,
    )  # fmt: skip
    model = Deepseek(config)
    names = {id(p): name for name, p in model.named_parameters()}
    model.model.layers[0].self_attn.o_proj.weight.requires_grad_(False)  # type: ignore[union-attr]
    muon, adamw = optimizers(model, "muon", lr=0.1, betas=(0.9, 0.95), weight_decay=0.3)
    hidden = {names[id(p)] for p in muon.param_groups[0]["params"]}
    rest = {names[id(p)]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert muon.param_groups[0]["weight_decay"] == 0.3 and {"mtp.0.eh_proj.weight"} < hidden
    assert set(names.values()) - hidden - set(rest) == {"model.layers.0.self_attn.o_proj.weight"}
    assert {name for name, decay in rest.items() if decay} == {
        "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight", "mtp.0.block.mlp.gate.weight"
    }  # fmt: skip


def test_schedules_start_warm_and_end_low() -> None:
    wsd = Optim(lr=1.0, warmup_steps=9, schedule="wsd", final_ratio=0.1, decay_share=0.2)
    assert lr_at(0, progress=0.0, optim=wsd) == pytest.approx(0.1)
    assert lr_at(50, progress=0.5, optim=wsd) == 1.0
    assert lr_at(90, progress=0.9, optim=wsd) == pytest.approx(0.55)
    assert lr_at(100, progress=1.0, optim=wsd) == lr_at(110, progress=1.1, optim=wsd) == pytest.approx(0.1)
    cosine = Optim(lr=1.0, warmup_steps=0, schedule="cosine", final_ratio=0.0)
    assert lr_at(50, progress=0.5, optim=cosine) == pytest.approx(0.5)
    constant = Optim(lr=1.0, warmup_steps=3, schedule="constant")
    assert [lr_at(step, progress=1.0, optim=constant) for step in (0, 1, 3, 99)] == [0.25, 0.5, 1.0, 1.0]
