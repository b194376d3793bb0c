"""New questions by the thousand: rounds of requests to a teacher, read, sieved, and added to what is written from.

Every request goes through `ask` into a traces store, so budget, prices and resuming are ask's, and what was answered
is never asked again. Nothing else is kept: the questions are a function of the options and of the store, computed
anew each time, so a killed command goes on where it was and a repeated one costs nothing. The requests of a round are
drawn from the pool as it was at the round's beginning; how many of them are made at once depends on how many questions
are missing, so that more of them are more of the same sequence. Rounds grow with the pool.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from pathlib import Path
from types import ModuleType
from typing import Any

from shoestring.core.atomic import write_bytes
from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.curate._sieve import Filter
from shoestring.curate._writing import (
    ASKED_FOR,
    PEOPLE,
    Item,
    Person,
    Pool,
    Request,
    Stream,
    judgement,
    read,
    rejected,
    unfit,
)
from shoestring.teachers._lane import Told

FILE = "questions.jsonl"
PILOT = 20
SMALLEST_ROUND = 256  # requests; later rounds are half as large as the pool
BARREN = 3  # sessions in a row that bring nothing, and it ends
LEAST_YIELD = 0.05  # of questions a request, when it is reckoned how many to make at once

USUAL = (
    Filter("refused"), Filter("one_language"), Filter("repeated"), Filter("dedup"),
    Filter("near_duplicates", {"n": 3, "threshold": 0.7}),
)  # fmt: skip


@dataclass(slots=True)
class Asked:
    """What a round's requests brought: a trace by the request's place; why it was stopped."""

    traces: dict[int, Trace]
    told: Told


Ask = Callable[[Sequence[Request]], Asked]


@dataclass(frozen=True, slots=True)
class Wish:
    """What to write: how many questions, by which method, sieved how. `fewest` and `most` are words of a question."""

    method: str
    stream: Stream
    count: int
    out: Path
    filters: Sequence[Filter] = USUAL
    stops: tuple[str, ...] = ()  # where a user's turn ends, for the method "nothing"
    seed: int = 0
    fewest: int = 3
    most: int = 1000
    judge: bool = False  # the teacher judges what it made out of another question
    pilot: bool = False  # ask PILOT requests and price the rest


@dataclass(slots=True)
class Made:
    """What came of it. `brought` and `costs` (pico-dollars) are by request that was to bring questions."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    pool: Pool = field(default_factory=Pool)
    dropped: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    rounds: int = 0
    answers_now: int = 0
    brought: list[int] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    people_cost: float = 0.0  # pico-dollars of the requests that brought people
    told: Told | None = None  # of the last session
    ended: str | None = None  # why before `count`

    def report(self, wish: Wish) -> dict[str, Any]:
        """For --json."""
        return {
            "schema": 1, "method": wish.method, "wanted": wish.count, "questions": min(len(self.rows), wish.count),
            "people": len(self.pool.people), "requests": self.requests, "rounds": self.rounds + 1,
            "answers_now": self.answers_now, "dropped": dict(self.dropped.most_common()),
            "questions_a_request": sum(self.brought) / len(self.brought) if self.brought else None,
            "file": str(wish.out / FILE), "ended": self.ended, "forecast": self.forecast(wish) if wish.pilot else None,
        }  # fmt: skip

    def forecast(self, wish: Wish) -> dict[str, Any]:
        """What `count` questions cost: dollars over questions of the requests there are, and its 95 % interval (of a
        ratio, by linearisation: Cochran, Sampling Techniques, section 6.4). Later rounds find more repeats."""
        n, found = len(self.brought), sum(self.brought)
        if not found:
            return {"requests": n, "questions": found, "requests_in_all": None, "usd": None, "usd_95": None}
        ratio = sum(self.costs) / found
        spread = [cost - ratio * brought for cost, brought in zip(self.costs, self.brought, strict=True)]
        error = 1.96 * sqrt(sum(s * s for s in spread) / max(1, n - 1) / n) / (found / n) if n > 1 else ratio
        usd, ratio = wish.count / 1e12, ratio + self.people_cost / found
        return {
            "requests": n, "questions": found, "requests_in_all": ceil(wish.count * n / found), "usd": ratio * usd,
            "usd_95": [max(0.0, ratio - error) * usd, (ratio + error) * usd],
        }  # fmt: skip


def synthesize(wish: Wish, pool: Pool, ask: Ask) -> Made:
    """Write questions until there are `count`, nothing more can be asked, or the session is stopped.

    `pool` holds the seeds. After every round the questions so far stand in `out`. Raises UserError.
    """
    if wish.count < 1:
        raise UserError(f"--count is {wish.count}; it must be at least 1.")
    if wish.judge and wish.method != "evolve":
        raise UserError("--judge belongs to --method evolve: it compares a question with the one it was made out of.")
    modules = [(one, one.load()) for one in wish.filters]
    for one, module in modules:
        list(module.judge([], **one.options))  # a bad option or a missing file is told before anything is asked
    made, barren = Made(pool=pool), 0
    rounds = _rounds(wish, made)
    while len(made.rows) < wish.count and not made.ended:
        requests = _some(wish, made, rounds)
        if not requests:
            made.ended = "nothing more can be asked of these seeds; give more of them"
            break
        asked = ask(requests)
        made.told, before = asked.told, len(made.rows) + len(pool.people)
        made.requests += len(requests)
        _take(wish, made, modules, requests, asked, ask)
        made.answers_now += asked.told.answers
        _write(wish, made)
        barren = 0 if len(made.rows) + len(pool.people) > before else barren + 1
        if asked.told.stopped:
            made.ended = asked.told.stopped
        elif barren == BARREN:
            made.ended = f"{BARREN} sessions in a row brought nothing new; give other seeds, or loosen the filters"
        elif wish.pilot and made.brought:
            break
    _write(wish, made, last=True)
    return made


def _rounds(wish: Wish, made: Made) -> Iterator[Request | None]:
    """Every request there is to make, none twice; None at the end of each round."""
    seen: set[tuple[Any, int]] = set()
    while True:
        pool = Pool(list(made.pool.items), list(made.pool.people))
        size, fresh = max(SMALLEST_ROUND, len(pool.items) // 2), 0
        for tries, request in enumerate(wish.stream(pool, wish.seed * 1_000_003 + made.rounds)):
            if (request.messages, request.sample) not in seen:
                seen.add((request.messages, request.sample))
                fresh += 1
                yield request
            if fresh == size or tries > 100 * size + len(seen):
                break
        if not fresh:
            return
        made.rounds += 1
        yield None


def _some(wish: Wish, made: Made, rounds: Iterator[Request | None]) -> list[Request]:
    """As many requests of one round as may be needed; [] when there are none left."""
    expected = float(ASKED_FOR if wish.method == "self_instruct" else 1)
    if made.brought:
        expected = max(LEAST_YIELD, sum(made.brought) / len(made.brought))
    size = PILOT if wish.pilot else ceil((wish.count - len(made.rows)) / expected)
    found: list[Request] = []
    for request in rounds:
        if request is not None:
            found.append(request)
        if len(found) == size or (request is None and found):
            break
    return found


def _take(
    wish: Wish, made: Made, modules: Sequence[tuple[Filter, ModuleType]], requests: Sequence[Request], asked: Asked,
    ask: Ask,
) -> None:  # fmt: skip
    """Read the answers, sieve what they bring, and add what is left to the pool."""
    new: list[tuple[int, str]] = []
    for place, trace in sorted(asked.traces.items()):
        request = requests[place]
        found, why = read(request, trace.answer, trace.finish_reason, wish.stops)
        if why:
            made.dropped[why] += 1
        if request.brings == PEOPLE:
            _meet(made.pool, found)
            continue
        for text in found:
            why = unfit(text, wish.fewest, wish.most)
            if why:
                made.dropped[why] += 1
            else:
                new.append((place, text))
    brought, judging = Counter[int](), Counter[int]()
    reasons = _sift(made.pool, [text for _, text in new], modules)
    if wish.judge:
        judging = _judge(made, requests, asked, new, reasons, ask)
    for (place, text), why in zip(new, reasons, strict=True):
        if why:
            made.dropped[why] += 1
            continue
        row = _row(wish, made, requests[place], asked.traces[place], text)
        made.rows.append(row)
        made.pool.items.append(Item(row["id"], text, requests[place].depth))
        brought[place] += 1
    for place, trace in sorted(asked.traces.items()):
        if requests[place].brings != PEOPLE:
            made.brought.append(brought[place])
            made.costs.append(trace.cost_usd * 1e12 + judging[place])
        else:
            made.people_cost += trace.cost_usd * 1e12


def _judge(
    made: Made, requests: Sequence[Request], asked: Asked, new: Sequence[tuple[int, str]], reasons: list[str], ask: Ask
) -> Counter[int]:
    """Have the teacher judge what is left of `new`, and put into `reasons` why it rejects; pico-dollars by place. What
    the budget leaves unjudged is not kept; the same command goes on with it."""
    texts = {item.id: item.text for item in made.pool.items}
    left = [i for i, why in enumerate(reasons) if not why]
    costs = Counter[int]()
    if not left:
        return costs
    judged = ask([judgement(texts[requests[new[i][0]].parents[0]], new[i][1]) for i in left])
    made.requests += len(left)
    asked.told.add(judged.told)
    for i, place in enumerate(left):
        trace = judged.traces.get(i)
        reasons[place] = rejected(trace.answer, trace.finish_reason) if trace else "not judged"
        costs[new[place][0]] += round(trace.cost_usd * 1e12) if trace else 0
    return costs


def _meet(pool: Pool, found: Sequence[str]) -> None:
    known = {person.text.casefold() for person in pool.people}
    for text in found:
        if text.casefold() not in known:
            known.add(text.casefold())
            pool.people.append(Person(_digest("p", text), text))


def _sift(pool: Pool, new: Sequence[str], modules: Sequence[tuple[Filter, ModuleType]]) -> list[str]:
    """Why each of `new` is dropped, "" to keep it: curate's filters, on traces whose answer is the question too."""
    reasons = [""] * len(new)
    earlier = [as_trace(item.text) for item in pool.items]
    for one, module in modules:
        left = [place for place, why in enumerate(reasons) if not why]
        before = [] if module.STATELESS else earlier
        judged = list(module.judge([*before, *(as_trace(new[place]) for place in left)], **one.options))
        for place, why in zip(left, judged[len(before) :], strict=True):
            reasons[place] = why
    return reasons


def as_trace(text: str) -> Trace:
    """A question in the form that filters judge."""
    return Trace(
        id=_digest("q", text), teacher="", teacher_reported="", messages=[{"role": "user", "content": text}],
        thinking=None, answer=text, prompt_ids=None, token_ids=None, finish_reason="stop", task=None, problem_id=None,
        correct=None, decoding={}, usage={}, cost_usd=0.0, licence="", date="",
    )  # fmt: skip


def _row(wish: Wish, made: Made, request: Request, trace: Trace, text: str) -> dict[str, Any]:
    """A line of the questions file: what `ask` reads, and where the question is from."""
    source = {key: trace.source[key] for key in ("endpoint", "terms", "permission") if trace.source.get(key)}
    return {"id": _digest("q", text), "question": text, "synthesis": {
        "method": wish.method, "operator": request.operator, "parents": list(request.parents), "depth": request.depth,
        "round": made.rounds + 1, "teacher": trace.teacher, "model": trace.teacher_reported, "trace": trace.id,
        "date": trace.date, "licence": trace.licence, **dict(request.more), **source,
    }}  # fmt: skip


def _write(wish: Wish, made: Made, *, last: bool = False) -> None:
    """The questions so far. A file that goes on where they end is left alone until the last round: it is what this
    command made before, and `ask` knows it by its date."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made.rows[: wish.count]).encode()
    path = wish.out / FILE
    before = path.read_bytes() if path.is_file() else b""
    if text and not (before == text or (before.startswith(text) and not last)):
        write_bytes(path, text)


def seeds_of(rows: Iterator[tuple[str | None, str]]) -> list[Item]:
    """Seed questions, (id or None, text) each, as items of a pool."""
    return [Item(ref or _digest("q", text), text, seed=True) for ref, text in rows]


def people_of(path: Path) -> list[Person]:
    """The people of a file: a description a line, or JSON lines with "persona". Raises UserError."""
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        text = line.strip()
        if path.suffix == ".jsonl":
            try:
                text = str(json.loads(line)["persona"]).strip()
            except (ValueError, KeyError, TypeError):
                raise UserError(f'{path} line {number} is not a JSON object with "persona".') from None
        found.append(Person(_digest("p", text), text))
    if not found:
        raise UserError(f"{path} holds no people; each line describes one.")
    return found


def _digest(kind: str, text: str) -> str:
    return kind + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:15]
