"""Putting a round of requests to a teacher: over HTTP, to a checkpoint in this process, or to recorded answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from shoestring.core.contracts import Teacher
from shoestring.core.errors import UserError
from shoestring.core.nouns import Sampling, Trace
from shoestring.curate._synthesis import Ask, Asked
from shoestring.curate._writing import Request
from shoestring.data.claims import Budget
from shoestring.data.questions import Asked as Question
from shoestring.data.schema import file_of, open_file
from shoestring.data.traces import TraceIds, canonical, stored, texts
from shoestring.teachers._job import Api
from shoestring.teachers._lane import Told
from shoestring.teachers._local import decoding_of, run_local
from shoestring.teachers._session import Job, Outcome, run
from shoestring.text.chat import user_opening
from shoestring.text.tokenizer import Tokenizer

TOGETHER = 500  # traces looked up in one statement

OPENINGS = {  # what published templates write before the user's words, and after them
    "chatml": ("<|im_start|>user\n", "<|im_end|>"),
    "llama3": ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "deepseek": ("<｜begin▁of▁sentence｜><｜User｜>", "<｜Assistant｜>"),
}


def opening_of(template: str, system: str | None) -> tuple[str, str, tuple[int, ...]]:
    """(what stands before the user's words, what ends them, the ids of that) for a name of OPENINGS or the folder of a
    tokenizer. Raises UserError."""
    if template in OPENINGS:
        if system:
            raise UserError(f"--system needs the tokenizer's own template: --template FOLDER, not {template}.")
        return *OPENINGS[template], ()
    if not Path(template).exists():
        raise UserError(
            f'"{template}" is neither a folder with a tokenizer nor one of {", ".join(OPENINGS)}; or give --prefix.'
        )
    tokenizer = Tokenizer.load(template)
    before, after = user_opening(tokenizer, system)
    return before, after, (tokenizer.specials[after],) if after in tokenizer.specials else ()


def over_http(out: Path, apis: Sequence[Api], budget: Budget, *, retry_failed: bool = False, quiet: bool = True) -> Ask:
    """Asks `apis` within `budget`, over the life of the store in `out`."""

    def put(questions: list[Question], samples: int, identity: str) -> Outcome:
        job = Job(out, lambda: iter(questions), identity, apis, samples, budget, retry_failed=retry_failed, quiet=quiet)
        return run(job)

    return _asker(out, [TraceIds(api.title, api.asked) for api in apis], put)


def in_process(out: Path, teacher: Teacher, sampling: Sampling, *, quiet: bool = True) -> Ask:
    """Asks a checkpoint's engine, or recorded answers."""

    def put(questions: list[Question], samples: int, identity: str) -> Outcome:
        return run_local(out, teacher, lambda: iter(questions), identity, samples, sampling, quiet=quiet)

    return _asker(out, [TraceIds(teacher.name, decoding_of(sampling))], put)


def _asker(out: Path, ids: Sequence[TraceIds], put: Callable[[list[Question], int, str], Outcome]) -> Ask:
    def ask(requests: Sequence[Request]) -> Asked:
        wanted = _wanted(requests, ids)
        found, told = _found(out, wanted), Told()
        if len(found) < len(requests):
            rows = {canonical(request.rows()): request.rows() for request in requests}
            samples = max(request.sample for request in requests) + 1
            identity = hashlib.sha256("\n".join(rows).encode("utf-8", "surrogatepass")).hexdigest()
            told = put([Question(row, line=i) for i, row in enumerate(rows.values(), 1)], samples, identity).told
            found = _found(out, wanted)
        return Asked(found, told)

    return ask


def _wanted(requests: Sequence[Request], ids: Sequence[TraceIds]) -> dict[str, int]:
    """Trace id -> place of its request, for every teacher that may have been drawn."""
    samples: dict[str, int] = {}
    escaped = [texts(request.rows())[0] for request in requests]
    for text, request in zip(escaped, requests, strict=True):
        samples[text] = max(samples.get(text, 0), request.sample + 1)
    known = {text: [one.of(text, count) for one in ids] for text, count in samples.items()}
    return {
        traces[request.sample]: place
        for place, (text, request) in enumerate(zip(escaped, requests, strict=True)) for traces in known[text]
    }  # fmt: skip


def _found(out: Path, wanted: dict[str, int]) -> dict[int, Trace]:
    """Place of a request -> its trace, of those that are in the store."""
    if not file_of(out).is_file():
        return {}
    base = open_file(file_of(out), create=False, writable=False)
    try:
        found: dict[int, Trace] = {}
        for some in _chunks(list(wanted)):
            marks = ",".join(f"'{trace}'" for trace in some)
            for _, trace in stored(base, where=f"AND a.row IN (SELECT id FROM rows WHERE trace IN ({marks}))"):
                found.setdefault(wanted[trace.id], trace)
        return found
    finally:
        base.close()


def _chunks(items: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(items), TOGETHER):
        yield items[start : start + TOGETHER]


def questions_of(source: Iterable[Question]) -> Iterator[tuple[str | None, str]]:
    """(id, text) of questions as `ask` reads them: what the user says last."""
    for one in source:
        content = one.messages[-1].get("content")
        if isinstance(content, str) and content.strip():
            yield one.ref, content.strip()
