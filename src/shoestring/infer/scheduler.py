"""Who computes what in the next step.

Running sequences first, one token each; then what is left of the token budget goes to prompts, in chunks, first come
first served; so a long prompt never stalls those that are being answered. When a running sequence needs a block and
none is free, the newest one gives its blocks back and waits at the front of the queue; later it reads prompt and
answer again, much of it from the prefix cache. Its random numbers depend on the position alone, so its tokens are the
same. Of a request with several samples the first one reads the prompt, and the others take its blocks over (`fork`).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from shoestring.infer.blocks import BlockManager, chain, root
from shoestring.infer.sequence import Sequence


@dataclass(slots=True)
class Work:
    """One sequence's part of a step: the tokens ids[start:end] are computed, and its draft after them."""

    sequence: Sequence
    start: int
    end: int
    drafted: int = 0  # 1: the sequence's draft stands at `end`

    @property
    def ends(self) -> bool:
        """Whether the step reaches the last known token, so that the next one is sampled."""
        return self.end == len(self.sequence.ids)


@dataclass(slots=True)
class Counts:
    """What the scheduler has done so far."""

    prompt_tokens: int = 0  # of prompts that were started
    cached_tokens: int = 0  # of those, found in the prefix cache or taken over from the first of a group
    computed_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    drafts: int = 0
    accepted: int = 0  # of the drafts


@dataclass(slots=True)
class Scheduler:
    """`budget`: tokens in a step. `most`: sequences that run at once, at most `budget`, so that none is left out.
    `reuse`: whether prefixes are shared between requests."""

    blocks: BlockManager
    budget: int
    most: int
    reuse: bool = True
    positions: int = 1 << 62  # of the model
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    _tables: Iterator[int] = field(default_factory=itertools.count)  # a number for every state of a block table

    # ---- the queue
    def add(self, samples: list[Sequence]) -> None:
        """Queue a request's samples: the first one leads, the others follow when its prompt is read."""
        leader, *followers = samples
        leader.followers = followers
        self.waiting.append(leader)

    def sequences(self) -> Iterator[Sequence]:
        """All that are not finished."""
        for sequence in (*self.running, *self.waiting):
            yield sequence
            yield from sequence.followers

    def drop(self, sequences: list[Sequence]) -> None:
        """Take finished or cancelled sequences out; followers of a dropped leader that go on choose a new one."""
        gone = set(map(id, sequences))
        heirs = []
        for sequence in sequences:
            self._give_back(sequence)
            left = [follower for follower in sequence.followers if id(follower) not in gone]
            sequence.followers = []
            if left:
                left[0].followers = left[1:]
                heirs.append(left[0])
        for queue in (self.running, self.waiting):
            for sequence in queue:
                if sequence.followers:
                    sequence.followers = [follower for follower in sequence.followers if id(follower) not in gone]
        self.running = [sequence for sequence in self.running if id(sequence) not in gone]
        self.waiting = deque([*heirs, *(sequence for sequence in self.waiting if id(sequence) not in gone)])

    # ---- one step
    def schedule(self, *, drafts: bool = False) -> list[Work]:
        """The next step's work, decoding first. Every block it writes is there; [] only when nothing is left.

        `drafts`: sequences that have a draft have it checked.
        """
        works: list[Work] = []
        left = self.budget
        decoding: list[Sequence] = []
        reading: list[Sequence] = []
        for sequence in self.running:
            (decoding if sequence.computed == len(sequence.ids) - 1 else reading).append(sequence)
        size = self.blocks.size
        for sequence in (*decoding, *reading):
            if sequence.blocks is None or left == 0:
                continue  # preempted for one before it; or its prompt waits for the next step's budget
            start = sequence.computed
            end = min(len(sequence.ids), start + left)
            drafted = int(drafts and left > len(decoding) and self._can_draft(sequence, end))
            if end + drafted <= size * len(sequence.blocks) or self._grow(sequence, end + drafted, works):
                works.append(Work(sequence, start, end, drafted))
                left -= end - start + drafted
        while self.waiting and left and len(self.running) < self.most:
            work = self._admit(self.waiting[0], left)
            if work is None:
                break
            self.waiting.popleft()
            self.running.append(work.sequence)
            works.append(work)
            left -= work.end - work.start
        self.counts.steps += bool(works)
        self.counts.computed_tokens += self.budget - left
        works.sort(key=lambda work: work.end - work.start > 1)  # what computes one token decodes; stable
        return works

    def _can_draft(self, sequence: Sequence, end: int) -> bool:
        """Whether a draft is checked behind `end`: it takes only what nobody else needs."""
        missing = end // self.blocks.size + 1 - len(sequence.blocks or [])
        return sequence.may_draft and end < self.positions and missing <= self.blocks.free

    def _grow(self, sequence: Sequence, end: int, works: list[Work]) -> bool:
        """Blocks up to `end`, preempting the newest sequences while there are too few; False: it was itself."""
        assert sequence.blocks is not None
        missing = -(-end // self.blocks.size) - len(sequence.blocks)
        if missing <= 0:
            return True
        while missing > self.blocks.free:
            chosen = {id(work.sequence) for work in works}
            victim = next(s for s in reversed(self.running) if id(s) not in chosen)
            self._preempt(victim)
            if victim is sequence:
                return False
        for _ in range(missing):
            sequence.blocks.append(self.blocks.take())
        sequence.table = next(self._tables)
        return True

    def preempt_all(self) -> None:
        """Every running sequence starts over from its ids, in the same order; nothing cached is found again."""
        for sequence in list(reversed(self.running)):
            self._preempt(sequence)
        self.blocks.forget_all()

    def _preempt(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        self.counts.preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        if sequence.blocks is not None:
            self.blocks.release(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.names, sequence.draft = None, 0, [], None

    def _admit(self, sequence: Sequence, left: int) -> Work | None:
        """The first chunk of a sequence that waits, or None while memory is short."""
        size, ids = self.blocks.size, sequence.ids
        found: list[int] = []
        sampling = sequence.sampling
        if self.reuse and sampling.prompt_logprobs is None and not sampling.routed_experts:
            names = self._names(sequence, (len(ids) - 1) // size)  # the last position is computed: it has the logits
            found = self.blocks.find(names, ids)
        hits = sum(self.blocks.refs[block] == 0 for block in found)  # these are free now and will not be
        wanted = -(-len(ids) // size) - len(found) + min(len(sequence.followers), self.blocks.count // 2)
        spare = min(len(self.running), self.blocks.count // 8)  # so that those that run do not stumble at once
        if self.running and wanted + spare > self.blocks.free - hits:
            return None
        if -(-len(ids) // size) - len(found) > self.blocks.free - hits:
            return None
        for block in found:
            self.blocks.share(block)
        start = len(found) * size
        end = min(len(ids), start + left)
        sequence.blocks = [*found, *(self.blocks.take() for _ in range(-(-end // size) - len(found)))]
        sequence.computed, sequence.table = start, next(self._tables)
        sequence.names = self._names(sequence, len(found)) if found else []
        if sequence.produced == 0:
            sequence.cached_tokens = start
            self.counts.prompt_tokens += len(ids)
            self.counts.cached_tokens += start
        return Work(sequence, start, end)

    def _names(self, sequence: Sequence, count: int) -> list[bytes]:
        """Names of the first `count` blocks; those already known are not hashed again."""
        size, names = self.blocks.size, sequence.names
        parent = names[-1] if names else root(sequence.request.salt)
        for index in range(len(names), count):
            parent = chain(parent, sequence.ids[index * size : (index + 1) * size])
            names = [*names, parent]
        return names[:count]

    # ---- after a step
    def computed(self, works: list[Work]) -> None:
        """These tokens are in the cache now; blocks that became full get their names."""
        size = self.blocks.size
        for work in works:
            sequence = work.sequence
            sequence.computed = work.end
            full = work.end // size
            if self.reuse and full > len(sequence.names):
                assert sequence.blocks is not None
                before = len(sequence.names)
                sequence.names = self._names(sequence, full)
                for index in range(before, full):
                    ids = sequence.ids[index * size : (index + 1) * size]
                    self.blocks.name(sequence.blocks[index], sequence.names[index], ids)

    def fork(self, leader: Sequence) -> tuple[list[Sequence], list[tuple[int, int]]]:
        """Let followers run on the leader's prompt: full blocks are shared, the last partial one is copied.

        Returns the sequences that run now, and (from, to) blocks to copy. Those there is no memory or place for wait.
        """
        assert leader.blocks is not None
        followers, leader.followers = leader.followers, []
        full, partial = divmod(leader.computed, self.blocks.size)
        forked, copies = [], []
        for index, follower in enumerate(followers):
            if self.blocks.free <= bool(partial) or len(self.running) >= self.most:
                head, *rest = followers[index:]
                head.followers = rest
                self.waiting.appendleft(head)
                break
            follower.blocks = leader.blocks[:full]
            for block in follower.blocks:
                self.blocks.share(block)
            if partial:
                follower.blocks = [*follower.blocks, self.blocks.take()]
                copies.append((leader.blocks[full], follower.blocks[-1]))
            follower.table = next(self._tables)
            follower.computed, follower.names = leader.computed, list(leader.names)
            follower.cached_tokens = leader.computed
            self.counts.prompt_tokens += leader.computed
            self.counts.cached_tokens += leader.computed
            self.running.append(follower)
            forked.append(follower)
        return forked, copies
