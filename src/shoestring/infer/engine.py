"""The engine: token ids in, completions with logprobs out; and logprobs of given ids.

It runs the very module that is trained: sampler and trainer share weights, kernels and the fp32 log-softmax, so their
logprobs agree to rounding. Generation goes in waves of rows whose cache fits `max_batch_tokens` positions
(infer/decode.py); rows are ordered by prompt length, so a wave pads little. Left out here, for the serving package:
continuous batching, prefix reuse across calls, speculation, quantised caches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from shoestring.core.errors import UserError
from shoestring.core.nouns import Completion, Event, Sampling
from shoestring.infer.adjust import adjust
from shoestring.infer.check import check_ids, check_sampling
from shoestring.infer.decode import Decoded, decode, pad
from shoestring.infer.detokenise import StopStrings, TextStream
from shoestring.infer.sampler import sample
from shoestring.infer.sequence import Request, Sequence, uniform
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
        self._waiting: list[Request] = []
        self._running: list[Sequence] = []
        self._events: list[Event] = []
        self._names = itertools.count()

    # ---- one request at a time
    def add(self, prompt_ids: Seq[int], sampling: Sampling, *, request_id: str | None = None, salt: str = "") -> str:
        """Queue a request; its events come from `step`. Returns its id (made up when not given).

        `salt`: prompts share cached prefixes only with requests of the same salt. Raises UserError for what can never
        be answered: an empty or over-long prompt, ids outside the vocabulary, options the model cannot follow, an id
        that is in use.
        """
        name = f"request-{next(self._names)}" if request_id is None else request_id
        if any(request.id == name for request in self._requests()):
            raise UserError(f'request id "{name}" is in use; give each request its own.')
        check_ids(self.model.config, prompt_ids, "the prompt", sampling.max_new_tokens)
        check_sampling(
            sampling, self.model.config, has_tokenizer=self.tokenizer is not None, routes=self.model.n_experts > 0
        )
        stop_ids = frozenset(self._stop_ids(sampling))
        request = Request(name, list(prompt_ids), sampling, stop_ids, salt)
        request.samples = [self._sequence(request, sample) for sample in range(sampling.n)]
        self._waiting.append(request)
        return name

    def cancel(self, request_id: str) -> None:
        """End every sample of a request; the next `step` returns their last events. Unknown or finished: nothing."""
        for request in self._requests():
            if request.id == request_id:
                self._events += [s.cancel() for s in request.samples if s.finish_reason is None]
                self._waiting = [r for r in self._waiting if r is not request]
                self._running = [s for s in self._running if s.request is not request]
                return

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Schedule, run, sample once; one event for each sample that went on. [] when there is nothing to do."""
        events, self._events = self._events, []
        self._running += [sample for request in self._waiting for sample in request.samples]
        self._waiting = []
        for sequence in self._running:
            logits_1V = adjust(self._logits(sequence), [sequence])
            u = uniform(sequence.key, sequence.produced)
            drawn = sample(logits_1V, torch.tensor([u], dtype=torch.float64, device=self.device), [sequence.sampling])
            events.append(sequence.append(int(drawn.token_R), float(drawn.logprob_R), drawn.top.get(0)))
        self._running = [sequence for sequence in self._running if sequence.finish_reason is None]
        return events

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting or self._running or self._events)

    def stats(self) -> dict[str, float]:
        """What is going on: running and waiting sequences."""
        return {"running": len(self._running), "waiting": sum(len(r.samples) for r in self._waiting)}

    def _requests(self) -> list[Request]:
        return [*self._waiting, *{id(s.request): s.request for s in self._running}.values()]

    def _sequence(self, request: Request, sample: int) -> Sequence:
        sequence = Sequence(request, sample)
        if self.tokenizer is not None:
            sequence.stream = TextStream(self.tokenizer)
            sequence.stops = StopStrings(request.sampling.stop) if request.sampling.stop else None
        return sequence

    def _logits(self, sequence: Sequence) -> torch.Tensor:
        """fp32 [1, V] after the sequence's last token; what was not read before is read now."""
        if sequence.state is None:
            sequence.state = self.model.new_cache(1, len(sequence.ids) + sequence.sampling.max_new_tokens)
        fresh = torch.tensor([sequence.ids[sequence.state.used :]], device=self.device)
        output = self.model(fresh, cache=sequence.state, logits=False)
        logits: torch.Tensor = self.model.unembed(output.hidden_BTD[:, -1])
        return logits

    # ---- many at once
    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def update_weights(self, model: Any) -> None:
        """Generate and score with `model` from now on. Nothing is kept between calls, so nothing goes stale."""
        if self.tokenizer is not None:
            self.tokenizer.check_vocab(model.config.vocab_size)
        self.model = model

    @torch.inference_mode()
    def generate(self, prompts: Seq[Seq[int]], sampling: Sampling | Seq[Sampling]) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt, in order; logprobs are fp32 at the sampling temperature.

        A completion ends at a stop id (`sampling.stop_ids`, or the tokenizer's end token when none are given), which
        is its last id, or after `max_new_tokens`. `routed_experts` covers every token that was fed: the prompt, then
        the completion without its last token. Raises UserError for an empty prompt, ids outside the vocabulary, or
        prompt + new tokens beyond the model's positions, and FloatingPointError for NaN logits.
        """
        if not isinstance(sampling, Sampling):
            return self._one_by_one(prompts, sampling)
        self._check(prompts, "prompt", sampling.max_new_tokens)
        check_sampling(
            sampling, self.model.config, has_tokenizer=self.tokenizer is not None, routes=self.model.n_experts > 0
        )
        old = ("n", "temperature", "top_k", "top_p", "max_new_tokens", "stop_ids", "seed", "routed_experts", "min_p")
        if replace(Sampling(), **{name: getattr(sampling, name) for name in old}) != sampling:
            return self._one_by_one(prompts, [sampling] * len(prompts))
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
            for (index, number_of), completion in zip(wave, self._completions(decoded, lengths), strict=True):
                done[index][number_of] = completion
        return [[completion for completion in group if completion is not None] for group in done]

    def _one_by_one(self, prompts: Seq[Seq[int]], samplings: Seq[Sampling]) -> list[list[Completion]]:
        if len(samplings) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(samplings)} samplings; give one for all, or one each.")
        names = [self.add(prompt, each) for prompt, each in zip(prompts, samplings, strict=True)]
        done: dict[str, dict[int, Completion]] = {name: {} for name in names}
        others: list[Event] = []
        while any(len(done[name]) < each.n for name, each in zip(names, samplings, strict=True)):
            for event in self.step():
                if event.request_id not in done:
                    others.append(event)
                elif event.completion is not None:
                    done[event.request_id][event.sample] = event.completion
        self._events += others
        return [[done[name][sample] for sample in range(each.n)] for name, each in zip(names, samplings, strict=True)]

    @torch.inference_mode()
    def score(self, token_ids: Seq[Seq[int]], *, temperature: float = 1.0) -> list[list[float]]:
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

    def _waves(self, prompts: Seq[Seq[int]], sampling: Sampling) -> Iterator[list[tuple[int, int]]]:
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
        nothing = self.tokenizer is None or self.tokenizer.end_id is None or sampling.ignore_eos
        if sampling.stop_ids or nothing:
            return sampling.stop_ids
        assert self.tokenizer is not None and self.tokenizer.end_id is not None
        return (self.tokenizer.end_id,)

    def _check(self, sequences: Seq[Seq[int]], what: str, new_tokens: int) -> None:
        for index, ids in enumerate(sequences):
            check_ids(self.model.config, ids, f"{what} {index}", new_tokens)


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
