"""Questions from a file, a task or a Hugging Face dataset, one at a time: a million of them fit in no memory.

A line of a .jsonl file (.gz too) is {"messages": [...]}, {"question": "..."} or {"prompt": "..."}, with "id", "system",
"gold" and "task" where there are any; a GSM8K line ("answer": "... #### 12") brings its own gold. A .txt file has a
question a line. A broken line is named, or skipped and counted when asked to.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from shoestring.core.errors import UserError, did_you_mean
from shoestring.core.nouns import Problem
from shoestring.core.registry import is_path, list_parts, load_part

LARGEST = 1 << 20  # bytes of one question: more is a mistake in the file far more often than a question
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(slots=True)
class Asked:
    """A question as it is put: messages as JSON values, the user's id, the problem behind it."""

    messages: list[dict[str, Any]]
    ref: str | None = None
    problem: dict[str, Any] | None = None
    line: int = 0


@dataclass(slots=True)
class Skipped:
    """What was left out of a file, counted, and the first reason."""

    count: int = 0
    first: str = ""


def source_of(
    questions: str,
    *,
    system: str | None = None,
    count: int | None = None,
    difficulty: int = 3,
    seed: int = 0,
    skipped: Skipped | None = None,
    largest: int = LARGEST,
) -> tuple[Callable[[], Iterator[Asked]], str]:
    """(a function that begins the questions anew, what identifies them). `skipped`: count bad lines, do not stop.

    Raises UserError for what is neither a file, a task nor "hf:NAME".
    """
    path = Path(questions)
    if questions.startswith("hf:"):
        return (lambda: _from_hub(questions, system, count)), f"{questions}|{system}|{count}"
    if path.is_file():
        status = path.stat()
        identity = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{system}|{count}"
        return (lambda: _limited(_from_file(path, system, skipped, largest), count)), identity
    parts = list_parts("tasks")
    if questions.replace("-", "_") in parts:
        if count is None:
            raise UserError(f"{questions} makes questions without end; say how many: --count 1000.")
        return (
            lambda: _from_task(questions, system, count, difficulty, seed)
        ), f"{questions}|{system}|{count}|{difficulty}|{seed}"
    raise UserError(f'There is no file and no task "{questions}".{did_you_mean(questions, parts)}')


def _limited(asked: Iterator[Asked], count: int | None) -> Iterator[Asked]:
    for number, one in enumerate(asked):
        if count is not None and number >= count:
            return
        yield one


def _from_file(path: Path, system: str | None, skipped: Skipped | None, largest: int) -> Iterator[Asked]:
    found = False
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # noqa: SIM115 (closed below)
    plain = path.name.removesuffix(".gz").endswith(".txt")
    with opened as file:
        number = 0
        while line := _next(file, largest, path, number):
            number += 1
            if not line.strip():
                continue
            try:
                if len(line) > largest:
                    while len(line) > largest and not line.endswith(b"\n"):  # the rest of it
                        line = file.readline(largest + 1)
                    raise UserError(f"is longer than {largest:,} bytes; shorten it, or raise --largest-question")
                yield _asked(line, plain, system, number)
                found = True
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                told = f"{path} line {number} {_why(error)}"
                if skipped is None:
                    raise UserError(f"{told}; mend it, or leave such lines out with --skip-bad.") from error
                skipped.count += 1
                skipped.first = skipped.first or told
    if not found:
        raise UserError(f'{path} holds no questions; each line is one, as in {{"question": "…"}}.')


def _next(file: IO[bytes] | gzip.GzipFile, largest: int, path: Path, number: int) -> bytes:
    try:
        return file.readline(largest + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} cannot be read beyond line {number} ({error}); mend the file.") from error


def _why(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON ({error.msg} at character {error.pos})"
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if isinstance(error, UnicodeEncodeError):
        return f"holds half a character (character {error.start} of its text)"
    if isinstance(error, ValueError):
        return f"holds a number that cannot be sent ({error})"
    return "has no messages, question or prompt"


def _asked(line: bytes, plain: bool, system: str | None, number: int) -> Asked:
    said = line.decode("utf-8-sig" if number == 1 else "utf-8")
    row = {"question": said.strip()} if plain else json.loads(said)
    if b"\\u" in line or b"N" in line:  # half a character, or NaN, Infinity: no teacher could read them
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    if not isinstance(row, dict):
        raise UserError("is no JSON object")
    messages = row.get("messages")
    text = None
    if messages is None:
        text = row.get("question") or row.get("prompt") or row.get("instruction")
        if not isinstance(text, str) or not text.strip():
            raise UserError("has no messages, question or prompt")
        messages = [{"role": "user", "content": text}]
    else:
        _check(messages)
    system = row.get("system") or system
    if system is not None and not isinstance(system, str):
        raise UserError("has a system prompt that is no text")
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    ref = row.get("id")
    return Asked(messages, None if ref is None else str(ref), _problem(row, text, number), number)


def _check(messages: Any) -> None:
    good = isinstance(messages, list) and messages and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str | list) for m in messages
    )  # fmt: skip
    if not good:
        raise UserError("has messages that are not a list of role and content")


def _problem(row: dict[str, Any], text: str | None, number: int) -> dict[str, Any] | None:
    """The verifiable problem behind a line that says its gold answer."""
    gold, task, answer = row.get("gold"), row.get("task"), row.get("answer")
    if gold is None and isinstance(answer, str) and "####" in answer and text is not None:
        gold, task = answer.rsplit("####", 1)[1].strip(), "gsm8k"
    if gold is None or task is None or text is None:
        return None
    if not isinstance(task, str) or is_path(task):  # a file of data must not name a file of code to be run
        raise UserError(f"names its task by {task!r}; it must be the name of one that is installed")
    version = load_part("tasks", task).VERSION
    digest = hashlib.sha256(json.dumps([task, version, text.strip(), str(gold)]).encode()).hexdigest()[:16]
    return asdict(Problem(task, version, digest, text.strip(), str(gold), 1, number, meta=row.get("meta") or {}))


def _from_task(task: str, system: str | None, count: int, difficulty: int, seed: int) -> Iterator[Asked]:
    module = load_part("tasks", task)
    draw, seen, tries = random.Random(seed), set[str](), 0
    while len(seen) < count:
        problem = module.make(draw.getrandbits(48), difficulty)
        tries += 1
        if problem.id in seen:
            if tries > 20 * count:
                raise UserError(
                    f"{task} has only about {len(seen)} questions of difficulty {difficulty}; ask for fewer."
                )
            continue
        seen.add(problem.id)
        messages = [{"role": "user", "content": problem.prompt}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        row = asdict(problem)
        row["voices"] = {}
        yield Asked(messages, problem.id, row, tries)


def _from_hub(name: str, system: str | None, count: int | None) -> Iterator[Asked]:
    """hf:NAME[:SPLIT[:COLUMN]], streamed."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise UserError("questions from the hub need the package datasets: pip install datasets.") from None
    _, dataset, *rest = name.split(":")
    split, column = (rest[0] if rest and rest[0] else "train"), (rest[1] if len(rest) > 1 else None)
    try:
        rows = load_dataset(dataset, split=split, streaming=True)
    except Exception as error:  # the package has an error of its own for each of a dozen mistakes
        raise UserError(f"{name} cannot be read ({str(error).splitlines()[0][:200]}); check name and split.") from error
    for number, row in enumerate(rows, 1):
        if count is not None and number > count:
            return
        if column and column not in row:
            raise UserError(f'{name}: there is no column "{column}".{did_you_mean(column, row)}')
        chosen = {"question": row[column]} if column else dict(row)
        try:
            yield _asked(json.dumps(chosen, default=str).encode(), False, system, number)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{name}: row {number} {_why(error)}.") from error
