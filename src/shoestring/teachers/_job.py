"""A job: which questions go to which teachers, planned in the store, and the lanes that ask them."""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from typing import Any
from urllib.parse import urlsplit

from shoestring.core.errors import UserError
from shoestring.data.claims import Planned
from shoestring.data.far import Far
from shoestring.data.places import AnyStore
from shoestring.data.questions import Asked, Skipped
from shoestring.data.traces import TraceIds, canonical, question_hash, texts
from shoestring.teachers._lane import Lane
from shoestring.teachers._pace import Pace
from shoestring.teachers._price import Rate, rate_of, terms_of
from shoestring.teachers._send import Limits, Sender, check_url, is_local, key_from
from shoestring.teachers._wire import Body

TRUNCATED = ("keep", "drop", "longer")
PATIENCE_S = 600.0
CHUNK = 1000  # questions planned in one transaction


@dataclass(frozen=True, slots=True)
class Api:
    """A teacher behind an OpenAI-compatible API, and how to ask it. `decoding` goes into the body as it is."""

    url: str
    model: str
    decoding: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None  # part of what is asked; None: model and address
    key: str | None = None  # the environment variable that holds the key
    licence: str | None = None  # of its answers; None: "unknown"
    price: str | None = None
    permission: str | None = None  # how the user may train on answers whose terms forbid it
    weight: float = 1.0
    max_tokens: int = 4096
    n: int = 1
    stream: bool = False
    most: int = 64
    start: int = 16
    rpm: float = 0
    tpm: float = 0
    tries: int = 5
    patience_s: float | None = None  # how long to wait for a server that is gone; None: PATIENCE_S, of a batch an hour
    discount: int = 0
    truncated: str = "keep"  # an answer that was cut off is kept and marked; or "drop"; or asked once "longer"
    longer_tokens: int | None = None  # max_tokens of that; None: four times as many
    raw: bool = False  # text completions: a question is one message of role "raw", sent as it is
    limits: Limits = field(default_factory=Limits)

    @property
    def title(self) -> str:
        return self.name or f"{self.model} at {urlsplit(self.url).netloc}"

    @property
    def asked(self) -> dict[str, Any]:
        """The decoding parameters of its requests."""
        return {"max_tokens": self.max_tokens, **self.decoding}

    def once(self) -> Api:
        """The same teacher, where what is cut off is not asked for again."""
        return replace(self, truncated="keep", longer_tokens=None) if self.truncated == "longer" else self

    def longer(self) -> Api:
        """The same teacher with more tokens, when it is to be asked for longer answers."""
        more = self.longer_tokens or 4 * self.max_tokens
        return replace(self.once(), max_tokens=more) if self.truncated == "longer" else self

    def rate(self) -> Rate:
        return rate_of(self.model, self.price, local=is_local(self.url), discount=self.discount)

    @property
    def endpoint(self) -> str:
        return check_url(self.url, "completions" if self.raw else "chat/completions")

    def how(self) -> dict[str, Any]:
        """What every trace of its answers says of how it was asked. Raises UserError for an unknown price."""
        return {
            "teacher": self.title, "model": self.model, "endpoint": self.endpoint, "decoding": self.asked,
            "price": self.rate().row(), "licence": self.licence or "unknown",
            "terms": "forbid competing models" if self.forbids() else "", "permission": self.permission or "",
        }  # fmt: skip

    def lane(self, store: AnyStore) -> Lane:
        """The lane that asks it. Raises UserError for a bad address, an unknown price, a missing key."""
        self.check()
        fields, url = self.how(), self.endpoint
        patience = PATIENCE_S if self.patience_s is None else self.patience_s
        return Lane(
            self.title, store.how(hashlib.sha256(canonical(fields).encode()).hexdigest(), fields),
            Sender(url, key=key_from(self.key), limits=self.limits, most=self.most, stream=self.stream),
            Body(self.model, self.asked, stream=self.stream, raw=self.raw),
            Pace(self.most, rpm=self.rpm, tpm=self.tpm, start=self.start), self.rate(), self.model, self.max_tokens,
            self.n, self.stream, self.tries, self.truncated == "drop", patience,
        )  # fmt: skip

    def forbids(self) -> bool:
        return terms_of(self.model) == "yes"

    def check(self) -> None:
        """Raises UserError for what can be known to be wrong before anything is asked."""
        check_url(self.url)
        key_from(self.key)
        if min(self.most, self.n, self.max_tokens, self.tries) < 1:
            raise UserError("concurrency, n, max tokens and tries must be at least 1.")
        if self.weight <= 0:
            raise UserError(f"the weight of {self.title} is {self.weight}; it must be positive.")
        if self.truncated not in TRUNCATED:
            raise UserError(f'--truncated is "{self.truncated}"; it must be one of {", ".join(TRUNCATED)}.')
        if self.longer_tokens is not None and (self.truncated != "longer" or self.longer_tokens <= self.max_tokens):
            raise UserError("--longer-tokens belongs to --truncated longer, and must be more than --max-tokens.")
        if self.raw and self.stream:
            raise UserError("text completions are not asked for as streams; leave out --stream.")
        for name in ("model", "messages", "prompt", "stream", "n", "max_completion_tokens"):
            if name in self.decoding:
                raise UserError(f'"{name}" cannot be a parameter of decoding; it has an option of its own.')
        if self.forbids() and not self.permission:
            raise UserError(
                f"the terms of {self.model} forbid training competing models on its answers; ask another teacher, or "
                'say what allows it: --i-have-permission "…" (it is kept in every trace).'
            )


def signature(apis: Sequence[Api], identity: str, samples: int) -> str:
    """What makes a command the same job as before: with another price or licence its open rows are planned anew, so
    that they are billed by it; what is answered stays as it is."""
    asked = [[api.how(), api.weight] for api in apis]
    return hashlib.sha256(canonical([asked, identity, samples]).encode()).hexdigest()


def plan(
    store: AnyStore, job: int, source: Callable[[], Iterator[Asked]], apis: Sequence[Api], lanes: Sequence[Lane],
    samples: int, *, skipped: Skipped | None = None, apart: Callable[[int], Far | None] | None = None,
) -> int:  # fmt: skip
    """Put every question of `source` into the store as rows of `job`; the number of questions.

    With several teachers each question goes to one, drawn by its hash with the weights. apart: a process that writes,
    where one pays for so many rows. Raises UserError for an id that stands for two questions (counted in `skipped` when
    given).
    """
    ids = [TraceIds(api.title, api.asked) for api in apis]
    ends = list(accumulate(api.weight for api in apis))
    count, far = 0, None
    asked = source()
    while chunk := list(islice(asked, CHUNK)):
        parts: list[list[Planned]] = [[] for _ in lanes]
        known = [
            (one, escaped, text, question_hash(escaped)) for one in chunk for escaped, text in [texts(one.messages)]
        ]
        bad = _with_two_meanings(store, [(one.ref, hash_, one.line) for one, _, _, hash_ in known], skipped)
        for one, escaped, text, hash_ in known:
            if one.line in bad:
                continue
            which = bisect(ends, int(hash_[:8], 16) / 2**32 * ends[-1]) if len(ends) > 1 else 0
            problem = canonical(one.problem) if one.problem else None
            parts[which].append(Planned(hash_, text, one.ref, problem, ids[which].of(escaped, samples)))
        for lane, part in zip(lanes, parts, strict=True):
            if part:
                (far or store).plan(part, lane.how, job)
        count += len(chunk)
        far = far or (apart(count * samples) if apart else None)
    if far is not None:
        far.planned()
    store.set_planned(job)
    return count


def _with_two_meanings(
    store: AnyStore, asked: Iterable[tuple[str | None, str, int]], skipped: Skipped | None
) -> set[int]:
    """Lines whose id stands for another question already, of (id, hash, line): an error, or counted in `skipped`."""
    refs = [(ref, int(hash_[:15], 16), line) for ref, hash_, line in asked if ref is not None]
    bad: set[int] = set()
    while refs and (found := store.check_refs(refs)):
        ref, first, line = found
        told = f'line {line}: the id "{ref}" already stands on line {first} with another question'
        if skipped is None:
            raise UserError(f"{told}; give each question an id of its own, or leave such lines out with --skip-bad.")
        skipped.count += 1
        skipped.first = skipped.first or told
        bad.add(line)
        refs = [one for one in refs if one[2] != line]
    return bad
