"""Traces in other forms: JSON lines (whole traces), chat (messages to train on), Parquet.

By the name's end: .jsonl, .chat.jsonl, .parquet. Written beside and renamed, so that half an export is never taken for
one. Rows go through one at a time; Parquet in groups of 10,000. Chat rows are {"messages": [...]} with the thinking as
`reasoning_content` of the assistant's turn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

from shoestring.core.atomic import check_place, disk_full, fsync_path, is_disk_full
from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.data.traces import TraceStore

GROUP = 10_000
FIELDS = tuple(field.name for field in fields(Trace))
JSON_COLUMNS = ("messages", "decoding", "usage", "source")  # nested values, as JSON text


def export(traces: Iterable[Trace] | str | Path, path: str | Path) -> int:
    """Write `traces` (or those of a store) to `path`; how many. Raises UserError for an unknown form."""
    path = check_name(Path(path))
    given = TraceStore(traces) if isinstance(traces, str | Path) else traces
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.name.endswith(".parquet"):
            count = _parquet(given, temporary)
        else:
            row = chat_row if path.name.endswith(".chat.jsonl") else _row
            count = 0
            with open(temporary, "w", encoding="utf-8") as file:
                for count, trace in enumerate(given, 1):  # noqa: B007 (the count is wanted)
                    file.write(json.dumps(row(trace)) + "\n")
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        if is_disk_full(error, path.parent):
            raise disk_full(path) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return count


def check_name(path: Path) -> Path:
    """The path itself. Raises UserError when its name says no form, or where no file can be written."""
    if not path.name.endswith((".jsonl", ".parquet")):
        raise UserError(f"{path}: traces are exported as .jsonl, .chat.jsonl or .parquet; name the file so.")
    return check_place(path)


def chat_row(trace: Trace) -> dict[str, Any]:
    """A trace as a conversation; that its answer was cut off stays said, or it would be taught to end there."""
    turn: dict[str, Any] = {"role": "assistant", "content": trace.answer}
    if trace.thinking is not None:
        turn["reasoning_content"] = trace.thinking
    row = {"messages": [*trace.messages, turn], "id": trace.id, "teacher": trace.teacher, "licence": trace.licence}
    return row if trace.finish_reason == "stop" else row | {"finish_reason": trace.finish_reason}


def _row(trace: Trace) -> dict[str, Any]:
    """As `Trace.to_dict`, but for the copying, which takes as long as all the rest."""
    return {name: getattr(trace, name) for name in FIELDS}


def _parquet(traces: Iterable[Trace], path: Path) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise UserError('Parquet needs pyarrow: pip install "shoestring[ask]".') from None
    text, whole = pa.string(), pa.int64()
    schema = pa.schema({
        "id": text, "teacher": text, "teacher_reported": text, "messages": text, "thinking": text, "answer": text,
        "prompt_ids": pa.list_(pa.int32()), "token_ids": pa.list_(pa.int32()), "finish_reason": text, "task": text,
        "problem_id": text, "correct": pa.bool_(), "decoding": text, "usage": text, "cost_usd": pa.float64(),
        "licence": text, "date": text, "schema": whole, "source": text,
    })  # fmt: skip
    stream, count = iter(traces), 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(stream, GROUP)):
            rows = [_row(trace) for trace in group]
            for row in rows:
                row |= {name: json.dumps(row[name]) for name in JSON_COLUMNS}
            writer.write_table(pa.Table.from_pylist(rows, schema))
            count += len(group)
    return count
