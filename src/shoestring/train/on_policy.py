"""On-policy lessons: the student writes, the teacher says what it would have said at every token of that.

Nothing is tokenised twice and no gradient goes through the sampling (GKD, arXiv 2306.13649). With probability
1 - `on_policy_share` a step learns from the teacher's own answers instead (GKD's lambda; a coin a step). By default the
divergence is taken over the whole vocabulary, whose gradient has no variance from the sampling of the token; with
`policy_gradient` only the sampled tokens' log-probabilities are used:

    A_t = ln p(y_t) - ln q_old(y_t),   L = -Σ exp(ln q - ln q_old) A_t

Left out: MiniLLM's long-range return and teacher-mixed sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from shoestring.core.errors import UserError
from shoestring.core.nouns import Message
from shoestring.data.batch import Batch, Example, packed_batch
from shoestring.data.textbook import conversation, problems
from shoestring.infer.generator import generator_of
from shoestring.text.chat import render
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.beside import Beside
from shoestring.train.configs import DistillStage
from shoestring.train.context import Context, derived_seed
from shoestring.train.distill_checks import check_template, kept_examples
from shoestring.train.examples import examples_of_step
from shoestring.train.lessons import coin
from shoestring.train.step import TrainState, sampling_flops


class OnPolicyLesson:
    """What the student writes to the step's prompts, and the teacher beside it."""

    def __init__(self, stage: DistillStage, ctx: Context, state: TrainState, tokenizer: Tokenizer):
        student = state.model
        self.stage, self.ctx, self.tokenizer = stage, ctx, tokenizer
        self.teacher = Beside(stage, ctx, student, tokenizer)
        self.engine = generator_of(student, tokenizer, state.room)
        padding = range(tokenizer.vocab_size, student.config.vocab_size)  # rows that are no tokens are never written
        self.banned = {row: float("-inf") for row in padding} or None
        self.kept: list[Example] = []
        self.prompts: list[list[int]] = []
        licences = [f"weights of {name}" for name in self.teacher.names]
        if "traces" in ctx.inputs:
            traces, self.kept = kept_examples(ctx, tokenizer)
            check_template(ctx, traces, tokenizer)
            asked = {t.id: [Message(m["role"], m["content"]) for m in t.messages] for t in traces}
            self.prompts = [render(messages, tokenizer, generation_prompt=True).ids for messages in asked.values()]
            licences += sorted({t.licence for t in traces})
        ctx.run.note(teachers=self.teacher.names, licences=licences)
        self.writes = True

    def examples(self, state: TrainState) -> tuple[list[Example], dict[str, float]]:
        """What the student writes now, with the sampler's logprobs; on the other steps, kept answers."""
        stage = self.stage
        self.writes = coin(derived_seed(stage.seed, 12), state.step) < stage.on_policy_share
        if not self.writes:
            chosen = examples_of_step(len(self.kept), state.step, stage.examples_per_step, derived_seed(stage.seed, 2))
            return [self.kept[i] for i in chosen], {"on_policy": 0.0}
        prompts = list(islice(self._prompts(state.step), stage.examples_per_step))
        seed = derived_seed(stage.seed, 5, state.step)
        self.engine.update_weights(state.model)
        sampling = stage.decoding.sampling(n=1, seed=seed, stop_ids=(self.tokenizer.end,))
        sampling = replace(sampling, logit_bias=self.banned)
        written = [group[0] for group in self.engine.generate(prompts, sampling)]
        self.engine.let_go()
        if not any(completion.token_ids for completion in written):
            raise UserError(f"{self.ctx.run.name}: the student wrote nothing at all to {len(prompts)} prompts.")
        pairs = list(zip(prompts, written, strict=True))
        lengths = [len(completion.token_ids) for completion in written]
        state.sampled += sum(map(len, prompts)) + sum(lengths)
        state.flops += sampling_flops(state.model, [(len(p), [len(c.token_ids)]) for p, c in pairs])
        facts = {
            "on_policy": 1.0, "length": sum(lengths) / len(lengths),
            "truncated": sum(c.finish_reason == "length" for c in written) / len(written),
        }  # fmt: skip
        if state.step == 0 or (state.step + 1) % stage.checkpoint_every == 0:
            rows = [{"prompt": self.tokenizer.decode(p), "text": c.text, "finish_reason": c.finish_reason}
                    for p, c in pairs[:16]]  # fmt: skip
            self.ctx.run.save_samples("first" if state.step == 0 else "last", rows)
        made = [self._example(prompt, completion) for prompt, completion in pairs]
        if stage.policy_gradient:
            facts["teacher_gap"] = self._advantages(made) / sum(lengths)
        return made, facts

    def _prompts(self, step: int) -> Iterator[list[int]]:
        """Prompts of a step: problems from step·1000 on, or those of the traces in a seeded order."""
        if self.stage.mix:
            source = problems(self.stage.mix, derived_seed(self.stage.seed, 4), start=step * 1000)
            return (render(conversation(p), self.tokenizer, generation_prompt=True).ids for p in source)
        seed = derived_seed(self.stage.seed, 4)
        order = examples_of_step(len(self.prompts), step, self.stage.examples_per_step, seed)
        return (self.prompts[i] for i in order)

    def _example(self, prompt: Sequence[int], completion: Any) -> Example:
        nothing = [0.0] * len(prompt)
        weight = nothing + [1.0] * len(completion.token_ids)
        old = nothing + list(completion.logprobs)
        return Example([*prompt, *completion.token_ids], weight, old=old)

    def _advantages(self, made: Sequence[Example]) -> float:
        """The advantages ln p(y_t) - ln q_old(y_t) of every written token, at the temperature of both.

        Returns their sum: minus the tokens' reverse KL, estimated.
        """
        capacity = max(len(e.ids) for e in made)
        per = max(1, self.stage.tokens_per_microbatch // capacity)
        total = 0.0
        for start in range(0, len(made), per):
            some = made[start : start + per]
            batch = packed_batch(some, [[i] for i in range(len(some))], capacity, self.tokenizer.pad)
            told = iter(self.teacher.logprobs(batch).tolist())
            for example in some:
                assert example.old is not None
                pairs = zip(example.weight, example.old, strict=True)
                example.advantage = gaps = [next(told) - q if w else 0.0 for w, q in pairs]
                total += sum(gaps)
        return total

    def teach(self, batch: Batch) -> None:
        """The teacher's hidden states, unless its scores were enough."""
        if not self.stage.policy_gradient:
            self.teacher.teach(batch)

    def flops(self, examples: Sequence[Example]) -> float:
        return self.teacher.flops(examples)
