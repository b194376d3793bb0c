"""Traces in other forms: JSON lines (whole traces), chat (messages to train on), Parquet; and the data card.

By the name's end: .jsonl, .chat.jsonl, .parquet. Written beside and renamed, so that half an export is never taken for
one. Rows go through one at a time; Parquet in groups of 10,000. Chat rows are {"messages": [...]} with the thinking as
`reasoning_content` of the assistant's turn.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from shoestring.core.atomic import write_text
from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.data.traces import TraceStore

GROUP = 10_000
JSON_COLUMNS = ("messages", "decoding", "usage", "source")  # nested values, as JSON text


def export(traces: Iterable[Trace] | str | Path, path: str | Path) -> int:
    """Write `traces` (or those of a store) to `path`; how many. Raises UserError for an unknown form."""
    path = Path(path)
    given = TraceStore(traces) if isinstance(traces, str | Path) else traces
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.name.endswith(".parquet"):
            count = _parquet(given, temporary)
        elif path.name.endswith(".jsonl"):
            row = chat_row if path.name.endswith(".chat.jsonl") else Trace.to_dict
            count = 0
            with open(temporary, "w", encoding="utf-8") as file:
                for count, trace in enumerate(given, 1):  # noqa: B007 (the count is wanted)
                    file.write(json.dumps(row(trace)) + "\n")
        else:
            raise UserError(f"{path}: traces are exported as .jsonl, .chat.jsonl or .parquet; name the file so.")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def chat_row(trace: Trace) -> dict[str, Any]:
    """A trace as a conversation."""
    turn: dict[str, Any] = {"role": "assistant", "content": trace.answer}
    if trace.thinking is not None:
        turn["reasoning_content"] = trace.thinking
    return {"messages": [*trace.messages, turn], "id": trace.id, "teacher": trace.teacher, "licence": trace.licence}


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
            rows = [trace.to_dict() for trace in group]
            for row in rows:
                row |= {name: json.dumps(row[name]) for name in JSON_COLUMNS}
            writer.write_table(pa.Table.from_pylist(rows, schema))
            count += len(group)
    return count


def read_parquet(path: str | Path) -> Iterator[Trace]:
    """The traces of an export."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(GROUP):
            for row in batch.to_pylist():
                yield Trace.from_dict(row | {name: json.loads(row[name]) for name in JSON_COLUMNS})


def write_card(
    traces: Iterable[Trace], path: Path, *, funnel: Sequence[dict[str, Any]] = (), title: str = "Traces"
) -> Path:
    """A Markdown card of a set: whose answers, under which terms, how they were asked for, what was dropped and why."""
    teachers, licences, terms, reported = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    decodings, finishes, tasks, verdicts = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    usd, tokens, dates = 0.0, [0, 0], ["9999", "0000"]
    count = 0
    for trace in traces:
        count += 1
        teachers[trace.teacher] += 1
        reported[trace.teacher_reported] += 1
        licences[trace.licence] += 1
        source = trace.source
        terms[" ".join(str(source[k]) for k in ("terms", "permission") if source.get(k)) or "not recorded"] += 1
        decodings[json.dumps({k: v for k, v in trace.decoding.items() if k != "sample"}, sort_keys=True)] += 1
        finishes[trace.finish_reason] += 1
        tasks[trace.task or "none"] += 1
        verdicts[{True: "right", False: "wrong", None: "not graded"}[trace.correct]] += 1
        usd += trace.cost_usd
        tokens = [tokens[0] + trace.usage.get("prompt_tokens", 0), tokens[1] + trace.usage.get("completion_tokens", 0)]
        dates = [min(dates[0], trace.date), max(dates[1], trace.date)]
    lines = [f"# {title}", "", f"{count:,} traces, {tokens[0]:,} tokens in, {tokens[1]:,} out, ${usd:,.4f}."]
    if count:
        lines += [f"Answered from {dates[0][:10]} to {dates[1][:10]}.", ""]
    for head, counts in (
        ("Teacher", teachers), ("Model that answered", reported), ("Licence of the answers", licences),
        ("Terms on record", terms), ("Decoding", decodings), ("Finish", finishes), ("Task", tasks),
        ("Verdict", verdicts),
    ):  # fmt: skip
        lines += [f"## {head}", "", *(f"- {name}: {number:,}" for name, number in counts.most_common(20)), ""]
    if funnel:
        lines += ["## Dropped", "", "| filter | seen | kept | dropped because |", "|---|---|---|---|"]
        for step in funnel:
            why = ", ".join(f"{reason} {number:,}" for reason, number in step["dropped"].items()) or "-"
            lines.append(f"| {step['filter']} {step['options'] or ''} | {step['seen']:,} | {step['kept']:,} | {why} |")
    return write_text(path, "\n".join(lines) + "\n")
