"""Near-duplicates and decontamination of a million synthetic traces: minutes, memory, recall of planted pairs.

    python bench/curate.py [--traces 1000000] [--words 120] [--small] [--store postgresql://…#new_name]

The traces are made from a vocabulary of 30,000 words drawn by Zipf's law; one in twenty is an earlier one with words
replaced, in runs, so that the Jaccard similarity of its runs of 5 words, computed exactly from the two texts, is spread from
0.5 to 1; one in a thousand holds a question of the evaluation sets. Recall is over the planted pairs of exact similarity 0.8
and more; false alarms are unplanted traces that were dropped. There is no peer: datatrove and the like run the same
algorithm as a pipeline of files.
"""

# ruff: noqa: E501 (a table)
from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _bench import peak_mb, result, table, versions

from shoestring.curate._sieve import Filter, run
from shoestring.data.claims import Answer, Claim, Planned, Settled
from shoestring.data.export import export
from shoestring.data.places import AnyStore
from shoestring.data.postgres import PgStore
from shoestring.data.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="all", help="accepted for uniformity; there is none")
    parser.add_argument("--repeats", type=int, default=1, help="accepted for uniformity; it runs once")
    parser.add_argument("--traces", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=120, help="mean words of an answer")
    parser.add_argument(
        "--store", help="the address of a PostgreSQL database, for a store there instead of in a folder"
    )
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    count = 3000 if options.small else options.traces
    with tempfile.TemporaryDirectory() as folder:
        evals = Path(folder) / "eval.txt"
        start = time.perf_counter()
        store = PgStore(options.store, create=True) if options.store else Store(Path(folder) / "traces", create=True)
        planted, leaked = fill(store, count, options.words, evals)
        print(f"made {count:,} traces in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        filters = [Filter("decontaminate", {"against": str(evals)}), Filter("near_duplicates")]
        seconds, cpu = [], []
        for upto in (1, 2):
            start, before = time.perf_counter(), time.process_time()
            steps, view = run(store, filters[:upto], grade=False)
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - before)
            print(
                f"{filters[upto - 1].name}: {seconds[-1]:.0f} s, {dict(steps[-1].dropped)}", file=sys.stderr, flush=True
            )
        start, before = time.perf_counter(), time.process_time()
        export(view, Path(folder) / "kept.parquet")
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - before)
        dropped = [
            {row for (row,) in store.sql.execute("SELECT row FROM marks WHERE filter = ?", (number,)).fetchall()}
            for number in view.ids
        ]
        store.close()
    close = {row for row, similarity in planted.items() if similarity >= 0.8} - dropped[0]
    near = {row for row, similarity in planted.items() if similarity < 0.8}
    facts = {
        "decontaminate_s": seconds[0], "near_duplicates_s": seconds[1], "export_parquet_s": seconds[2],
        "decontaminate_cpu_s": cpu[0], "near_duplicates_cpu_s": cpu[1], "export_cpu_s": cpu[2], "peak_mb": peak_mb(), "planted_at_0.8": len(close),
        "recall_at_0.8": len(close & dropped[1]) / max(1, len(close)), "planted_below_0.8": len(near),
        "of_them_dropped": len(near & dropped[1]), "false_alarms": len(dropped[1] - set(planted) - leaked),
        "leaked": len(leaked), "leaked_found": len(leaked & dropped[0]), "false_leaks": len(dropped[0] - leaked),
    }  # fmt: skip
    print(
        table(
            ("", ""),
            [[name, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"] for name, value in facts.items()],
        )
    )
    print(json.dumps([result("curate", f"seconds for {count:,} traces", "s", sum(seconds[:2]), {}, limit=600.0 * count / 1e6,
                             versions=versions("shoestring", "rensa", "numpy"), small=count < 1_000_000, **facts)]))  # fmt: skip


def fill(store: AnyStore, count: int, words: int, evals: Path) -> tuple[dict[int, float], set[int]]:
    """Make the store; row -> exact similarity of planted repeats, and the rows that hold an evaluation question."""
    rng, draw = np.random.default_rng(0), random.Random(0)
    vocabulary = ["".join(draw.choices("etaoinshrdlucmfwygpbvk", k=draw.randrange(3, 9))) for _ in range(30_000)]
    weights = 1 / np.arange(1, len(vocabulary) + 1)
    sets = [" ".join(vocabulary[i] for i in rng.choice(len(vocabulary), 40)) for _ in range(1300)]
    evals.write_text("\n".join(sets))
    planted: dict[int, float] = {}
    leaked: set[int] = set()
    recent: list[str] = []
    row = 0
    for start in range(0, count, 5000):
        size = min(5000, count - start)
        lengths = rng.integers(words // 2, words * 3 // 2, size)
        flat = rng.choice(len(vocabulary), int(lengths.sum()), p=weights / weights.sum())
        texts, place = [], 0
        for i, length in enumerate(lengths):
            row += 1
            text = " ".join(vocabulary[j] for j in flat[place : place + length])
            place += length
            if i % 20 == 19 and recent:
                old = draw.choice(recent)
                text = edited(old, draw, vocabulary)
                planted[row] = similarity(f"q\n{old}", f"q\n{text}")
            elif i % 1000 == 500:
                words_ = text.split()
                text = " ".join([*words_[:20], draw.choice(sets), *words_[20:]])
                leaked.add(row)
            elif len(recent) < 50_000:
                recent.append(text)
            texts.append(text)
        keep(store, texts, start)
    return planted, leaked


def edited(text: str, draw: random.Random, vocabulary: list[str]) -> str:
    """The text with up to a tenth of its words replaced, in one to three runs."""
    words = text.split()
    left = int(len(words) * draw.random() * 0.12)
    for _ in range(draw.randrange(1, 4)):
        length, place = max(0, left // 2 or left), draw.randrange(len(words))
        words[place : place + length] = draw.choices(vocabulary, k=length)
        left -= length
    return " ".join(words)


def similarity(one: str, two: str) -> float:
    a, b = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (one.split(), two.split()))
    return len(a & b) / len(a | b)


def keep(store: AnyStore, texts: list[str], start: int) -> None:
    """Put answers into the store as `ask` does. All ask "q": the answers are what differs."""
    planned = [
        Planned("q", '[{"content":"q","role":"user"}]', None, None, [f"{start + i:016x}" for i in range(len(texts))])
    ]
    how = store.how("h", {"teacher": "t", "licence": "MIT", "decoding": {}})
    store.plan(planned, how, 1)
    rows = [start + i + 1 for i in range(len(texts))]
    claims = [Claim((row,), 0, 0) for row in rows]
    store.apply(claims)
    store.apply([
        Settled(claim, [Answer(row, "stop", 20, 40, 0, "2026-01-01", json.dumps({"answer": text}))], (), 0, 60)
        for claim, row, text in zip(claims, rows, texts, strict=True)
    ])  # fmt: skip


if __name__ == "__main__":
    main()
