"""The generator's contract over `transformers`' own `generate`, for models of families that the engine does not know.

Their forward pass and their caches, our draws: a logits processor samples each row as the engine does (sampler.py, with
random numbers that are a function of seed, prompt, sample and position) and leaves one token for `generate` to take. So
seeds repeat, logprobs are those of the distribution that was drawn from, and at the same weights the tokens are the
engine's, up to the rounding of logits. Prompts of a batch are padded on the left and masked; where that or company
changes what a row says (RWKV in transformers 5: it is tried), every row goes alone.
Left out: events, stop strings, grammars, penalties, thinking budgets, lists of likeliest tokens (a request for one of
them is refused); no prefix is shared between prompts or samples.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from shoestring.core.errors import UserError
from shoestring.core.nouns import Completion, FinishReason, Sampling
from shoestring.infer.check import check_ids, check_sampling
from shoestring.infer.sampler import sample
from shoestring.infer.score import score
from shoestring.infer.uniforms import draw_key, uniforms
from shoestring.text.tokenizer import Tokenizer

ROWS, PLACES = 64, 1 << 16  # of one call of generate, at most: rows, and rows x (prompt + new tokens)
FOLLOWED = ("n", "temperature", "top_k", "top_p", "min_p", "max_new_tokens", "min_new_tokens", "stop_ids", "seed",
            "ignore_eos", "logit_bias")  # fmt: skip


class BorrowedGenerator:
    """`core.contracts.Generator` over a model of models/any.py. Raises UserError for one that cannot generate."""

    def __init__(self, model: Any, tokenizer: Tokenizer | None = None) -> None:
        if tokenizer is not None:
            tokenizer.check_vocab(model.config.vocab_size)
        if not getattr(model.hf, "can_generate", lambda: False)():
            raise UserError(f"{type(model.hf).__name__} of transformers cannot generate; give a causal language model.")
        self.model, self.tokenizer = model, tokenizer
        self.together = _together(model)

    def update_weights(self, model: Any) -> None:
        """Generate and score with `model` from now on."""
        if self.tokenizer is not None:
            self.tokenizer.check_vocab(model.config.vocab_size)
        self.model = model

    def let_go(self) -> None:
        """Nothing: it samples from the model itself."""

    def score(self, token_ids: Sequence[Sequence[int]], *, temperature: float = 1.0) -> list[list[float]]:
        """As the engine does: the training forward, packed."""
        return score(self.model, token_ids, temperature=temperature)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt, in order; the same seed gives the same.

        Raises UserError, before anything is computed, for an empty or over-long prompt, ids outside the vocabulary,
        and options that are not followed here; FloatingPointError for NaN logits.
        """
        self._check(prompts, sampling)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        rows = [(place, number) for place in range(len(prompts)) for number in range(sampling.n)]
        rows.sort(key=lambda row: len(prompts[row[0]]))  # alike in length, so that little is padded
        found: dict[tuple[int, int], Completion] = {}
        while rows:
            longest = len(prompts[rows[min(ROWS, len(rows)) - 1][0]]) + sampling.max_new_tokens
            count = max(1, min(ROWS, PLACES // longest)) if self.together else 1
            some, rows = rows[:count], rows[count:]
            draws = _Draws([draw_key(seed, *row) for row in some], sampling, self._stop_ids(sampling))
            self._run([prompts[place] for place, _ in some], draws, sampling)
            found.update(zip(some, self._completions(draws), strict=True))
        return [[found[place, number] for number in range(sampling.n)] for place in range(len(prompts))]

    def _check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        usual = Sampling()
        for name in (field.name for field in fields(Sampling)):
            if name not in FOLLOWED and getattr(sampling, name) != getattr(usual, name):
                raise UserError(
                    f"sampling.{name} is not followed for models that run through transformers; leave it out."
                )
        for index, prompt in enumerate(prompts):
            check_ids(self.model.config, prompt, f"prompt {index}", sampling.max_new_tokens)
        has = self.tokenizer is not None
        check_sampling(sampling, self.model.config, self._stop_ids(sampling), tokenizer=has, routes=False)

    def _stop_ids(self, sampling: Sampling) -> tuple[int, ...]:
        end = None if self.tokenizer is None or sampling.ignore_eos else self.tokenizer.end_id
        return sampling.stop_ids or (() if end is None else (end,))

    @torch.no_grad()
    def _run(self, prompts: Sequence[Sequence[int]], draws: _Draws, sampling: Sampling) -> None:
        """One call of `generate`; what it draws is in `draws`."""
        from transformers import GenerationConfig, LogitsProcessorList

        hf, device = self.model.hf, self.model.embedding.device
        width = max(map(len, prompts))
        pad = 0 if self.tokenizer is None else self.tokenizer.pad
        tokens_BT = torch.full((len(prompts), width), pad, dtype=torch.int64)
        mask_BT = torch.zeros_like(tokens_BT)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, width - len(prompt) :] = torch.tensor(prompt)
            mask_BT[row, width - len(prompt) :] = 1
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, do_sample=False, use_cache=True, pad_token_id=pad,
            bos_token_id=None, eos_token_id=list(draws.stop_ids) or None,
        )  # fmt: skip
        theirs, training = hf.generation_config, hf.training
        hf.generation_config = GenerationConfig()  # a checkpoint's own temperature or penalties must not join in
        hf.eval()
        dtype = self.model.kernels.torch_dtype
        try:
            # cached: adapters are summed into their weights once, not for every token
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), parametrize.cached():
                hf.generate(
                    tokens_BT.to(device), attention_mask=mask_BT.to(device), generation_config=config,
                    logits_processor=LogitsProcessorList([draws]),
                )  # fmt: skip
        finally:
            hf.generation_config = theirs
            hf.train(training)

    def _completions(self, draws: _Draws) -> list[Completion]:
        texts = [""] * len(draws.tokens)
        if self.tokenizer is not None:
            spoken = [ids[:-1] if ended else ids for ids, ended in zip(draws.tokens, draws.ended, strict=True)]
            texts = self.tokenizer.decode_batch(spoken)
        reasons: list[FinishReason] = ["stop" if ended else "length" for ended in draws.ended]
        told = zip(texts, draws.tokens, draws.logprobs, reasons, strict=True)
        return [Completion(text, ids, logprobs, reason) for text, ids, logprobs, reason in told]


@torch.no_grad()
def _together(model: Any) -> bool:
    """Whether a row, behind masked padding and beside another row, says what it says alone."""
    from transformers import GenerationConfig

    ids = torch.arange(12, device=model.embedding.device) % model.config.vocab_size
    alone_BT, both_BT = ids[None, 4:], torch.stack([ids, ids])
    mask_BT = torch.ones_like(both_BT)
    mask_BT[1, :4] = 0
    config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0, output_logits=True,
                              return_dict_in_generate=True)  # fmt: skip
    asked = ((alone_BT, torch.ones_like(alone_BT)), (both_BT, mask_BT))
    try:
        alone, beside = (
            torch.stack(model.hf.generate(ids_BT, attention_mask=mask, generation_config=config).logits)[:, -1].float()
            for ids_BT, mask in asked
        )
    except RuntimeError:  # shapes that fit one row only
        return False
    near = 1e-4 if model.embedding.dtype == torch.float32 else 2e-2
    return float((alone - beside).abs().max()) <= near * float(alone.abs().max())


class _Draws:
    """A logits processor that draws each row's next token itself and leaves no other."""

    def __init__(self, keys: list[int], sampling: Sampling, stop_ids: tuple[int, ...]) -> None:
        self.keys, self.sampling, self.stop_ids = keys, sampling, stop_ids
        self.tokens: list[list[int]] = [[] for _ in keys]
        self.logprobs: list[list[float]] = [[] for _ in keys]
        self.ended = [False] * len(keys)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] -> [B, V]: 0 for the drawn token, -inf for the rest; rows that have ended are padded by `generate`."""
        logits_BV = scores.float()
        bias = self.sampling.logit_bias or {}
        if bias:
            ids = torch.tensor(list(bias), device=scores.device)
            logits_BV = logits_BV.index_add(1, ids, torch.tensor([list(bias.values())], device=scores.device).expand(
                len(scores), -1))  # fmt: skip
        alive = [row for row, ended in enumerate(self.ended) if not ended]
        logits_RV = logits_BV[alive]
        position = len(self.tokens[alive[0]])  # all that go on are equally far
        if position < self.sampling.min_new_tokens:
            logits_RV[:, list(self.stop_ids)] = float("-inf")
        u_R = uniforms([self.keys[row] for row in alive], [position] * len(alive))
        drawn = sample(logits_RV, torch.from_numpy(u_R).to(scores.device), [self.sampling] * len(alive))
        left_BV = torch.full_like(scores, float("-inf"))
        left_BV[:, 0] = 0.0
        for row, token, logprob in zip(alive, drawn.tokens, drawn.logprobs, strict=True):
            self.tokens[row].append(token)
            self.logprobs[row].append(logprob)
            self.ended[row] = token in self.stop_ids
            left_BV[row, 0] = float("-inf")
            left_BV[row, token] = 0.0
        return left_BV
