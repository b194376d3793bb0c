"""The one optimiser step: independent of how its batch was split, honest about sums, loud when not finite."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from shoestring.core.nouns import Sampling
from shoestring.data.batch import Example, packed_batches, stream_batch
from shoestring.data.textbook import problems
from shoestring.infer.engine import Engine
from shoestring.losses import next_token, policy
from shoestring.losses._tokens import Tokens
from shoestring.models import checkpoint
from shoestring.models.deepseek import Deepseek
from shoestring.nn import attention_native
from shoestring.nn.kernels import Kernels
from shoestring.optim.base import Optimizer
from shoestring.optim.make import optimizers
from shoestring.recipes import quickstart
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import Optim, SftStage, Textbook
from shoestring.train.examples import examples_of_step, textbook_examples
from shoestring.train.rollouts import answer_groups, rollout_example
from shoestring.train.step import TrainState, accumulate, max_violation, mean_length, train_step, training_flops

STAGE = SftStage(
    name="x",
    steps=1,
    textbook=Textbook(mix=quickstart.LEARN),
    optim=Optim(lr=1e-2, warmup_steps=0),
    mtp_lambda=0.3,
    balance_alpha=0.0,
)


def _batches(tokenizer: Tokenizer, per: int, count: int = 12) -> list:  # type: ignore[type-arg]
    examples = textbook_examples(quickstart.LEARN, 0.5, 3, count, tokenizer)
    return packed_batches(examples, row_tokens=128, tokens_per_microbatch=per, pad_id=tokenizer.pad)


@pytest.mark.parametrize("per", [128, 256])
def test_any_split_into_microbatches_gives_the_same_gradient(model: Deepseek, tokenizer: Tokenizer, per: int) -> None:
    """Of every term: rows that are full and rows that are padding for the most part count alike in the balance."""
    found = []
    for size in (10_000, per):
        model.zero_grad()
        batches = _batches(tokenizer, size)
        loss, metrics, load_LE = accumulate(model, batches, next_token.loss, mtp_lambda=0.3, balance_alpha=1.0)
        assert load_LE is not None and metrics["nll"] == pytest.approx(loss, rel=1e-5)
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((len(batches), metrics, load_LE, grads))
    (one, whole, load_LE, want), (several, split, again_LE, got) = found
    assert one == 1 < several and torch.equal(load_LE, again_LE)
    assert split == pytest.approx(whole, rel=1e-5) and want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-6, msg=name)


def test_the_gradient_is_that_of_the_formula(model: Deepseek, tokenizer: Tokenizer) -> None:
    """L = mean of -log p(next) + λ · mean of -log p(the one after) + α · Σ over layers of the balance, written out."""
    examples = textbook_examples(quickstart.LEARN, 0.5, 3, 12, tokenizer)
    batches = packed_batches(examples, row_tokens=128, tokens_per_microbatch=256, pad_id=tokenizer.pad)
    accumulate(model, batches, next_token.loss, mtp_lambda=0.3, balance_alpha=0.1)
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.kernels = Kernels(experts="plain", attention="plain")
    first, second = [], []
    for example in examples:  # each alone: no packing, no padding, no shifted copies of the targets
        ids = torch.tensor([example.ids])
        out = model(ids, mtp=True)
        for t, (id, weight) in enumerate(zip(example.ids, example.weight, strict=True)):
            if t >= 1 and weight:
                first.append(-out.logits_BTV[0, t - 1].log_softmax(-1)[id])
            if t >= 2 and weight:
                second.append(-model.unembed(out.mtp_hidden[0])[0, t - 2].log_softmax(-1)[id])
    rows = torch.cat([batch.tokens_BT for batch in batches])
    segments = torch.cat([batch.segments_BT for batch in batches])
    positions = torch.cat([batch.positions_BT for batch in batches])
    balance = model(rows, positions_BT=positions, segments_BT=segments, mtp=True, balance=True).balance
    (torch.stack(first).mean() + 0.3 * torch.stack(second).mean() + 0.1 * balance).backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert want.keys() == got.keys() and any("mtp" in name for name in want)
    for name in want:
        assert (got[name] - want[name]).norm() <= 1e-4 * want[name].norm() + 1e-7, name


def test_a_stream_s_mtp_loss_is_a_mean_over_its_own_tokens(model: Deepseek) -> None:
    """A row of T tokens has T-1 next ones and T-2 after those: two divisors. The main loss is behind a softcap here."""
    rows = np.random.default_rng(0).integers(0, 50, (2, 9))
    with torch.no_grad():
        out = model(torch.from_numpy(rows), mtp=True)
    model.softcap = 0.1
    first = (0.1 * torch.tanh(out.logits_BTV[:, :-1] / 0.1)).log_softmax(-1).gather(-1, torch.tensor(rows[:, 1:, None]))
    ahead = (
        model.unembed(out.mtp_hidden[0])
        .detach()[:, : 9 - 2]
        .log_softmax(-1)
        .gather(-1, torch.tensor(rows[:, 2:, None]))
    )
    loss, metrics, _ = accumulate(model, [stream_batch(rows)], next_token.loss, mtp_lambda=0.3, balance_alpha=0.0)
    assert loss == pytest.approx(-float(first.mean()), rel=1e-5)
    assert metrics["mtp"] == pytest.approx(-float(ahead.mean()), rel=1e-5)


class Noting(Optimizer):
    """Notes the learning rate and the norm of the gradient that it is given."""

    seen: list[tuple[float, float]]

    def step(self) -> None:
        norms = torch.stack(
            [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        )
        self.seen.append((self.param_groups[0]["lr"], float(norms.norm())))


def test_what_an_optimiser_is_given(model: Deepseek, tokenizer: Tokenizer) -> None:
    """The schedule's rate at this step, a gradient no longer than `clip_norm`, and that of one batch alone."""
    noting = Noting(model.parameters(), {"lr": 9.0})
    noting.seen = []
    state, batches = TrainState(model, [noting]), _batches(tokenizer, 10_000)
    found, wanted, clip = [], [], 1e3
    for _ in range(3):
        optim = Optim(lr=0.1, warmup_steps=3, clip_norm=clip, schedule="constant")
        stage = STAGE.model_copy(update={"optim": optim, "bias_gamma": 0.0})
        found.append(train_step(state, batches, next_token.loss, stage, progress=0.0))
        whole = found[0].grad_norm
        wanted.append(min(clip, whole))
        clip = 0.7 * clip if clip < whole else 0.9 * whole
    assert [lr for lr, _ in noting.seen] == [s.lr for s in found] == pytest.approx([0.025, 0.05, 0.075])
    assert [norm for _, norm in noting.seen] == pytest.approx(wanted, rel=1e-4) and wanted[0] > wanted[1] > wanted[2]
    assert [s.grad_norm for s in found] == pytest.approx([whole] * 3, rel=1e-5)
    assert found[0].flops == training_flops(model, batches, mtp=True)
    assert (state.tokens, state.flops) == pytest.approx((3 * found[0].tokens, 3 * found[0].flops))


def test_the_router_s_bias_moves_towards_balance(model: Deepseek, tokenizer: Tokenizer) -> None:
    """b += γ sign(mean load - load), by the load of the whole batch (V3 section 2.1.2)."""
    _, _, load_LE = accumulate(model, _batches(tokenizer, 128), next_token.loss, mtp_lambda=0.3, balance_alpha=0.0)
    assert load_LE is not None
    model.zero_grad()
    state, stage = TrainState(model, [Noting(model.parameters(), {})]), STAGE.model_copy(update={"bias_gamma": 0.01})
    state.optimizers[0].seen = []  # type: ignore[attr-defined]
    stats = train_step(state, _batches(tokenizer, 128), next_token.loss, stage, progress=0.0)
    load, biases = load_LE.double(), [b for name, b in model.named_buffers() if name.endswith("correction_bias")]
    want = 0.01 * torch.sign(load.mean(1, keepdim=True) - load)
    torch.testing.assert_close(torch.stack(biases).double(), want, check_dtype=False)
    assert stats.metrics["max_violation"] == pytest.approx(float((load.amax(1) / load.mean(1)).mean()) - 1)


def test_counts_by_hand(model: Deepseek) -> None:
    """Totals, MaxVio (arXiv 2408.15664), lengths, and 6 N + 3 A FLOPs a token with the MTP module's own."""
    state = TrainState(None, [], tokens=10, sampled=5, flops=1.0, checked_tokens=3, checked_flops=0.5)
    assert state.spent() == {"tokens": 18, "sampled_tokens": 8, "flops": 1.5}
    assert max_violation(torch.tensor([[4, 0, 0, 0], [1, 1, 2, 0], [1, 1, 1, 1]])) == pytest.approx((3 + 1 + 0) / 3)
    stream = stream_batch(np.zeros((2, 6)))
    assert mean_length(stream) == 6.0
    whole = [Example(list(range(n)), [1.0] * n) for n in (4, 8)]
    assert mean_length(packed_batches(whole, row_tokens=12, tokens_per_microbatch=99, pad_id=0)[0]) == 6.0
    shared = [Example([1, 2, 3, 4, 5, i, i, i], [0.0] * 5 + [1.0] * 3, stem=4) for i in (6, 7)]  # 4, then twice 4
    branches = packed_batches(shared, row_tokens=12, tokens_per_microbatch=99, pad_id=0)[0]
    keys = [1, 2, 3, 4] + 2 * [5, 6, 7, 8]
    assert (mean_length(branches) + 1) / 2 == pytest.approx(sum(keys) / len(keys))
    c, n = model.config, model.config.shape().matmul_params(mtp=True)
    per_key = 2 * c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    attention = per_key * (c.num_hidden_layers + 1) * 6 / 2
    assert training_flops(model, [stream], mtp=True) == pytest.approx(12 * (6 * n + 3 * attention))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_either_is_enough_to_stop(what: str, model: Deepseek, tokenizer: Tokenizer) -> None:
    def broken(hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        total = hidden_ND.sum()
        if what == "gradient":
            total.register_hook(lambda grad: grad * float("inf"))
            return total, {}
        return total + float("inf"), {}

    state = TrainState(model, optimizers(model, "adamw", lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1))
    with pytest.raises(FloatingPointError, match="not finite"):
        train_step(state, _batches(tokenizer, 10_000), broken, STAGE, progress=0.0)


def test_a_step_learns_counts_and_balances(model: Deepseek, tokenizer: Tokenizer) -> None:
    state = TrainState(model, optimizers(model, "muon", lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1))
    batches = _batches(tokenizer, 10_000)
    before = [m.e_score_correction_bias.clone() for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    first = train_step(state, batches, next_token.loss, STAGE, progress=0.0)
    for _ in range(8):
        last = train_step(state, batches, next_token.loss, STAGE, progress=0.5)
    assert last.loss < first.loss - 0.5
    assert state.step == 9 and state.tokens == 9 * sum(b.tokens for b in batches)
    assert first.flops > 6 * model.config.shape().matmul_params() * first.tokens
    after = [m.e_score_correction_bias for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    assert any((a != b).any() for a, b in zip(after, before, strict=True))


def test_a_gradient_that_is_not_finite_stops_in_a_sentence(model: Deepseek, tokenizer: Tokenizer) -> None:
    state = TrainState(model, optimizers(model, "adamw", lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1))
    with torch.no_grad():
        model.head_weight[3, 0] = float("inf")
    kept = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=r"step 0: not finite; lower optim\.lr"):
        train_step(state, _batches(tokenizer, 10_000), next_token.loss, STAGE, progress=0.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))


def test_nothing_to_learn_is_said(model: Deepseek, tokenizer: Tokenizer) -> None:
    batches = _batches(tokenizer, 10_000)
    for batch in batches:
        batch.weight_BT.zero_()
    with pytest.raises(ValueError, match="no token of this batch carries weight"):
        accumulate(model, batches, next_token.loss, mtp_lambda=0.0, balance_alpha=0.0)


@pytest.mark.parametrize("way", ["torch", "native"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_sampler_and_trainer_agree(
    model: Deepseek, tokenizer: Tokenizer, dtype: Any, bound: float, way: Literal["torch", "native"]
) -> None:
    """The mean |sampler - trainer logprob| of fresh rollouts, through the very path that RL takes."""
    if way == "native" and attention_native.why_not(Kernels(dtype=dtype).torch_dtype, torch.device("cpu")):
        pytest.skip("no native attention here")
    model.kernels = Kernels(dtype=dtype, attention="blocks" if way == "torch" else way, elements=way)
    asked = list(islice(problems(quickstart.EXAM, 1), 6))
    sampling = Sampling(n=4, temperature=1.0, max_new_tokens=24, seed=1, stop_ids=(tokenizer.end,))
    groups = answer_groups(Engine(model, tokenizer), tokenizer, asked, sampling)
    examples = [rollout_example(r) for group in groups for r in group]
    for example in examples:
        example.advantage = 1.0
    batches = packed_batches(examples, row_tokens=128, tokens_per_microbatch=10_000, pad_id=tokenizer.pad)
    _, metrics, _ = accumulate(model, batches, partial(policy.loss), mtp_lambda=0.0, balance_alpha=0.0)
    assert 0 <= metrics["ratio_error"] < bound
    assert metrics["clipped"] == 0


@pytest.mark.parametrize("mtp_lambda", [0.0, 0.3])
@pytest.mark.parametrize("attention", ["plain", "fused", "blocks", "native"])
def test_samples_that_share_their_prompt_give_the_same_gradient(
    model: Deepseek, tokenizer: Tokenizer, attention: str, mtp_lambda: float
) -> None:
    """As when each is read with a prompt of its own: losses, gradients of all parameters, metrics."""
    if attention == "native" and attention_native.why_not(torch.float32, torch.device("cpu")):
        pytest.skip("no native attention here")
    model.kernels = Kernels(attention=attention)  # type: ignore[arg-type]
    asked = list(islice(problems(quickstart.EXAM, 1), 6))
    sampling = Sampling(n=4, temperature=1.0, max_new_tokens=24, seed=1, stop_ids=(tokenizer.end,))
    groups = answer_groups(Engine(model, tokenizer), tokenizer, asked, sampling)
    examples = [rollout_example(r, own=2 if mtp_lambda else 1) for group in groups for r in group]
    for i, example in enumerate(examples):
        example.advantage = 1.0 - i % 3
    found, tokens = [], []
    for shared in (True, False):
        given = examples if shared else [dataclasses.replace(example, stem=0) for example in examples]
        batches = packed_batches(given, row_tokens=256, tokens_per_microbatch=600, pad_id=tokenizer.pad)
        model.zero_grad()
        loss, metrics, _ = accumulate(model, batches, policy.loss, mtp_lambda=mtp_lambda, balance_alpha=0.0)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        found[-1].append(torch.tensor([loss, *metrics.values()]))
        tokens.append(sum(batch.tokens for batch in batches))
    assert tokens[0] < 0.75 * tokens[1]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_every_example_comes_once_an_epoch() -> None:
    seen = [i for step in range(10) for i in examples_of_step(20, step, 6, seed=3)]
    assert sorted(seen[:20]) == sorted(seen[20:40]) == sorted(seen[40:]) == list(range(20))
    assert seen[:20] != seen[20:40]
    assert examples_of_step(20, 7, 6, seed=3) == seen[42:48]
    assert len(examples_of_step(2, 0, 7, seed=3)) == 7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_teacher_holds_what_its_products_read_and_says_the_same(
    dtype: Literal["float32", "bfloat16"], model: Deepseek, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model.kernels = Kernels(dtype=dtype)
    batch = _batches(tokenizer, 10_000)[0]

    def states(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT).hidden_BTD

    with torch.no_grad():  # where rounding norms or routers would show
        for parameter in model.parameters():
            parameter += 1e-3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1))
    before = states(model)
    checkpoint.save(model, tokenizer, tmp_path)
    frozen, _ = checkpoint.load(tmp_path, dtype="float32", frozen=lambda config: model.kernels)
    assert torch.equal(states(frozen), before) and torch.equal(frozen.unembed(before), model.unembed(before))
    assert frozen.head_weight.dtype == model.kernels.torch_dtype
    assert not any(p.requires_grad for p in frozen.parameters())
    kept = {name: p.dtype for name, p in frozen.named_parameters() if "norm" in name or "mlp.gate." in name}
    assert kept and set(kept.values()) == {torch.float32}
