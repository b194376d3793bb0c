"""The engine: token ids in, completions with logprobs out; and logprobs of given ids.

It runs the very module that is trained: sampler and trainer share weights, kernels and the fp32 log-softmax, so their
logprobs agree to rounding. Generation goes in waves of rows whose cache fits `max_batch_tokens` positions
(infer/decode.py); rows are ordered by prompt length, so a wave pads little. Left out here, for the serving package:
continuous batching, prefix reuse across calls, speculation, quantised caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from shoestring.core.errors import UserError
from shoestring.core.nouns import Completion, Sampling
from shoestring.infer.decode import Decoded, decode, pad
from shoestring.nn.head import token_logprobs

if TYPE_CHECKING:
    from shoestring.text.tokenizer import Tokenizer

SCORE_TOKENS = 1 << 14  # tokens in one forward pass of `score`


class Engine:
    """`core.contracts.Generator` over a model of this package.

    model: has `config` (vocab_size, max_position_embeddings), `new_cache`, `unembed`, and a cached forward.
    tokenizer: for `Completion.text` and the default stop id; without one, text is "" and only `stop_ids` stop.
    max_batch_tokens: cache positions alive at once (rows x (prompt + new tokens)).
    """

    def __init__(self, model: Any, tokenizer: Tokenizer | None = None, *, max_batch_tokens: int = 1 << 17):
        if max_batch_tokens < 1:
            raise UserError(f"max_batch_tokens is {max_batch_tokens}; it must be at least 1.")
        if tokenizer is not None:
            tokenizer.check_vocab(model.config.vocab_size)
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch_tokens = max_batch_tokens

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def update_weights(self, model: Any) -> None:
        """Generate and score with `model` from now on. Nothing is kept between calls, so nothing goes stale."""
        if self.tokenizer is not None:
            self.tokenizer.check_vocab(model.config.vocab_size)
        self.model = model

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt, in order; logprobs are fp32 at the sampling temperature.

        A completion ends at a stop id (`sampling.stop_ids`, or the tokenizer's end token when none are given), which
        is its last id, or after `max_new_tokens`. `routed_experts` covers every token that was fed: the prompt, then
        the completion without its last token. Raises UserError for an empty prompt, ids outside the vocabulary, or
        prompt + new tokens beyond the model's positions, and FloatingPointError for NaN logits.
        """
        self._check(prompts, "prompt", sampling.max_new_tokens)
        stop_ids = self._stop_ids(sampling)
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        done: list[list[Completion | None]] = [[None] * sampling.n for _ in prompts]
        for wave in self._waves(prompts, sampling):
            distinct = list(dict.fromkeys(tuple(prompts[index]) for index, _ in wave))
            number = {prompt: row for row, prompt in enumerate(distinct)}
            prompt_of_row = [number[tuple(prompts[index])] for index, _ in wave]
            decoded = decode(self.model, distinct, prompt_of_row, sampling, stop_ids, generator, self.device)
            lengths = [len(prompts[index]) for index, _ in wave]
            for (index, sample), completion in zip(wave, self._completions(decoded, lengths), strict=True):
                done[index][sample] = completion
        return [[completion for completion in group if completion is not None] for group in done]

    @torch.inference_mode()
    def score(self, token_ids: Sequence[Sequence[int]], *, temperature: float = 1.0) -> list[list[float]]:
        """For each sequence of T ids its T-1 logprobs, at `temperature`. Logits exist only a chunk of rows at a time.

        Raises UserError as `generate` does, and for a temperature that is not positive.
        """
        if not 0.0 < temperature < float("inf"):
            raise UserError(f"the scoring temperature is {temperature}; it must be a positive number.")
        self._check(token_ids, "sequence", 0)
        logprobs: list[list[float]] = [[] for _ in token_ids]
        order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]))
        for batch in _batches(order, [len(ids) for ids in token_ids]):
            tokens_BT, length_B = pad([token_ids[index] for index in batch], self.device)
            if tokens_BT.shape[1] == 1:
                continue
            hidden_BTD = self.model(tokens_BT, logits=False).hidden_BTD[:, :-1]
            real_BT = torch.arange(1, tokens_BT.shape[1], device=self.device) < length_B[:, None]
            logp_N, _ = token_logprobs(
                hidden_BTD[real_BT], self.model.head_weight, tokens_BT[:, 1:][real_BT], temperature=temperature
            )
            for index, row in zip(batch, logp_N.split((length_B - 1).tolist()), strict=True):
                logprobs[index] = row.tolist()
        return logprobs

    def _waves(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[tuple[int, int]]]:
        """(prompt, sample) pairs by descending prompt length, cut where the cache would grow too large."""
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        rows = [(index, sample) for index in order for sample in range(sampling.n)]
        while rows:
            capacity = len(prompts[rows[0][0]]) + sampling.max_new_tokens
            count = max(1, self.max_batch_tokens // capacity)
            yield rows[:count]
            rows = rows[count:]

    def _completions(self, decoded: Decoded, prompt_lengths: list[int]) -> list[Completion]:
        tokens, logprobs = decoded.tokens_RT.tolist(), decoded.logprobs_RT.tolist()
        lengths, stopped = decoded.length_R.tolist(), decoded.stopped_R.tolist()
        ids = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        spoken = [row[:-1] if stop else row for row, stop in zip(ids, stopped, strict=True)]
        texts = [""] * len(ids) if self.tokenizer is None else self.tokenizer.decode_batch(spoken)
        routed: list[Any] = [None] * len(ids)
        if decoded.routed_RSLA is not None:
            fed = [prompt + length - 1 for prompt, length in zip(prompt_lengths, lengths, strict=True)]
            routed = [row[:count].tolist() for row, count in zip(decoded.routed_RSLA, fed, strict=True)]
        return [
            Completion(
                text=texts[row],
                token_ids=ids[row],
                logprobs=logprobs[row][: lengths[row]],
                finish_reason="stop" if stopped[row] else "length",
                routed_experts=routed[row],
            )
            for row in range(len(ids))
        ]

    def _stop_ids(self, sampling: Sampling) -> tuple[int, ...]:
        if sampling.stop_ids or self.tokenizer is None or self.tokenizer.end_id is None:
            return sampling.stop_ids
        return (self.tokenizer.end_id,)

    def _check(self, sequences: Sequence[Sequence[int]], what: str, new_tokens: int) -> None:
        vocab, positions = self.model.config.vocab_size, self.model.config.max_position_embeddings
        for index, ids in enumerate(sequences):
            if len(ids) == 0:
                raise UserError(f"{what} {index} is empty; it needs at least one token.")
            if min(ids) < 0 or max(ids) >= vocab:
                raise UserError(
                    f"{what} {index} holds a token id outside the model's vocabulary (0 to {vocab - 1}); "
                    "encode it with the model's own tokenizer."
                )
            if len(ids) + new_tokens > positions:
                more = f" and asks for {new_tokens} new ones" if new_tokens else ""
                raise UserError(
                    f"{what} {index} has {len(ids)} tokens{more}, but the model has {positions} positions; shorten it."
                )


def _batches(order: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Consecutive runs of `order` (ascending lengths) whose padded size stays within SCORE_TOKENS."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[index] > SCORE_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
