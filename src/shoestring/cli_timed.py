"""The parts of a training step, timed as our own models run them: each forward and backward, at several sizes.

A part with norms and residuals around it is timed as a short stack, so that what the backward reads has left the
nearest caches, as in a real step. The laws between the sizes are `shoestring.cost.laws`. Sizes are in the order of
`laws.SIZES`.
"""

# ruff: noqa: E501 (tables of sizes)
from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.cost.laws import Sample
from shoestring.nn.attention import Pass
from shoestring.nn.decoder import Decoder
from shoestring.nn.gqa import GQA
from shoestring.nn.kernels import Kernels, wait
from shoestring.nn.linear import Linear, SwiGLU
from shoestring.nn.mla import MLA
from shoestring.nn.moe import MoE, Routing, balance_loss
from shoestring.nn.norm import RMSNorm
from shoestring.nn.rope import Rope

STACK = 4  # parts in a row
ROUNDS = 2
SHORT = 4e-3  # seconds a repeat should take at least
CYCLE = 48e6  # bytes of inputs taken in turn, more than caches hold

GRID: dict[str, tuple[tuple[int, ...], ...]] = {
    "linear": (
        (2048, 96, 96), (2048, 64, 256), (2048, 256, 64), (2048, 192, 192), (2048, 384, 128), (2048, 256, 256),
        (2048, 768, 256), (2048, 256, 768), (2048, 1536, 256), (2048, 2048, 512), (2048, 320, 1024), (512, 64, 64),
        (512, 256, 256), (512, 1024, 256), (128, 128, 128), (128, 512, 256), (64, 256, 128), (256, 64, 192), (4096, 256, 256),
        (4096, 1024, 320), (4096, 512, 512), (1024, 4096, 256), (1024, 1024, 1024), (1024, 8192, 128), (1024, 16384, 64),
        (2048, 320, 160), (1024, 1280, 384), (1024, 640, 448), (2048, 672, 224), (4096, 192, 48), (4096, 64, 128),
        (1024, 96, 64), (1024, 32, 96), (256, 96, 96), (64, 64, 64), (64, 384, 96),
    ),
    "attention": tuple((2048, t, 8, k, v) for t in (32, 64, 128, 192, 256, 512, 1024) for k, v in ((24, 16), (32, 32), (96, 64))),
    "gqa": ((2048, 128, 128, 4, 4, 32), (2048, 256, 256, 8, 8, 32), (2048, 64, 192, 6, 6, 32), (1024, 256, 512, 8, 8, 64),
            (4096, 128, 96, 3, 3, 32), (2048, 512, 256, 8, 2, 32), (512, 128, 384, 6, 6, 64), (256, 32, 64, 4, 4, 16),
            (64, 64, 128, 4, 4, 32), (1024, 32, 48, 2, 2, 24), (8192, 64, 64, 4, 2, 16)),
    "mla": ((2048, 128, 128, 4, 0, 32, 32, 16, 32), (2048, 256, 256, 8, 0, 64, 32, 16, 32), (2048, 64, 96, 4, 0, 24, 24, 12, 24),
            (1024, 256, 512, 8, 0, 128, 64, 32, 64), (2048, 256, 256, 8, 96, 64, 32, 16, 32), (4096, 128, 192, 6, 64, 48, 32, 16, 32),
            (256, 32, 80, 2, 0, 20, 40, 20, 40), (512, 128, 64, 4, 0, 16, 16, 8, 16), (64, 64, 192, 4, 48, 32, 32, 16, 32),
            (4096, 64, 48, 2, 0, 12, 24, 12, 24)),
    "ffn": ((2048, 128, 384), (2048, 256, 768), (2048, 192, 512), (1024, 512, 1408), (4096, 256, 512), (2048, 96, 256), (512, 384, 1024),
            (256, 64, 160), (64, 128, 384), (1024, 64, 128), (8192, 48, 160)),
    "moe": ((2048, 128, 64, 8, 2, 1), (1024, 256, 128, 16, 2, 1), (2048, 96, 64, 8, 2, 1), (2048, 256, 96, 32, 4, 1),
            (4096, 192, 128, 16, 2, 1), (2048, 320, 256, 8, 1, 0), (512, 128, 128, 8, 2, 2),
            (256, 64, 32, 4, 2, 1), (512, 80, 48, 16, 2, 0), (64, 128, 96, 8, 1, 1), (4096, 64, 32, 8, 2, 1)),
    "head": ((2048, 128, 512), (2048, 256, 1024), (2048, 192, 256), (1024, 256, 4096), (512, 128, 16384), (2048, 64, 2048),
             (4096, 320, 512), (1024, 64, 32768), (256, 64, 320), (64, 128, 1024), (1024, 48, 256), (8192, 80, 256)),
    "update": ((40, 400_000), (20, 4_000_000), (100, 1_000_000), (60, 12_000_000), (12, 30_000), (60, 150_000), (150, 600_000)),
}  # fmt: skip


def timed(work: Callable[[], Any], repeats: int = 7, device: torch.device | None = None, warm_up: int = 2) -> float:
    """The least seconds of several repeats after warm-ups: what disturbs only ever adds.

    Short work is done several times in a repeat. One CPU thread is timed by its CPU time.
    """
    device = device or torch.device("cpu")
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    taken, times = [], 1
    for i in range(repeats + warm_up):
        wait(device)
        start = clock()
        for _ in range(times):
            work()
        wait(device)
        taken.append((clock() - start) / times)
        if i + 1 == warm_up:
            times = max(1, int(SHORT / max(taken[-1], 1e-6)))
    return min(taken[warm_up:])


class Bench:
    """Where and how parts are timed: a device, kernels, and a generator of its own."""

    def __init__(self, device: str, kernels: Kernels, repeats: int = 4):
        self.device, self.kernels, self.repeats = torch.device(device), kernels, repeats
        self.generator = torch.Generator(device).manual_seed(0)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(self.kernels.torch_dtype)

    def inputs(self, *shape: int) -> list[Tensor]:
        """As many of a shape as fill `CYCLE`, at most 16."""
        each = 4.0
        for side in shape:
            each *= side
        return [self.random(*shape) for _ in range(int(min(16, max(1, CYCLE // each))))]

    def fill(self, module: nn.Module) -> nn.Module:
        """Weights of a fresh model."""
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0.0, 0.02, generator=self.generator)
        return module

    def both(self, run: Callable[[Tensor], Tensor], modules: list[Any], xs: list[Tensor]) -> float:
        """Seconds of run(x) and its backward, gradients of inputs and weights made anew."""
        turn = 0
        dys: list[Tensor] = []

        def once() -> None:
            nonlocal turn
            x = xs[turn % len(xs)].detach().requires_grad_()
            y = run(x)
            if not dys:
                dys.append(torch.ones_like(y).mul_(1e-3))
            y.backward(dys[0])
            for module in modules:
                module.zero_grad(set_to_none=True)
            turn += 1

        return timed(once, self.repeats, self.device)

    def pass_(self, rotated: int, length: int) -> Pass:
        cis = Rope(rotated, 10000.0).table(torch.arange(length, device=self.device))
        return Pass(cis, None, self.kernels)

    # ---- one function a part
    def linear(self, tokens: int, out: int, inner: int) -> float:
        layer = self.fill(Linear(inner, out, device=self.device))
        return self.both(layer, [layer], self.inputs(tokens, inner))

    def attention(self, tokens: int, length: int, heads: int, query: int, value: int) -> float:
        step = self.pass_(2, length)
        rows = max(1, tokens // length)
        wide = 2 * query + value

        def run(x: Tensor) -> Tensor:
            q, k, v = (y.transpose(1, 2) for y in x.split([query, query, value], dim=-1))
            return step.attend(q, k, v, query**-0.5)

        x = [y.unflatten(-1, (heads, wide)) for y in self.inputs(rows, length, heads * wide)]
        return self.both(run, [], x) * tokens / (rows * length)

    def _stack(self, make: Callable[[], Any], around: Callable[[Any, Tensor], Tensor], tokens: int, length: int,
               width: int) -> float:  # fmt: skip
        """Seconds of one x + part(norm(x)), out of a stack of them."""
        rows = max(1, tokens // length)
        parts = [(RMSNorm(width, device=self.device), self.fill(make())) for _ in range(STACK)]
        native = self.kernels.native

        def run(x: Tensor) -> Tensor:
            for norm, part in parts:
                x = x + around(part, norm(x, native))
            return x

        seconds = self.both(run, [m for pair in parts for m in pair], self.inputs(rows, length, width)[:2])
        return seconds / STACK * tokens / (rows * length)

    def gqa(self, tokens: int, length: int, width: int, heads: int, kv_heads: int, head: int) -> float:
        step = self.pass_(head, length)
        return self._stack(partial(GQA, width, heads, kv_heads, head, device=self.device),
                           lambda part, h: part(h, step, 0), tokens, length, width)  # fmt: skip

    def mla(self, tokens: int, length: int, width: int, heads: int, q_lora: int, kv_lora: int, nope: int, rope: int,
            value: int) -> float:  # fmt: skip
        step = self.pass_(rope, length)
        make = partial(MLA, width, heads, q_lora=q_lora or None, kv_lora=kv_lora, nope=nope, rope=rope, v=value,
                       scale=(nope + rope) ** -0.5, device=self.device)  # fmt: skip
        return self._stack(make, lambda part, h: part(h, step, 0), tokens, length, width)

    def ffn(self, tokens: int, width: int, hidden: int) -> float:
        return self._stack(partial(SwiGLU, width, hidden, device=self.device), lambda part, h: part(h, self.kernels.native), tokens,
                           min(tokens, 256), width)  # fmt: skip

    def moe(self, tokens: int, width: int, hidden: int, experts: int, active: int, shared: int) -> float:
        """With the balance loss that training adds."""
        routing = Routing(experts, active)

        def run(part: MoE, h: Tensor) -> Tensor:
            y, score, chosen = part(h, self.kernels)
            return y + 1e-4 * balance_loss(score, chosen, None).to(y.dtype)

        make = partial(MoE, width, hidden, shared, routing, device=self.device)
        return self._stack(make, run, tokens, min(tokens, 256), width)

    def head(self, tokens: int, width: int, vocab: int) -> float:
        """A model without layers: embedding, norm, loss."""
        from shoestring.data.batch import stream_batch
        from shoestring.losses import next_token
        from shoestring.train.step import accumulate

        model = Decoder([], vocab=vocab, d_model=width, eps=1e-6, tied=False, rope=Rope(2, 10000.0), kernels=self.kernels,
                        cache_width=2, device=self.device)  # fmt: skip
        model.config = SimpleNamespace(num_nextn_predict_layers=0)
        self.fill(model)
        length = min(tokens, 256)
        ids = torch.randint(0, vocab, (tokens // length, length), generator=torch.Generator().manual_seed(0))
        batch = stream_batch(ids.numpy())

        def once() -> None:
            accumulate(model, [batch], next_token.loss, mtp_lambda=0.0, balance_alpha=0.0)
            model.zero_grad(set_to_none=True)

        return timed(once, self.repeats, self.device)

    def update(self, tensors: int, numbers: int) -> float:
        """Clipping and AdamW."""
        from shoestring.optim.make import optimizers

        side = max(1, numbers // tensors)
        holder = nn.ParameterList([nn.Parameter(self.random(side, 1).float()) for _ in range(tensors)])
        gradients = [torch.full_like(p, 1e-3) for p in holder]
        chosen = optimizers(holder, "adamw", lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

        def once() -> None:
            for p, g in zip(holder, gradients, strict=True):
                p.grad = g
            float(nn.utils.clip_grad_norm_(list(holder), 1.0))
            for optimizer in chosen:
                optimizer.step()
                optimizer.zero_grad()

        return timed(once, self.repeats, self.device)


def samples(
    bench: Bench, grid: dict[str, tuple[tuple[int, ...], ...]] | None = None, rounds: int = ROUNDS
) -> tuple[Sample, ...]:
    """Every part of the grid at every size: the best of the rounds, in turn, so that a slow moment spoils no size."""
    cases = [(part, sizes) for part, rows in (GRID if grid is None else grid).items() for sizes in rows]
    best = [float("inf")] * len(cases)
    for _ in range(rounds):
        for i, (part, sizes) in enumerate(cases):
            best[i] = min(best[i], getattr(bench, part)(*sizes))
    return tuple((part, tuple(map(float, sizes)), t) for (part, sizes), t in zip(cases, best, strict=True))
