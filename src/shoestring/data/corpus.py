"""A corpus as one stream of token ids: documents from the textbook or from files, each closed by <|end|>.

The stream is made once for a (corpus, tokenizer, seed, length) and kept as a flat array on disk, read by memory map;
`rows` reads it in a seeded order that is a function of the step, so a resumed run needs no reader state.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shoestring.core.atomic import write_bytes
from shoestring.core.errors import UserError
from shoestring.data.textbook import MixEntry, solved
from shoestring.text.tokenizer import Tokenizer


def file_documents(files: tuple[str, ...]) -> Iterator[str]:
    """The documents of .txt files (whole files) and .jsonl files (field "text"). Raises UserError on a bad line."""
    for name in files:
        path = Path(name)
        if not path.exists():
            raise UserError(f"corpus file {name} does not exist.")
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8")
            continue
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    raise UserError(f'{name}, line {number}: expected a JSON object with a "text" field.') from None


def textbook_ids(mix: tuple[MixEntry, ...], long_share: float, seed: int, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Textbook documents as plain text with the thinking in its tags (no chat roles: those are taught by SFT)."""
    think, close, end = (tokenizer.id_of(t) for t in ("<think>", "</think>", "<|end|>"))
    for problem, voice in solved(mix, seed, long_share):
        solution = problem.voices[voice]
        yield [
            *tokenizer.encode(problem.prompt), think, *tokenizer.encode(solution.thinking), close,
            *tokenizer.encode(solution.answer), end,
        ]  # fmt: skip


def _take(documents: Iterator[list[int]], length: int, what: str) -> np.ndarray:
    stream = np.empty(length, np.int32)
    filled = 0
    for ids in documents:
        take = min(len(ids), length - filled)
        stream[filled : filled + take] = ids[:take]
        filled += take
        if filled == length:
            return stream
    if filled == 0:
        raise UserError(f"{what} holds no text.")
    return stream[:filled]


def make_stream(folder: Path, key: dict[str, object], documents: Iterator[list[int]], length: int) -> np.ndarray:
    """The first `length` tokens of `documents`, made once under `folder` and memory-mapped afterwards.

    `key` must say everything the stream depends on; the file is named by its hash.
    """
    digest = hashlib.sha256(json.dumps([key, length], sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"stream-{digest}.bin"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, _take(documents, length, f"corpus {key.get('corpus')}").tobytes())
    return np.memmap(path, dtype=np.int32, mode="r")


def rows(stream: np.ndarray, step: int, *, rows_per_step: int, row_tokens: int, seed: int) -> np.ndarray:
    """The rows [rows_per_step, row_tokens] of update `step`: a new seeded permutation of the stream's rows an epoch."""
    total = len(stream) // row_tokens
    if total < 1:
        raise UserError(f"the corpus has {len(stream)} tokens, less than one row of {row_tokens}; lower row_tokens.")
    out = np.empty((rows_per_step, row_tokens), np.int64)
    for i in range(rows_per_step):
        epoch, place = divmod(step * rows_per_step + i, total)
        row = _order(total, seed, epoch)[place]
        out[i] = stream[row * row_tokens : (row + 1) * row_tokens]
    return out


@functools.lru_cache(maxsize=2)
def _order(total: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((total, seed, epoch)).permutation(total)


def documents_of(stream: np.ndarray, end_id: int) -> np.ndarray:
    """(start, stop) of every whole document of the stream, [documents, 2]; each stops after its <|end|>."""
    stops = np.flatnonzero(np.asarray(stream) == end_id) + 1
    if not len(stops):
        raise UserError(f"no document of the corpus ends within its {len(stream)} tokens; raise corpus_tokens.")
    starts = np.concatenate([[0], stops[:-1]])
    return np.stack([starts, stops], axis=1)
