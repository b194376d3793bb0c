"""A server that speaks the OpenAI-compatible wire, counts what it is asked, and misbehaves on request.

`python tools/stub_api.py --port 0 [--latency S] [--remember] [--plain]` prints its port and serves until killed.
GET /stats tells the counts. `--hold-after N`: questions after the N-th wait for their answers until GET /release.
`--plain` is for benchmarks: it reads no question and answers at once. `--remember` honours
Idempotency-Key: a key it has seen is answered again and not billed again. A question that begins with "!word" (see
`FAULTS`) is answered accordingly; "!word*3 ..." the first three times only. The answer to a question is a function of
it and of the seed, so that stored answers can be checked. `--invent` writes questions or people between
tags as it is asked to, with repeats, refusals and answers cut off among them; on /v1/completions, without tags.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
from collections import Counter
from typing import Any

HTML = b"<!doctype html><html><body>502 Bad Gateway</body></html>"
FAULTS: dict[str, tuple[int, bytes, str]] = {  # word -> status, body, headers
    "html": (200, HTML, ""),
    "nothing": (200, b"", ""),
    "half": (200, b'{"id": "x", "choices": [{"message": {"content": "ha', ""),
    "error200": (200, b'{"error": {"message": "upstream failed", "type": "server_error"}}', ""),
    "redirect": (307, b"", "Location: https://elsewhere.example/v1\r\n"),
    "badrequest": (400, b'{"error": {"message": "no such parameter", "code": "bad"}}', ""),
    "notfound": (404, b'{"error": {"message": "the model does not exist"}}', ""),
    "badkey": (401, b'{"error": {"message": "Incorrect API key"}}', ""),
    "nocredit": (402, b'{"error": {"message": "Insufficient Balance"}}', ""),
    "quota": (429, b'{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}', ""),
    "busy": (429, b'{"error": {"message": "slow down"}}', "Retry-After: 0.2\r\n"),
    "overloaded": (503, b'{"error": {"message": "overloaded"}}', ""),
    "emptytext": (200, b'{"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}', ""),
}
COUNTS = {"wrongcounts": {"prompt_tokens": -5, "completion_tokens": "many"}, "nocounts": None,
          "hugecounts": {"prompt_tokens": 20, "completion_tokens": 10_000_000}}  # fmt: skip


PLAIN_BODY = (
    b'{"id":"chatcmpl-%08d","object":"chat.completion","created":1,"model":"stub","choices":[{"index":0,"message":{"role":'
    b'"assistant","content":"answer %08d ' + b"word " * 40 + b'"},"finish_reason":"stop"}],"usage":{"prompt_tokens":20,'
    b'"completion_tokens":40,"total_tokens":60}}'
)
PLAIN_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(
    PLAIN_BODY % (0, 0)
)


class Stub:
    """The counts, and what each question is answered."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.asked: Counter[str] = Counter()  # by question and sample
        self.faults: Counter[str] = Counter()
        self.seen: dict[str, asyncio.Future[bytes]] = {}
        self.counts: Counter[str] = Counter()
        self.now = 0
        self.files: dict[str, bytes] = {}
        self.batches: list[dict[str, Any]] = []
        self.heard = 0
        self.released = asyncio.Event()

    async def batch(self, path: str, body: bytes) -> Any:
        """What /v1/files and /v1/batches answer."""
        name = path.split("?")[0].removeprefix("/v1/")
        if name == "files":
            start = body.index(b"\r\n\r\n", body.index(b"filename=")) + 4
            self.files[f"file-{len(self.files)}"] = body[start : body.index(b"\r\n--", start)]
            return {"id": f"file-{len(self.files) - 1}"}
        if name.startswith("files/"):
            return self.files[name.split("/")[1]]
        if name == "batches" and body:
            made = json.loads(body)
            self.counts["batches"] += 1
            self.batches.append({**made, "id": f"batch-{len(self.batches)}", "status": "in_progress"})
            return self.batches[-1]
        if name == "batches":
            return {"data": self.batches}
        batch = next(batch for batch in self.batches if batch["id"] == name.split("/")[1])
        batch["looks"] = batch.get("looks", 0) + 1
        if batch["looks"] == 2:
            await self._do(batch)
        return batch

    async def _do(self, batch: dict[str, Any]) -> None:
        """Answer a batch's rows, last first; failed ones into the error file, "!expires" ones nowhere at first."""
        good, bad = b"", b""
        for line in reversed(self.files[batch["input_file_id"]].splitlines()):
            row = json.loads(line)
            text = str(row["body"]["messages"][-1]["content"])
            if text.startswith("!expires") and not self.faults[text]:
                self.faults[text] += 1
                continue
            head, _, content = (await self._fresh(row["body"])).partition(b"\r\n\r\n")
            status = int(head.split(b" ")[1])
            result = {"custom_id": row["custom_id"], "response": {"status_code": status, "body": json.loads(content)}}
            if status == 200:
                good += json.dumps(result).encode() + b"\n"
            else:
                bad += json.dumps(result).encode() + b"\n"
        for field, data in (("output_file_id", good), ("error_file_id", bad)):
            if data:
                batch[field] = f"file-{len(self.files)}"
                self.files[batch[field]] = data
        batch["status"] = "completed"

    def stats(self) -> dict[str, Any]:
        return {**self.counts, "questions": len(self.asked), "most_of_one": max(self.asked.values(), default=0)}

    async def answer(self, request: dict[str, Any], key: str | None) -> bytes:
        """The whole HTTP reply."""
        self.counts["requests"] += 1
        self.now += 1
        self.counts["most_at_once"] = max(self.counts["most_at_once"], self.now)
        try:
            if self.options.remember and key:
                if key in self.seen:
                    self.counts["replayed"] += 1
                    return await asyncio.shield(self.seen[key])
                future = self.seen[key] = asyncio.get_running_loop().create_future()
                future.set_result(await self._fresh(request))
                return future.result()
            return await self._fresh(request)
        finally:
            self.now -= 1

    async def _fresh(self, request: dict[str, Any]) -> bytes:
        text = str(request["messages"][-1]["content"])
        self.heard += 1
        if self.options.hold_after is not None and self.heard > self.options.hold_after:
            await self.released.wait()
        if self.options.latency:
            await asyncio.sleep(self.options.latency)
        word, times = _fault(text)
        if word and self.faults[text] < times:
            self.faults[text] += 1
            if word in FAULTS:
                status, body, more = FAULTS[word]
                return reply(status, body, more)
        else:
            word = ""
        word = word or ("invent" if self.options.invent else "")
        self.counts["billed"] += 1
        self.asked[json.dumps([request["messages"], request.get("seed")])] += 1
        return completion(request, text, word)


def _fault(text: str) -> tuple[str, int]:
    if not text.startswith("!"):
        return "", 0
    word, _, times = text[1:].split(" ", 1)[0].partition("*")
    return word, int(times or 1 << 30)


def said(text: str, seed: int | None, choice: int = 0) -> str:
    """The answer to a question."""
    return f"answer {hashlib.sha256(f'{text}|{seed}|{choice}'.encode()).hexdigest()[:12]} " + "word " * 40


def completion(request: dict[str, Any], text: str, word: str) -> bytes:
    """The reply with an answer in it."""
    count = 1 if word == "onechoice" else int(request.get("n") or 1)
    usage: Any = {"prompt_tokens": 20, "completion_tokens": 40 * count, "prompt_tokens_details": {"cached_tokens": 5}}
    usage = COUNTS.get(word, usage)
    finish = {"length": "length", "filtered": "content_filter"}.get(word, "stop")
    choices: list[dict[str, Any]] = [
        {"index": i, "finish_reason": finish, "message": _message(request, text, i, word)} for i in range(count)
    ]
    if word == "invent":
        choices = [{"index": 0, **invented(request, text)}]
    model = "another-model" if word == "other" else request["model"]
    document = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": model, "choices": choices,
                "usage": usage, "system_fingerprint": "fp_1"}  # fmt: skip
    if request.get("stream"):
        return stream(document, word)
    if request["messages"][0]["role"] == "raw":
        for choice in choices:
            choice["text"] = choice.pop("message")["content"]
    more = "x-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: 300ms\r\n" if word == "exhausted" else ""
    return reply(200, json.dumps(document).encode(), more)


WORDS = [a + b for a in ("ba", "ko", "li", "mu", "ne", "pri", "sta", "tor", "ve", "zu") for b in "bdfgklmnprst"]


def invented(request: dict[str, Any], text: str) -> dict[str, Any]:
    """The message and finish of an answer that invents; one in ten is a repeat, a refusal, or cut off."""
    draw = random.Random(f"{text}|{request.get('seed')}")
    kind = draw.randrange(10)

    def question() -> str:
        return f"What is the {' '.join(draw.choices(WORDS, k=14))}?"

    if request["messages"][0]["role"] == "raw":
        said = "What is always the same question here?" if kind == 0 else question() + "<|im_end|>"
    elif kind == 1:
        said = "I'm sorry, but I can't help with that."
    elif "<answerable>" in text:
        words = ["no" if draw.random() < share else "yes" for share in (0.2, 0.1)]
        said = f"<changed>{words[0]}</changed> <answerable>{words[1]}</answerable>"
    elif "between <person>" in text:
        said = f"<person>A {' '.join(draw.choices(WORDS, k=8))}.</person>"
    else:
        many = 8 if "Write 8 new" in text else 1
        same = "<question>What is always the same question here?</question>"
        said = "\n".join(same if draw.random() < 0.1 else f"<question>{question()}</question>" for _ in range(many))
    return {"finish_reason": "length" if kind == 2 else "stop", "message": {"role": "assistant", "content": said}}


def _message(request: dict[str, Any], text: str, choice: int, word: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said(text, request.get("seed"), choice)}
    if word in ("deepseek", "vllm"):
        message["reasoning_content" if word == "deepseek" else "reasoning"] = f"thinking of {text}"
    if word == "length":
        message |= {"content": None, "reasoning_content": "cut off inside"}
    return message


def stream(document: dict[str, Any], word: str) -> bytes:
    """The same as server-sent events, with a keep-alive; "broken": without its end."""
    same = {key: document[key] for key in ("id", "model", "system_fingerprint")}
    events: list[Any] = [{**same, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
    for choice in document["choices"]:
        message, index = choice["message"], choice["index"]
        for field in ("reasoning_content", "reasoning", "content"):
            whole = message.get(field) or ""
            pieces = [whole[i : i + 7] for i in range(0, len(whole), 7)]
            events += [{**same, "choices": [{"index": index, "delta": {field: piece}}]} for piece in pieces]
        events.append({**same, "choices": [{"index": index, "delta": {}, "finish_reason": choice["finish_reason"]}]})
    events.append({**same, "choices": [], "usage": document["usage"]})
    data = b": keep-alive\n\n" + b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events)
    data += b"" if word == "broken" else b"data: [DONE]\n\n"
    return reply(200, data, "", "text/event-stream")


def reply(status: int, body: bytes, more: str = "", kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, as much of it as clients need."""

    def __init__(self, stub: Stub) -> None:
        self.stub, self.buffer = stub, b""
        self.tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].decode("latin-1")
            headers = {
                name.lower(): value.strip() for name, _, value in (h.partition(":") for h in head.split("\r\n")[1:])
            }
            length = int(headers.get("content-length", 0))
            if len(self.buffer) < end + 4 + length:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + length], self.buffer[end + 4 + length :]
            path = head.split(" ", 2)[1]
            if path.startswith(("/v1/files", "/v1/batches")):
                task = asyncio.get_running_loop().create_task(self.batch(path, body))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
                continue
            if self.stub.options.plain and head.startswith("POST"):
                self.plain(body)
                continue
            if head.startswith("GET"):
                if path == "/release":
                    self.stub.released.set()
                self.transport.write(reply(200, json.dumps(self.stub.stats()).encode()))
                continue
            asked = json.loads(body)
            if path == "/v1/completions":
                asked["messages"] = [{"role": "raw", "content": asked["prompt"]}]
            task = asyncio.get_running_loop().create_task(self.put(asked, headers.get("idempotency-key")))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def plain(self, body: bytes) -> None:
        """Nothing read, everything answered alike but for a number: as fast as this can be, for benchmarks."""
        self.stub.counts["requests"] += 1
        number = self.stub.counts["requests"]
        if b'"messages": []' in body or b'"messages":[]' in body:
            self.transport.write(reply(400, b'{"error": {"message": "no messages"}}'))
            return
        data = PLAIN_HEAD + PLAIN_BODY % (number, number)
        if self.stub.options.latency:
            asyncio.get_running_loop().call_later(self.stub.options.latency, self.transport.write, data)
        else:
            self.transport.write(data)

    async def batch(self, path: str, body: bytes) -> None:
        """Files and batches: one is done when it has been looked at twice."""
        found = await self.stub.batch(path, body)
        self.transport.write(reply(200, found if isinstance(found, bytes) else json.dumps(found).encode()))

    async def put(self, request: dict[str, Any], key: str | None) -> None:
        text = str(request["messages"][-1]["content"])
        word, times = _fault(text)
        if word in ("reset", "endless", "blanks", "hang") and self.stub.faults[text] < times:
            self.stub.faults[text] += 1
            self.stub.counts["requests"] += 1
            await self.misbehave(word)
            return
        self.transport.write(await self.stub.answer(request, key))

    async def misbehave(self, word: str) -> None:
        """Close without a word; or send for ever: text, or blank lines; or nothing at all."""
        if word == "reset":
            self.transport.abort()
            return
        if word != "hang":
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
        piece = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n" if word == "endless" else b"1\r\n\n\r\n"
        while not self.transport.is_closing():
            if word != "hang":
                self.transport.write(piece)
            await asyncio.sleep(0.01)


async def serve(options: argparse.Namespace) -> None:
    stub = Stub(options)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(stub), "127.0.0.1", options.port, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--hold-after", type=int)
    parser.add_argument("--remember", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--invent", action="store_true")
    asyncio.run(serve(parser.parse_args()))
