"""The engine: token ids in, completions with logprobs out; one at a time as events, or many at once.

`step` is schedule -> run -> sample (the words of nano-vllm): the scheduler says which tokens are computed, the runner
computes them over the paged cache, the sampler draws the next tokens. `generate` is `add` for every prompt, steps
until they are done, and the completions in order. The weights are prepared once (infer/layers.py) and again after
`update_weights`; logprobs agree with the training module's to rounding.

Not for several threads: a server calls `add`, `cancel` and `step` from one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch

from shoestring.core.errors import UserError
from shoestring.core.garbage import seldom_searched
from shoestring.core.nouns import Completion, Event, Sampling
from shoestring.infer.adjust import adjust
from shoestring.infer.blocks import BlockManager
from shoestring.infer.intake import Intake
from shoestring.infer.native import why_not
from shoestring.infer.prompts import read_prompt
from shoestring.infer.runner import ModelRunner, Ran
from shoestring.infer.sampler import sample
from shoestring.infer.scheduler import Scheduler, Work
from shoestring.infer.score import Scored, score
from shoestring.infer.sequence import Request, Sequence
from shoestring.infer.speculative import Choice, Drafter, check_drafts, make_drafts
from shoestring.infer.uniforms import uniforms
from shoestring.nn.room import Room

if TYPE_CHECKING:
    from shoestring.text.tokenizer import Tokenizer

# fp32: small blocks waste little; bf16: each block is a product of its own, which costs microseconds (LOG.md)
BLOCK_SIZE = {"float32": 32, "bfloat16": 64}
TILE = 16  # rows of every product when results must not depend on the batch


class Engine:
    """`core.contracts.Generator` over a model of this package, and a queue of requests with events.

    tokenizer: for text, stop strings and the default stop id; without one, text is "" and only `stop_ids` stop.
    max_batch_tokens: tokens computed in one step; prompts are read in chunks of what decoding leaves of it.
    block_size: positions in a block of the cache (None: by dtype, as measured). cache_tokens: positions in all.
    max_sequences: running at once.
    deterministic: a request's tokens and logprobs do not depend, to the bit, on what else is answered; slower.
    prefix_cache: prompts share what they have in common with earlier ones (of the same salt).
    speculative: the model's MTP module drafts a token ahead; "auto" measures, at each size of the batch, whether that
    pays. The tokens are the same up to the rounding of logits; with "auto" that rounding depends on the clock.
    native: decoding steps in C (infer/native.py); "auto": where a compiler is there to build them.
    quantise: "int8" rounds the layers' weights to 8 bits, a scale for each row (not the head, the router, the norms):
    faster at a few rows, other numbers (docs/engine.md). Needs native steps; `score` keeps the model's own weights.
    room: memory of a trainer's step, in which the prepared head lies until `let_go`, when the trainer has it again.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer | None = None, *, max_batch_tokens: int = 2048,
        block_size: int | None = None, cache_tokens: int = 1 << 17, max_sequences: int = 512,
        deterministic: bool = False, prefix_cache: bool = True, speculative: bool | Literal["auto"] = False,
        native: bool | Literal["auto"] = "auto", quantise: Literal["int8"] | None = None, room: Room | None = None,
    ):  # fmt: skip
        if hasattr(model, "hf"):  # a model of transformers says what samples it
            model.new_cache(1, 1)
        block_size = BLOCK_SIZE[model.kernels.dtype] if block_size is None else block_size
        options = {
            "max_batch_tokens": max_batch_tokens, "block_size": block_size, "cache_tokens": cache_tokens,
            "max_sequences": max_sequences,
        }  # fmt: skip
        for name, value in options.items():
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        if cache_tokens < block_size:
            raise UserError(f"cache_tokens {cache_tokens} is less than block_size {block_size}; make it more.")
        if tokenizer is not None:
            tokenizer.check_vocab(model.config.vocab_size)
        self.tokenizer = tokenizer
        self.deterministic = deterministic
        if speculative not in (True, False, "auto"):
            raise UserError(f'speculative is {speculative!r}; it must be True, False or "auto".')
        if speculative is True and not len(getattr(model, "mtp", ())):
            raise UserError("speculative decoding needs a model with an MTP module (num_nextn_predict_layers 1).")
        self._speculative = speculative
        if quantise not in (None, "int8"):
            raise UserError(f'quantise is {quantise!r}; it must be None or "int8".')
        self._int8, self._room = quantise is not None, room
        self._native = _natively(True if self._int8 else native, model, block_size)
        self._blocks, self._size = cache_tokens // block_size, block_size
        self._limits = (max_batch_tokens, min(max_sequences, max_batch_tokens), prefix_cache)
        self._events: list[Event] = []
        self._requests: dict[str, Request] = {}
        self._names = itertools.count()
        self._prepare(model)

    def _prepare(self, model: Any) -> None:
        """An empty cache and prepared weights for this model."""
        self.model = model
        more = int(bool(self._speculative) and len(getattr(model, "mtp", ())) > 0)
        self._runner = ModelRunner(
            model, blocks=self._blocks, block_size=self._size, tile=TILE if self.deterministic else 0,
            more_layers=more, native=self._native, int8=self._int8, room=self._room,
        )  # fmt: skip
        blocks = BlockManager(self._blocks, self._size)
        self._scheduler = Scheduler(blocks, *self._limits, model.config.max_position_embeddings)
        self._drafter = Drafter(model.mtp[0], self._runner) if more else None
        self._choice = Choice()
        self._intake = Intake(model, self.tokenizer, self._blocks * self._size)
        self._seen: tuple[int, Any] | None = _state_of(model)

    @property
    def device(self) -> torch.device:
        return self._runner.device

    # ---- weights
    def update_weights(self, model: Any) -> None:
        """Generate and score with `model` from now on; no cached prefix is used again.

        Requests under way go on: what they have sampled stays, with its logprobs, and is read again by the new
        weights before the next token; a prompt that was half read is the new weights' alone. Raises UserError,
        changing nothing, for a model that does not fit the tokenizer or, while requests are under way, one of another
        architecture.
        """
        if self.tokenizer is not None:
            self.tokenizer.check_vocab(model.config.vocab_size)
        if model.config == self.model.config and model.kernels.torch_dtype == self._runner.dtype:
            self._scheduler.preempt_all()
            for request in self._requests.values():
                request.read_anew()
            self._runner.load(model)
            self._drafter = None if self._drafter is None else Drafter(model.mtp[0], self._runner)
            self.model, self._seen = model, _state_of(model)
        elif self.has_work:
            raise UserError("the new weights are of another architecture and requests run; finish them first.")
        else:
            self._prepare(model)

    def let_go(self) -> None:
        """Free the prepared weights; the next request makes them anew. Raises UserError while one is under way."""
        if self.has_work:
            raise UserError("requests are under way; finish them before the prepared weights are let go.")
        self._runner.let_go()
        self._seen = None

    def _refresh(self) -> None:
        """A trainer changes its module in place: seen when the next request comes."""
        if not self._scheduler.running and self._seen != _state_of(self.model):
            self.update_weights(self.model)

    # ---- one request at a time
    def add(self, prompt_ids: Seq[int], sampling: Sampling, *, request_id: str | None = None, salt: str = "") -> str:
        """Queue a request; its events come from `step`. Returns its id (made up when not given).

        `salt`: prompts share cached prefixes only with requests of the same salt. Raises UserError for what can never
        be answered: an empty or over-long prompt, ids outside the vocabulary, options the model cannot follow, an id
        that is in use.
        """
        self._refresh()
        name = f"request-{next(self._names)}" if request_id is None else request_id
        if name in self._requests:
            raise UserError(f'request id "{name}" is in use; give each request its own.')
        self._intake.check(prompt_ids, sampling, "the prompt")
        self._queue(self._intake.request(name, prompt_ids, sampling, salt=salt))
        return name

    def cancel(self, request_id: str) -> None:
        """End every sample of a request; the next `step` returns their last events. Unknown or finished: nothing."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            going = [sequence for sequence in request.samples if sequence.finish_reason is None]
            self._events += [sequence.cancel() for sequence in going]
            self._scheduler.drop(going)

    def step(self) -> list[Event]:
        """Schedule, run, sample once; one event for each sample that went on. [] when there is nothing to do."""
        events, self._events = self._events, []
        return events + self._step()

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._requests or self._events)

    def stats(self) -> dict[str, float]:
        """What is going on (running, waiting, kv_used: fraction of the blocks) and counts since the beginning.

        `prefix_cache_queries`: prompt tokens started; `prefix_cache_hits`: of those, not computed.
        """
        scheduler, counts = self._scheduler, self._scheduler.counts
        waiting = sum(1 for _ in scheduler.sequences()) - len(scheduler.running)
        return {
            "running": len(scheduler.running), "waiting": waiting,
            "kv_used": scheduler.blocks.used / scheduler.blocks.count, "steps": counts.steps,
            "computed_tokens": counts.computed_tokens, "num_preemptions": counts.preemptions,
            "spec_decode_num_drafts": counts.drafts, "spec_decode_num_draft_tokens": counts.drafts,
            "spec_decode_num_accepted_tokens": counts.accepted,
            "prefix_cache_queries": counts.prompt_tokens, "prefix_cache_hits": counts.cached_tokens,
            "cache_bytes_per_token": self._runner.store.bytes_per_token, "native": self._native,
        }  # fmt: skip

    # ---- many at once
    def generate(self, prompts: Seq[Seq[int]], sampling: Sampling | Seq[Sampling]) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt, in order; logprobs are fp32 at the sampling temperature.

        One Sampling for all, or one each. With one for all, a prompt's place in the list is part of its seed, so that
        equal prompts get different samples. A completion ends at a stop id (`sampling.stop_ids`, or the tokenizer's
        end token when none are given), which is its last id, at a stop string, or after `max_new_tokens`.
        `routed_experts` covers every token that was fed: the prompt, then the completion without its last token.
        Raises UserError as `add` does, before anything is computed; on the way UserError for a grammar that grows too
        large and FloatingPointError for NaN logits.
        """
        self._refresh()
        shared = isinstance(sampling, Sampling)
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(samplings) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(samplings)} samplings; give one for all, or one each.")
        pairs = list(zip(prompts, samplings, strict=True))
        for index, (prompt, each) in enumerate(pairs):
            self._intake.check(prompt, each, f"prompt {index}")
        requests = []  # all are made before one is queued: a grammar may still be refused
        for index, (prompt, each) in enumerate(pairs):
            name, stream = f"generate-{next(self._names)}", index if shared else 0
            requests.append(self._intake.request(name, prompt, each, stream=stream, silent=True))
        for request in requests:
            self._queue(request)
        try:
            with seldom_searched():
                while any(request.id in self._requests for request in requests):
                    self._events += self._step()
        finally:  # an error or an interrupt leaves nothing behind
            for request in requests:
                if self._requests.pop(request.id, None) is not None:
                    self._scheduler.drop([s for s in request.samples if s.finish_reason is None])
        if wrong := [sample.error for request in requests for sample in request.samples if sample.error]:
            raise UserError(wrong[0])
        return self._completions(requests)

    @overload
    def score(self, token_ids: Seq[Seq[int]], *, temperature: float = 1.0) -> list[list[float]]: ...
    @overload
    def score(
        self, token_ids: Seq[Seq[int]], *, temperature: float = 1.0, top_k: int = 0, hidden: bool = False
    ) -> list[list[float]] | list[Scored]: ...

    def score(
        self, token_ids: Seq[Seq[int]], *, temperature: float = 1.0, top_k: int = 0, hidden: bool = False
    ) -> list[list[float]] | list[Scored]:
        """For each sequence of T ids its T-1 logprobs, at `temperature`.

        With `top_k` (the likeliest tokens, and the mass of the others) or `hidden` (the states before the head) a
        `Scored` for each. Logits exist only a chunk of positions at a time. Raises UserError as `generate` does, and
        for a temperature that is not positive.
        """
        return score(self.model, token_ids, temperature=temperature, top_k=top_k, hidden=hidden)

    # ---- inside
    def _queue(self, request: Request) -> None:
        self._requests[request.id] = request
        self._scheduler.add(request.samples)

    @torch.inference_mode()
    def _step(self) -> list[Event]:
        """One step; with a drafter, checked drafts give a second token, and new ones are made at the end."""
        running = len(self._scheduler.running)
        drafts = self._drafter is not None and (self._speculative is True or self._choice.drafts(running))
        began = time.perf_counter()
        works = self._runner.arrange(self._scheduler.schedule(drafts=drafts))
        if not works:
            return []
        watched = [request.sampling for work in works if (request := work.sequence.request).watches]
        routed = any(sampling.routed_experts for sampling in watched)
        whole = self._drafter is not None or any(sampling.prompt_logprobs is not None for sampling in watched)
        ran = self._runner.run(works, routed=routed, whole=whole)
        self._scheduler.computed(works)
        rows = self._rows(works, ran)
        events = self._sample(ran, rows) if rows else []
        if self._drafter is not None:
            accepted = check_drafts(works, ran, self._scheduler.counts)
            events += self._sample(ran, accepted) if accepted else []
            if drafts:
                make_drafts(self._drafter, works, ran)
            if all(work.end - work.start == 1 for work in works):
                self._choice.record(running, drafts, time.perf_counter() - began, len(rows) + len(accepted))
        return events

    def _rows(self, works: list[Work], ran: Ran) -> list[tuple[Sequence, int]]:
        """Who samples now, and from which row; followers of a prompt that is read take it over."""
        rows, end = [], 0
        for work in works:
            start, end = end, end + work.end - work.start
            sequence = work.sequence
            if sequence.request.watches:
                self._watch(work, ran, start, end)
            last, end = end - 1, end + work.drafted
            if work.end < len(sequence.ids):
                continue
            rows.append((sequence, last))
            if sequence.followers:
                forked, copies = self._scheduler.fork(sequence)
                self._runner.copy_blocks(copies)
                for follower in forked:
                    follower.routed = list(sequence.routed)
                    rows.append((follower, last))
        return rows

    def _watch(self, work: Work, ran: Ran, start: int, end: int) -> None:
        """Keep what this request asked for of the pass's rows [start, end), besides its next token."""
        request = work.sequence.request
        if request.sampling.routed_experts and ran.routed_LNA is not None:
            work.sequence.record(work.start, ran.routed_LNA[:, start:end].transpose(0, 1))
        if request.sampling.prompt_logprobs is not None:
            read_prompt(request, work.start, ran.hidden_ND[start:end], self._runner.logits)

    def _sample(self, ran: Ran, rows: list[tuple[Sequence, int]]) -> list[Event]:
        """Draw the next token of these sequences from the logits of these rows."""
        sequences, index, hidden_RD = [sequence for sequence, _ in rows], [row for _, row in rows], ran.hidden_ND
        if index != list(range(len(hidden_RD))):  # as it is where nothing but decoding was done
            hidden_RD = hidden_RD.index_select(0, torch.from_numpy(np.array(index)).to(self.device))
        logits_RV = self._runner.logits(hidden_RD)
        u_R = uniforms([s.key for s in sequences], [len(s.logprobs) for s in sequences])
        drawn = sample(
            adjust(logits_RV, sequences), torch.from_numpy(u_R).to(self.device), [s.request.sampling for s in sequences]
        )
        events, finished = [], []
        for row, (sequence, token, logprob) in enumerate(zip(sequences, drawn.tokens, drawn.logprobs, strict=True)):
            if sequence.plain:
                sequence.take(token, logprob)
            else:
                event = sequence.append(token, logprob, drawn.top.get(row))
                if not sequence.request.silent:
                    events.append(event)
            if sequence.finish_reason is not None:
                finished.append(sequence)
        if finished:
            self._finish(finished)
        return events

    def _finish(self, sequences: list[Sequence]) -> None:
        self._scheduler.drop(sequences)
        for request in {id(s.request): s.request for s in sequences}.values():
            if all(sample.finish_reason is not None for sample in request.samples):
                self._requests.pop(request.id, None)

    def _completions(self, requests: list[Request]) -> list[list[Completion]]:
        """Text of what nobody streamed is decoded here, all at once."""
        samples = [sample for request in requests for sample in request.samples]
        if self.tokenizer is not None:
            plain = [sample for sample in samples if sample.stops is None]
            spoken = [s.new_ids[: -1 if s.finish_reason == "stop" else None] for s in plain]
            for sample, text in zip(plain, self.tokenizer.decode_batch(spoken), strict=True):
                sample.text = text
        return [[sample.completion() for sample in request.samples] for request in requests]


def _state_of(model: Any) -> tuple[int, Any]:
    """Changes when a parameter is changed in place, or the way products are computed."""
    versions = sum(0 if p.is_inference() else p._version for p in model.parameters())
    return versions, model.kernels


def _natively(wanted: bool | Literal["auto"], model: Any, block_size: int) -> bool:
    """Whether this model's steps run natively. Raises UserError where they must and cannot."""
    if wanted is False:
        return False
    missing = why_not(model.kernels.torch_dtype, model.embedding.device)
    reason = f"block_size {block_size} is odd" if block_size % 2 else missing
    if reason is not None and wanted is True:
        raise UserError(f'native steps are not to be had: {reason}; mend that, or pass native="auto".')
    return reason is None
