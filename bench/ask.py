"""Seconds to ask a local server 20,000 questions: ours against curator, distilabel and a bare loop.

    python bench/ask.py [--peers all|none|curator,distilabel] [--repeats N] [--latency 0.05] [--concurrency 64]
    python bench/ask.py --million        # one run of a million questions: memory, store, reopening, export

The server (tools/stub_api.py --plain) is a process of its own; "server's limit" is a client that sends ready-made bytes and
reads none of the answers' insides. The bare loop uses the client that ours uses (aiohttp), as its documentation shows it:
read the questions, post them, keep the answers in a list. Ours plans, journals with synchronous=FULL, holds a budget and
prices every answer. Requests at once are equal for all. Peers run in environments of their own, given by --curator-python
and --distilabel-python (bespokelabs-curator==0.1.31; distilabel[openai]==1.5.3 requests). Imports are not timed; the first
connection of each client is.
"""

# ruff: noqa: E501 (tables and settings)
from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from _bench import ROOT, Channel, Contestant, Failed, parser, peak_mb, result, spread, table, versions

PEERS = ("curator", "distilabel")
PEER_QUESTIONS = 2000  # theirs is timed on fewer, in steady state it is a rate all the same


def main() -> None:
    found = parser(__doc__ or "", repeats=3)
    found.set_defaults(warm_up=1)
    found.add_argument("--latency", type=float, action="append", help="seconds of the server (default: 0 and 0.05)")
    found.add_argument("--concurrency", type=int, default=64)
    found.add_argument("--questions", type=int, default=20_000)
    found.add_argument("--million", action="store_true")
    for peer in PEERS:
        found.add_argument(f"--{peer}-python", default=str(ROOT / f".venv-{peer}" / "bin" / "python"))
    options = found.parse_args()
    if options.serve:
        CONTESTANTS[options.serve](options.options)
        return
    if options.small:
        options.questions, options.repeats, options.warm_up = 300, 1, 0
    if options.million:
        print(json.dumps([million(1_000_000 if not options.small else 3000, options.concurrency)]))
        return
    peers = (
        [] if options.peers == "none" else [p for p in PEERS if options.peers == "all" or p in options.peers.split(",")]
    )
    print(json.dumps([compare(latency, options, peers) for latency in options.latency or (0.0, 0.05)]))


def compare(latency: float, options: Any, peers: list[str]) -> dict[str, Any]:
    """All contestants against one server, in turn."""
    with tempfile.TemporaryDirectory() as folder, serving(latency) as port:
        given = {"port": port, "folder": folder, "concurrency": options.concurrency, "questions": options.questions}
        write_questions(Path(folder) / "q.jsonl", options.questions)
        rates: dict[str, list[float]] = {}
        pythons = {"curator": options.curator_python, "distilabel": options.distilabel_python}
        for who in ("raw", "bare", "ours"):
            rates[who] = []
        reasons = {}
        for round_ in range(options.warm_up + options.repeats):
            for who in ("raw", "bare", "ours") if round_ % 2 == 0 else ("ours", "bare", "raw"):
                rate = once(who, sys.executable, given)
                if round_ >= options.warm_up:
                    rates[who].append(rate)
        for peer in peers:
            fewer = given | {"questions": min(PEER_QUESTIONS, options.questions)}
            try:
                rates[peer] = [
                    once(peer, pythons[peer], fewer) for _ in range(1 if options.small else options.repeats // 2 or 1)
                ]
            except Failed as reason:
                reasons[peer] = str(reason)
    rows = [[NAMES[who], spread(values, 0)] for who, values in rates.items()]
    rows += [[NAMES[who], reason] for who, reason in reasons.items()]
    print(f"\n{latency * 1000:.0f} ms, {options.concurrency} at once, answers a second, median [least, most]:\n")
    print(table(("", "answers/s"), rows), flush=True)
    per = {who: 1000 / statistics.median(values) for who, values in rates.items()}
    return result(
        f"ask, {latency * 1000:.0f} ms", "seconds for 1,000 answers", "s", per["ours"], {p: per[p] for p in peers if p in per},
        limit=per["bare"], versions=versions("shoestring", "aiohttp"), small=options.small, rates=rates, reasons=reasons,
        concurrency=options.concurrency, server_limit_s=per["raw"],
    )  # fmt: skip


NAMES = {
    "raw": "server's limit",
    "bare": "bare loop",
    "ours": "shoestring ask",
    "curator": "curator 0.1.31",
    "distilabel": "distilabel 1.5.3",
}


def once(who: str, python: str, given: Mapping[str, Any]) -> float:
    """Answers a second of one run in a fresh process."""
    contestant = Contestant(NAMES[who], Path(__file__), who, given, threads=1, python=python)
    with contestant:
        seconds = contestant.step()["seconds"]
    print(f"  {NAMES[who]}: {given['questions'] / seconds:,.0f}/s", file=sys.stderr, flush=True)
    return float(given["questions"] / seconds)


class serving:
    """The server in a process of its own; its port."""

    def __init__(self, latency: float) -> None:
        self._command = [sys.executable, str(ROOT / "tools" / "stub_api.py"), "--plain", "--latency", str(latency)]

    def __enter__(self) -> int:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def write_questions(path: Path, count: int) -> None:
    with open(path, "w") as file:
        for i in range(count):
            file.write(
                json.dumps(
                    {"question": f"What is {i} plus {i * 7}? " + "Think about it step by step. " * 5, "id": str(i)}
                )
                + "\n"
            )


# ---- contestants, each in a process of its own -----------------------------------------------------------------------


def timed(step: Callable[[], int], given: Mapping[str, Any]) -> None:
    """Run `step` once; it returns how many answers it has."""
    channel = Channel()
    channel.ready()
    while channel.ask() is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        answers = step()
        channel.answer(time.perf_counter() - wall, time.process_time() - cpu, answers=answers)
        assert answers == given["questions"], answers


def ours(given: Mapping[str, Any]) -> None:
    import aiohttp  # noqa: F401

    out = Path(tempfile.mkdtemp(dir=given["folder"]))
    job = job_of(given, out)

    def step() -> int:
        from shoestring.teachers._session import run

        return run(job).counts["answered"]

    timed(step, given)
    shutil.rmtree(out)


def job_of(given: Mapping[str, Any], out: Path) -> Any:
    from shoestring.data.claims import Budget
    from shoestring.data.questions import source_of
    from shoestring.teachers._job import Api
    from shoestring.teachers._session import Job

    api = Api(f"http://127.0.0.1:{given['port']}/v1", "stub", max_tokens=100, price="0.55,2.19,0.14", most=given["concurrency"],
              start=given["concurrency"])  # fmt: skip
    source, identity = source_of(str(Path(given["folder"]) / "q.jsonl"), count=given["questions"])
    return Job(out, source, identity, [api], budget=Budget(10**18))


def bare(given: Mapping[str, Any]) -> None:
    import aiohttp

    async def ask() -> int:
        answers: list[str] = []
        with open(Path(given["folder"]) / "q.jsonl") as file:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=given["concurrency"])) as session:

                async def work() -> None:
                    for line in file:
                        question = json.loads(line)["question"]
                        body = {"model": "stub", "max_tokens": 100, "messages": [{"role": "user", "content": question}]}
                        async with session.post(
                            f"http://127.0.0.1:{given['port']}/v1/chat/completions", json=body
                        ) as response:
                            document = await response.json()
                            answers.append(document["choices"][0]["message"]["content"])

                await asyncio.gather(*(work() for _ in range(given["concurrency"])))
        return len(answers)

    timed(lambda: asyncio.run(ask()), given)


def raw(given: Mapping[str, Any]) -> None:
    body = json.dumps({"model": "stub", "messages": [{"role": "user", "content": "x" * 170}]}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    async def ask() -> int:
        left, done, over = given["questions"], 0, asyncio.get_running_loop().create_future()

        class Client(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                self.transport = transport
                self.send()

            def send(self) -> None:
                nonlocal left
                if left > 0:
                    left -= 1
                    self.transport.write(request)

            def data_received(self, data: bytes) -> None:
                nonlocal done
                done += 1
                if done == given["questions"] and not over.done():
                    over.set_result(None)
                self.send()

        loop = asyncio.get_running_loop()
        for _ in range(given["concurrency"]):
            await loop.create_connection(Client, "127.0.0.1", given["port"])
        await over
        return done

    timed(lambda: asyncio.run(ask()), given)


def curator(given: Mapping[str, Any]) -> None:
    os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "TELEMETRY_ENABLED": "false", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "x",
                   "CURATOR_CACHE_DIR": tempfile.mkdtemp(dir=given["folder"]), "CURATOR_DISABLE_RICH_DISPLAY": "1"}  # fmt: skip
    import litellm

    os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(litellm.__file__).parent / "litellm_core_utils" / "tokenizers")
    from bespokelabs import curator as theirs

    class Asker(theirs.LLM):
        def prompt(self, row: dict[str, Any]) -> Any:
            return row["question"]

        def parse(self, row: dict[str, Any], response: Any) -> Any:
            return {"answer": response}

    asker = Asker(model_name="stub", backend="openai", generation_params={"max_tokens": 100}, backend_params={
        "base_url": f"http://127.0.0.1:{given['port']}/v1", "max_requests_per_minute": 10_000_000,
        "max_tokens_per_minute": 10_000_000_000, "max_concurrent_requests": given["concurrency"], "require_all_responses": False,
    })  # fmt: skip
    rows = read(given)

    def step() -> int:
        answers = asker(rows)
        return len(getattr(answers, "dataset", answers))

    timed(step, given)


def distilabel(given: Mapping[str, Any]) -> None:
    os.environ |= {
        "DISTILABEL_CACHE_DIR": tempfile.mkdtemp(dir=given["folder"]),
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": "x",
    }
    from distilabel.models import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts, StepResources
    from distilabel.steps.tasks import TextGeneration

    rows = [{"instruction": row["question"]} for row in read(given)]

    def step() -> int:
        with Pipeline(name="bench") as pipeline:
            load = LoadDataFromDicts(data=rows, batch_size=given["concurrency"])
            llm = OpenAILLM(model="stub", base_url=f"http://127.0.0.1:{given['port']}/v1", api_key="x")
            ask = TextGeneration(llm=llm, input_batch_size=given["concurrency"], resources=StepResources(replicas=1))
            load >> ask
        return len(pipeline.run(use_cache=False)["default"]["train"])

    timed(step, given)


def read(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    with open(Path(given["folder"]) / "q.jsonl") as file:
        return [json.loads(line) for line, _ in zip(file, range(given["questions"]), strict=False)]


CONTESTANTS = {"ours": ours, "bare": bare, "raw": raw, "curator": curator, "distilabel": distilabel}


# ---- the million -----------------------------------------------------------------------------------------------------


def million(count: int, concurrency: int) -> dict[str, Any]:
    """Ask `count` questions once; what memory, disk and time that takes, and what reopening and exporting take."""
    from shoestring.data.export import export
    from shoestring.teachers._session import run

    seen: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as folder, serving(0.0) as port:
        write_questions(Path(folder) / "q.jsonl", count)
        out = Path(folder) / "traces"
        job = job_of({"port": port, "folder": folder, "concurrency": concurrency, "questions": count}, out)
        start, cpu = time.perf_counter(), time.process_time()
        outcome = run(job, watch=lambda asking: seen.append((asking.told.answers, _rss_mb())))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        start = time.perf_counter()
        run(job)
        reopened = time.perf_counter() - start
        start, exported_cpu = time.perf_counter(), time.process_time()
        export(out, Path(folder) / "export.parquet")
        exported, exported_cpu = time.perf_counter() - start, time.process_time() - exported_cpu
        size = (out / "traces.db").stat().st_size
        early = [mb for answers, mb in seen if 0.05 * count < answers < 0.15 * count]
        late = [mb for answers, mb in seen if answers > 0.9 * count]
    facts = {
        "answers": outcome.counts["answered"], "seconds": seconds, "answers_per_s": count / seconds, "store_bytes": size,
        "bytes_per_answer": size / count, "reopen_s": reopened, "export_parquet_s": exported, "cpu_s": cpu,
        "export_cpu_s": exported_cpu, "peak_mb": peak_mb(),
        "mb_after_a_tenth": statistics.median(early) if early else None, "mb_at_the_end": statistics.median(late) if late else None,
    }  # fmt: skip
    print(table(("", ""), [[name, f"{value:,.1f}" if value else "-"] for name, value in facts.items()]))
    return result(
        "ask a million",
        "seconds",
        "s",
        seconds,
        {},
        versions=versions("shoestring", "aiohttp"),
        small=count < 10**6,
        **facts,
    )


def _rss_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
