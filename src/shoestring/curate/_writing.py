"""How new questions are got out of a teacher: four methods, each a stream of requests and a reading of the answers.

self_instruct  a few questions as examples, and some new ones asked for (arXiv 2212.10560)
evolve         one question, made harder or turned into another by an operator (Evol-Instruct, arXiv 2304.12244)
persona        what somebody of a certain walk of life would ask (arXiv 2406.20094); people come from a file, or are
               guessed from the seed questions and from each other
nothing        an aligned teacher goes on after the template's opening of a user's turn (Magpie, arXiv 2406.08464)

A stream depends on the pool and on a seed and not on how much of it is taken, so that more of it asks only what is
new. The prompts are this project's own. What was evolved may be judged by the teacher (`judgement`): whether it asks
for something else than what it was made of, and can be answered. Evol-Instruct's other reasons to drop are `unfit`'s.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoestring.curate._words import WORD

TAGGED = re.compile(r"<question>(.*?)</question>", re.DOTALL | re.IGNORECASE)
VERDICT = re.compile(r"<(changed|answerable)>\s*(yes|no)\b", re.IGNORECASE)
PERSON = re.compile(r"<person>(.*?)</person>", re.DOTALL | re.IGNORECASE)
LEAKS = re.compile(
    r"</?question>|</?person>|\b(?:given|rewritten|original|previous|above) (?:question|prompt|task|person)s?\b", re.I
)
SPECIAL = re.compile(r"<[|｜][^<>|｜\n]{1,40}[|｜]>")
EXAMPLES, OF_OWN, ASKED_FOR = 8, 2, 8  # questions shown, how many of them the teacher's own, questions asked for
DEEPEST = 4  # evolutions in a row
QUESTION, PEOPLE = "question", "person"  # what a request is to bring

_ALONE = (
    "It must make sense and be answerable on its own, in text, with everything needed in it. Write nothing else than "
    "the question, between <question> and </question>."
)

OPERATORS = {
    "constrain": "Make it harder by adding one requirement or condition that a good answer has to meet.",
    "deepen": "Make it harder by asking for a deeper understanding of the same matter.",
    "make_concrete": "Make it harder by putting specific, less common things in the place of general ones.",
    "more_steps": "Make it harder so that it can only be answered by reasoning in several steps where one was enough.",
    "complicate_input": "Make it harder by giving data to work on: a table, a piece of code, a formula or a document.",
    "mutate": "Write another question of the same field and about as hard, on something that is asked more rarely.",
}

WANTED = {
    "everyday": "something this person would ask an assistant in the course of a day",
    "reasoning": "a problem with one definite answer that takes several steps of reasoning, out of this person's life "
    "or work",
    "task": "a piece of work (to write, plan, explain, classify, translate, program) this person would hand over",
}


@dataclass(frozen=True, slots=True)
class Item:
    """A question of the pool: a seed's or a new one."""

    id: str
    text: str
    depth: int = 0  # evolutions behind it
    seed: bool = False


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody to ask in the name of."""

    id: str
    text: str


@dataclass(slots=True)
class Pool:
    """What there is to write from."""

    items: list[Item] = field(default_factory=list)
    people: list[Person] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Request:
    """What to put to the teacher, and where what it brings comes from."""

    messages: tuple[tuple[str, str], ...]  # (role, content)
    operator: str
    parents: tuple[str, ...] = ()
    depth: int = 0
    brings: str = QUESTION
    sample: int = 0  # of equal requests
    more: tuple[tuple[str, str], ...] = ()  # further provenance

    def rows(self) -> list[dict[str, Any]]:
        return [{"role": role, "content": content} for role, content in self.messages]


Stream = Callable[[Pool, int], Iterator[Request]]  # of a pool and a seed; ends when nothing more can be asked


def self_instruct(about: str | None) -> Stream:
    """Requests that show EXAMPLES questions, OF_OWN of them written before, and ask for ASKED_FOR."""

    def stream(pool: Pool, seed: int) -> Iterator[Request]:
        seeds = [item for item in pool.items if item.seed]
        own = [item for item in pool.items if not item.seed]
        number = 0
        while seeds:
            draw = random.Random(seed * 1_000_003 + number)
            number += 1
            some = draw.sample(own, min(OF_OWN, len(own)))
            shown = draw.sample(seeds, min(EXAMPLES - len(some), len(seeds))) + some
            draw.shuffle(shown)
            told = "\n".join(f"<question>{_bare(item.text)}</question>" for item in shown)
            text = (
                f"These are questions and tasks that people put to an assistant:\n\n{told}\n\nWrite {ASKED_FOR} new "
                f"ones{_about(about)}. Each must differ in kind or subject from those above and from each other, make "
                "sense and be answerable on its own, in text, without pictures or links. Vary length, wording and "
                "difficulty. Put each between <question> and </question> and write nothing else."
            )
            yield Request((("user", text),), "self_instruct", tuple(item.id for item in shown))

    return stream


def evolve(about: str | None) -> Stream:
    """Requests that apply an operator to a question of the pool, none twice."""

    def stream(pool: Pool, seed: int) -> Iterator[Request]:
        pairs = [(item, name) for item in pool.items if item.depth < DEEPEST for name in OPERATORS]
        random.Random(seed).shuffle(pairs)
        for item, name in pairs:
            text = (
                f"<question>{_bare(item.text)}</question>\n\n{OPERATORS[name]} Keep it{_about(about)} in the language "
                f"it is written in, and add no more than about 40 words. {_ALONE}"
            )
            yield Request((("user", text),), name, (item.id,), item.depth + 1)

    return stream


def persona(about: str | None) -> Stream:
    """Requests in the name of people: first those there are, then people to ask for, out of the pool and each other."""

    def stream(pool: Pool, seed: int) -> Iterator[Request]:
        pairs = [(person, name) for person in pool.people for name in WANTED]
        random.Random(seed).shuffle(pairs)
        for person, name in pairs:
            text = (
                f"This is a person:\n\n<person>{_bare(person.text)}</person>\n\nWrite {WANTED[name]}{_about(about)}. "
                f"Do not say who is asking. {_ALONE}"
            )
            yield Request((("user", text),), name, (person.id,), more=(("person", person.text),))
        for item in pool.items:
            if item.seed:
                text = (
                    f"<question>{_bare(item.text)}</question>\n\nWho is likely to ask this? Describe one such person "
                    "in a sentence or two: occupation, knowledge, what they are busy with. No names. Write only the "
                    "description, between <person> and </person>."
                )
                yield Request((("user", text),), "person_of_a_question", (item.id,), brings=PEOPLE)
        for person in pool.people:
            text = (
                f"<person>{_bare(person.text)}</person>\n\nDescribe in a sentence or two somebody of quite another "
                "occupation whom this person has to do with. No names. Write only the description, between <person> "
                "and </person>."
            )
            yield Request((("user", text),), "person_of_a_person", (person.id,), brings=PEOPLE)

    return stream


def nothing(prefix: str) -> Stream:
    """The same request again and again: what a template writes before the user's words."""

    def stream(pool: Pool, seed: int) -> Iterator[Request]:
        number = 0
        while True:
            yield Request((("raw", prefix),), "nothing", sample=number)
            number += 1

    return stream


def judgement(parent: str, text: str) -> Request:
    """What the teacher is asked of a question that was made out of another (after arXiv 2304.12244)."""
    told = (
        f"<question>{_bare(parent)}</question>\n\n<question>{_bare(text)}</question>\n\nThe second question was made "
        "out of the first. Does it ask for something else or for more, so that a good answer to the first would not "
        "do? And can it be answered on its own, in text, with what stands in it? Write nothing but yes or no for each, "
        "in this form: <changed>yes</changed> <answerable>yes</answerable>"
    )
    return Request((("user", told),), "judge")


def rejected(answer: str, finish: str) -> str:
    """Why the teacher rejects what it judged; "" where it does not."""
    said = {what.lower(): word.lower() for what, word in VERDICT.findall(answer.rpartition("</think>")[2])}
    if finish != "stop" or len(said) < 2:
        return "not judged"
    if said["answerable"] == "no":
        return "judged not to be answerable"
    return "judged to ask the same" if said["changed"] == "no" else ""


METHODS = ("self_instruct", "evolve", "persona", "nothing")


def read(request: Request, answer: str, finish: str, stops: Sequence[str] = ()) -> tuple[list[str], str]:
    """(the texts that an answer brings, why none). Thinking before an answer is passed over."""
    if finish != "stop":
        return [], "cut off"
    text = answer.rpartition("</think>")[2]
    if request.operator == "nothing":
        for stop in stops:
            text = text.partition(stop)[0]
        found = [text.strip()]
    else:
        found = [part.strip() for part in (PERSON if request.brings == PEOPLE else TAGGED).findall(text)]
    found = [part for part in found if part]
    return found, "" if found else f"no {request.brings} in the answer"


def unfit(text: str, fewest: int, most: int) -> str:
    """Why `text` is no question to keep, whatever the others say; "" when it may be."""
    words = len(WORD.findall(text))
    if words < fewest:
        return "too short"
    if words > most:
        return "too long"
    if SPECIAL.search(text):
        return "special token in it"
    return "speaks of its prompt" if LEAKS.search(text) else ""


def _about(about: str | None) -> str:
    return f" about {about}" if about else ""


def _bare(text: str) -> str:
    """Without tags that would end the place it stands in."""
    return re.sub(r"</?(?:question|person)>", "", text, flags=re.I).strip()
