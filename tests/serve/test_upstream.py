"""Keys, metering and hooks in front of another server; and what happens when that one misbehaves."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from waiting import eventually

from shoestring.serve.errors import ApiError
from shoestring.serve.hooks import Call
from shoestring.serve.keys import Key, KeyStore
from shoestring.serve.limits import Account
from shoestring.serve.meter import Meter
from shoestring.serve.settings import ServeConfig, UpstreamSpec
from shoestring.serve.upstream import Upstream
from shoestring.text.tokenizer import Tokenizer

CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "odd"}


class Odd(BaseHTTPRequestHandler):
    """A provider that does what the question tells it to."""

    protocol_version = "HTTP/1.1"
    seen: list[dict[str, Any]] = []
    left = threading.Event()
    woken = threading.Event()

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/dripping"):
            self._dripping({"stream": False})
            return
        self._json(200, {"object": "list", "data": [{"id": "odd", "object": "model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            self._json(404, {"detail": "Not Found"})
            return
        self.seen.append(asked | {"key": self.headers.get("authorization")})
        getattr(self, f"_{asked['messages'][-1]['content']}")(asked)

    def _json(self, status: int, document: Any, **headers: str) -> None:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()

    def _say(self, text: str) -> None:
        chunk = CHUNK | {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def _fine(self, asked: dict[str, Any]) -> None:
        usage = {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 4},
        }
        if not asked.get("stream"):
            message = {"role": "assistant", "content": "all of it"}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            self._json(
                200, {"id": "c", "object": "chat.completion", "model": "odd", "choices": choices, "usage": usage}
            )
            return
        self._begin()
        self.wfile.write(b": ping\r\n\r\n")
        for word in ("all ", "of ", "it"):
            self._say(word)
        if asked["stream_options"]["include_usage"]:
            self.wfile.write(f"data: {json.dumps(CHUNK | {'choices': [], 'usage': usage})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _half(self, asked: dict[str, Any]) -> None:
        if asked.get("stream"):
            self._begin()
            self._say("all ")
            self.wfile.write(b'data: {"id": "c", "cho')
        else:
            self.send_response(200)
            self.send_header("content-length", "500")
            self.end_headers()
            self.wfile.write(b'{"id": "c", "choices": [')
        self.close_connection = True

    def _endless(self, asked: dict[str, Any]) -> None:
        self._begin()
        try:
            while True:
                self._say("on ")
                time.sleep(0.02)
        except OSError:
            self.left.set()

    def _dripping(self, asked: dict[str, Any]) -> None:
        """Never so silent that a reader loses patience, and never done."""
        if asked.get("stream"):
            self._begin()
        else:
            self.send_response(200)
            self.send_header("connection", "close")
            self.end_headers()
        try:
            while not self.woken.wait(0.02):
                self.wfile.write(b":" if asked.get("stream") else b" ")
        except OSError:
            self.left.set()

    def _nonsense(self, asked: dict[str, Any]) -> None:
        self._json(200, b"<html>hello</html>")

    def _busy(self, asked: dict[str, Any]) -> None:
        self._json(429, {"error": {"message": "slow down", "code": "slow"}}, retry_after="7")

    def _broken(self, asked: dict[str, Any]) -> None:
        self._json(500, {"error": {"message": "boom"}})

    def _refused(self, asked: dict[str, Any]) -> None:
        self._json(401, {"error": {"message": "bad key sk-upstream"}})

    def _mistaken(self, asked: dict[str, Any]) -> None:
        self._json(400, {"error": {"message": "top_k is odd", "code": "odd"}})

    def _moved(self, asked: dict[str, Any]) -> None:
        self._json(302, b"", location="http://127.0.0.1:9/")

    def _empty(self, asked: dict[str, Any]) -> None:
        self.send_response(204)
        self.end_headers()

    def _later(self, asked: dict[str, Any]) -> None:
        self._json(503, {"error": "full"}, retry_after=formatdate(time.time() + 50, usegmt=True))

    def _deep(self, asked: dict[str, Any]) -> None:
        self._odd_shape(asked, b"[" * 100_000)

    def _counts(self, asked: dict[str, Any]) -> None:
        usage = b'{"prompt_tokens": -5000000, "completion_tokens": Infinity, "prompt_tokens_details": "all"}'
        self._odd_shape(asked, b'{"choices": [{"index": null, "finish_reason": "stop"}], "usage": %s}' % usage)

    def _parts(self, asked: dict[str, Any]) -> None:
        said = b'{"index": null, "message": "hi", "delta": ["a"], "finish_reason": "stop"}'
        self._odd_shape(asked, b'{"choices": [%s]}' % said)

    def _odd_shape(self, asked: dict[str, Any], data: bytes) -> None:
        if not asked.get("stream"):
            self._json(200, data)
            return
        self._begin()
        self._say("all ")
        self.wfile.write(b"data: " + data + b"\n\ndata: [DONE]\n\n")

    def _uncounted(self, asked: dict[str, Any]) -> None:
        message = {"role": "assistant", "content": "thirty characters are ten of t", "reasoning_content": None}
        if not asked.get("stream"):
            self._json(200, {"model": "odd", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
            return
        self._begin()
        self._say(message["content"] or "")
        self.wfile.write(b"data: [DONE]\n\n")

    def _silent(self, asked: dict[str, Any]) -> None:
        self.woken.wait(60)


@pytest.fixture(scope="module")
def odd() -> Iterator[str]:
    provider = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    thread = threading.Thread(target=provider.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{provider.server_address[1]}/v1"
    Odd.woken.set()
    provider.shutdown()
    provider.server_close()


HOOK = """
from shoestring.serve.errors import ApiError
def before(call):
    if "forbidden" in str(call.raw):
        raise ApiError(403, "not this", code="hooked")
async def after(call, outcome):
    with open(__file__ + ".log", "a") as file:
        print(call.endpoint, call.key.name, outcome.status, "|".join(outcome.texts), file=file)
"""


@pytest.fixture(scope="module")
def front(start: Any, odd: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("front")
    (folder / "hook.py").write_text(HOOK)
    (folder / "key.txt").write_text("sk-upstream\n")
    store = folder / "keys.db"
    KeyStore(store).close()
    more = ["--upstream-key-file", str(folder / "key.txt"), "--hook", str(folder / "hook.py"), "--require-keys",
            "--price", "1,0.1,10"]  # fmt: skip
    with start("--upstream", odd, *more, folder=folder, store=store) as running:
        yield running


@pytest.fixture
def ask(front: Any) -> Callable[..., Any]:
    store = KeyStore(front.store)
    secret, key = store.create(f"key-{time.monotonic_ns()}")

    def asked(text: str, **fields: Any) -> Any:
        return front.chat(text, key=secret, model="odd", **fields)

    asked.key, asked.spent = key, lambda: store.find(key.id).spent_usd  # type: ignore[attr-defined]
    asked.secret = secret  # type: ignore[attr-defined]
    return asked


def events(text: str) -> list[Any]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_models_are_those_of_the_upstream(front: Any, ask: Any):
    answer = front.get("/v1/models", headers={"authorization": f"Bearer {ask.secret}"})
    assert [card["id"] for card in answer.json()["data"]] == ["odd"]
    one = front.get("/v1/models/odd", headers={"authorization": f"Bearer {ask.secret}"})
    assert one.status_code == 200 and one.json()["id"] == "odd"
    assert ask("fine", model2=1).status_code == 200
    assert Odd.seen[-1]["key"] == "Bearer sk-upstream" and Odd.seen[-1]["model2"] == 1


def test_whole_and_billed(ask: Any):
    answer = ask("fine").json()
    assert answer["choices"][0]["message"]["content"] == "all of it"
    assert answer["usage"]["cost_usd"] == pytest.approx(3e-6 + 0.4e-6 + 30e-6)
    assert eventually(lambda: ask.spent() == pytest.approx(33.4e-6))


@pytest.mark.parametrize("shown", [False, True])
def test_streamed_and_billed(ask: Any, shown: bool):
    more = {"stream_options": {"include_usage": True}} if shown else {}
    found = events(ask("fine", stream=True, **more).text)
    assert found[-1] == "[DONE]"
    assert "".join(c["choices"][0]["delta"]["content"] for c in found[:-1] if c["choices"]) == "all of it"
    assert (found[-2]["choices"] == []) is shown and ("usage" in found[-2]) is shown
    assert eventually(lambda: ask.spent() == pytest.approx(33.4e-6))


def test_half_an_answer_is_never_a_whole_one(ask: Any):
    found = events(ask("half", stream=True).text)
    assert found[0]["choices"][0]["delta"]["content"] == "all "
    assert found[1]["error"]["type"] == "upstream_error" and found[2] == "[DONE]"
    answer = ask("half")
    assert answer.status_code == 502 and "error" in answer.json()


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [("nonsense", 502, "not whole JSON"), ("busy", 429, "slow down"), ("broken", 502, "boom"), ("mistaken", 400, "odd"),
     ("refused", 502, "refuses this server's key")],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(ask: Any, text: str, status: int, words: str, stream: bool):
    answer = ask(text, stream=stream)
    if text == "nonsense" and stream:
        assert "error" in events(answer.text)[0]
        return
    assert answer.status_code == status and words in answer.json()["error"]["message"]
    assert "sk-upstream" not in answer.text
    assert (answer.headers.get("retry-after") == "7") is (text == "busy")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["moved", "empty", "deep", "counts", "parts"])
def test_what_is_no_answer_is_502_whatever_it_is(ask: Any, text: str, stream: bool):
    """A redirect, nothing at all, JSON of another shape: and nobody's credit grows by it."""
    answer = ask(text, stream=stream)
    if stream and text not in ("moved", "empty"):
        found = events(answer.text)
        assert found[0]["choices"][0]["delta"]["content"] == "all "
        assert found[1]["error"]["type"] == "upstream_error" and found[2:] == ["[DONE]"]
    else:
        assert answer.status_code == 502 and answer.json()["error"]["type"] == "upstream_error"
    assert ask.spent() >= 0


def test_what_limits_a_request_is_read_the_same_there_and_here(front: Any, ask: Any):
    """ "50" is 50 to a lenient upstream: what is reserved, and what a key's flags allow, would not be what is made."""
    for more in ({"n": "50"}, {"n": 5.0}, {"n": True}, {"max_tokens": "9999"}, {"best_of": [3]}, {"max_tokens": -1}):
        answer = ask("fine", **more)
        assert answer.status_code == 400 and answer.json()["error"]["param"] in more, more
    store = KeyStore(front.store)
    few = store.create(f"few-{time.monotonic_ns()}", flags={"logprobs": False, "max_n": 2}, credit_usd=0.1)[0]
    for more in ({"best_of": 3}, {"n": 3}, {"logprobs": 0}, {"prompt_logprobs": 1}):
        assert front.chat("fine", key=few, model="odd", **more).status_code == 403, more
    body = {"model": "odd", "prompt": ["a"] * 300, "max_tokens": 100, "messages": [{"role": "user", "content": "fine"}]}
    answer = front.post("/v1/completions", body, headers={"authorization": f"Bearer {few}"})
    assert answer.status_code == 402  # 300 answers of 100 tokens at 10 dollars a million


def test_an_upstream_s_date_to_come_back_is_passed_on(ask: Any):
    answer = ask("later")
    assert answer.status_code == 503 and 30 <= int(answer.headers["retry-after"]) <= 50


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_usage_is_not_free(ask: Any, stream: bool):
    assert ask("uncounted", stream=stream).status_code == 200
    assert eventually(lambda: ask.spent() > 10 * 10e-6)  # ten tokens of answer, and some of prompt


def test_an_upstream_that_says_nothing(start: Any, odd: str, tmp_path: Path):
    """Only this server is impatient: on a busy machine any answer may take a second."""
    with start("--upstream", odd, "--set", "upstream.seconds=1", folder=tmp_path) as running:
        for stream in (False, True):
            answer = running.chat("silent", model="odd", stream=stream)
            assert answer.status_code == 504 and "too long" in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def hurried(start: Any, odd: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server that gives an answer two seconds in all."""
    with start("--upstream", odd, "--set", "request_seconds=2", folder=tmp_path_factory.mktemp("hurried")) as running:
        yield running


@pytest.mark.parametrize("text", ["endless", "dripping"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_without_an_end_gets_one(hurried: Any, text: str, stream: bool):
    """Something comes all the time, so no read is ever late: the whole has a time of its own."""
    Odd.left.clear()
    began = time.monotonic()
    answer = hurried.chat(text, model="odd", stream=stream)
    assert 1.5 < time.monotonic() - began < 40
    if stream:
        *_, error, done = events(answer.text)
        assert done == "[DONE]"
    else:
        assert answer.status_code == 504
        error = answer.json()
    assert error["error"]["code"] == "request_timeout" and "took longer than 2 s" in error["error"]["message"]
    assert Odd.left.wait(60)


def test_a_list_of_models_without_an_end(odd: str, monkeypatch: pytest.MonkeyPatch):
    """It is given up as a whole, so that nobody who asks for a model waits behind it; the list there was stays."""
    import asyncio

    from shoestring.serve import upstream
    from shoestring.serve.settings import ServeConfig, UpstreamSpec

    monkeypatch.setattr(upstream, "LIST_PATIENCE", 0.5)
    spec = UpstreamSpec(url=odd.replace("/v1", "/dripping/v1"))

    async def refresh() -> list[Any]:
        found = upstream.Upstream(spec, ServeConfig(upstream=spec), None)  # type: ignore[arg-type]
        found.models = [{"id": "known"}]
        await asyncio.wait_for(found.refresh(), 30)
        await found.stop()
        return found.models

    assert asyncio.run(refresh()) == [{"id": "known"}]


def test_more_than_was_asked_for_is_broken_off(ask: Any):
    """An upstream that ignores `max_tokens` would spend what nobody reserved."""
    Odd.left.clear()
    *said, error, done = events(ask("endless", stream=True, max_tokens=8).text)
    assert done == "[DONE]" and "more than it was asked for" in error["error"]["message"]
    assert 8 < len(said) < 8 * 2 + 300 and Odd.left.wait(60)
    assert eventually(lambda: ask.spent() > 0)


def test_an_answer_larger_than_any_is_broken_off():
    """By the bytes that came, whatever they say."""
    import asyncio

    import httpx

    from shoestring.serve.errors import ApiError
    from shoestring.serve.upstream_wire import Most, events

    async def endless() -> Any:
        while True:
            yield b": ping\n\n" * 1000

    async def read() -> int:
        count = 0
        async for _ in events(
            httpx.Response(200, content=endless()), Most(asyncio.get_running_loop().time() + 60, 10**6, None)
        ):
            count += 1
        return count

    with pytest.raises(ApiError, match="larger than 1000000 bytes"):
        asyncio.run(read())


def test_a_client_that_leaves_is_told_to_the_upstream(front: Any, ask: Any):
    Odd.left.clear()
    body = {"model": "odd", "stream": True, "messages": [{"role": "user", "content": "endless"}]}
    headers = {"authorization": f"Bearer {ask.secret}"}
    with front.stream(body, headers=headers) as answer:
        kept = answer.iter_lines()
        next(kept)
    assert Odd.left.wait(60)
    assert eventually(lambda: ask.spent() > 0)  # what was seen is billed


def test_hooks_see_and_refuse(front: Any, ask: Any, tmp_path: Path):
    count = len(Odd.seen)
    answer = ask("forbidden")
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "hooked" and len(Odd.seen) == count
    ask("fine")
    log = front.store.parent / "hook.py.log"
    wanted = f"/v1/chat/completions {ask.key.name} 200 all of it"
    assert eventually(lambda: wanted in log.read_text())


def test_an_upstream_that_is_not_there(start: Any, tmp_path: Path):
    with start("--upstream", "http://127.0.0.1:9/v1", folder=tmp_path) as running:
        answer = running.chat(model="any")
        assert answer.status_code == 502 and answer.json()["error"]["code"] == "upstream_unreachable"


def test_one_of_ours_behind_another(start: Any, server: Any, tokenizer: Tokenizer, tmp_path: Path):
    with start("--upstream", f"{server.url}/v1", folder=tmp_path) as running:
        direct = server.chat(temperature=0).json()["choices"]
        assert running.chat(temperature=0).json()["choices"] == direct
        on = {str(tokenizer.end_id): -100}  # an answer that does not end by itself
        body = {"model": "tiny", "input": "3 + 8 ?", "max_output_tokens": 5, "stream": True, "logit_bias": on}
        assert "response.incomplete" in running.post("/v1/responses", body).text
        body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 3, "stream": True}
        assert running.post("/v1/completions", body).text.endswith("data: [DONE]\n\n")


def test_tokens_of_an_upstream_s_model_are_the_upstream_s(
    start: Any, server: Any, tokenizer: Tokenizer, tmp_path: Path
):
    """So that lm-eval, whose tokenizer is a server's, works through this one; keys hold here too."""
    store = tmp_path / "keys.db"
    keys = KeyStore(store)
    free, bound = keys.create("free")[0], keys.create("bound", models=["dense"])[0]
    with start("--upstream", f"{server.url}/v1", "--require-keys", folder=tmp_path, store=store) as running:

        def post(path: str, body: Any, key: str = free) -> Any:
            return running.post(path, body, headers={"authorization": f"Bearer {key}"})

        chat = {"messages": [{"role": "user", "content": "3 + 8 ?"}]}
        for body in ({"prompt": "<|end|>3 + 8"}, chat):
            for named in ({"model": "tiny"}, {"model": "tiny", "return_token_strs": True}):
                assert post("/tokenize", named | body).json() == server.post("/tokenize", named | body).json()
        ids = tokenizer.encode("quick brown fox")
        assert post("/detokenize", {"model": "tiny", "tokens": ids}).json() == {"prompt": "quick brown fox"}
        head = {"authorization": f"Bearer {free}"}
        info = running.get("/tokenizer_info?model=tiny", headers=head).json()
        assert info == server.get("/tokenizer_info?model=tiny").json()
        assert post("/tokenize", {"model": "nobody", "prompt": "x"}).status_code == 404
        assert post("/tokenize", {"model": "tiny", "prompt": "x"}, bound).status_code == 403
        assert post("/tokenize", {"prompt": "x"}, bound).status_code == 400
        assert post("/tokenize", {"model": "dense", "prompt": "x"}, bound).status_code == 200
        assert running.post("/tokenize", {"model": "tiny", "prompt": "x"}).status_code == 401
        refused = post("/tokenize", {"model": "tiny", "prompt": "x", "messages": chat["messages"]})
        assert refused.status_code == 400 and "either `prompt` or `messages`" in refused.json()["error"]["message"]


def test_an_upstream_without_a_tokenizer_to_ask(front: Any, ask: Any):
    head = {"authorization": f"Bearer {ask.secret}"}
    answer = front.post("/tokenize", {"model": "odd", "prompt": "x"}, headers=head)
    assert answer.status_code == 404 and "has no /tokenize" in answer.json()["error"]["message"]


def answered(answer: httpx.Response) -> tuple[Upstream, Call, Account]:
    """An upstream that answers so, without a network."""
    config = ServeConfig(upstream=UpstreamSpec(url="http://far/v1", key="sk-secret-1"))
    assert config.upstream is not None
    upstream = Upstream(config.upstream, config, Meter(config))
    upstream._client = httpx.AsyncClient(
        transport=httpx.MockTransport(lambda _: answer), headers=upstream._client.headers
    )
    account = Account(Key(id="k", hash="h", shown="s", name="ann", credit_usd=1.0, concurrency=1))
    return upstream, Call("r", "/v1/chat/completions", "odd", account.key, None, "c", {}), account


def test_a_stream_that_nobody_begins_to_read_gives_its_place_back():
    """Its generator has not run: without a first step, closing it would run nothing of it."""
    upstream, call, account = answered(httpx.Response(200, content=b"data: [DONE]\n\n"))
    call.stream = True

    async def leave() -> None:
        reply = await upstream.complete(call.endpoint, {"model": "odd", "stream": True, "messages": []}, call, account)
        assert (upstream.running, account.running) == (1, 1)
        await reply.frames.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert (upstream.running, account.running) == (0, 0)


@pytest.mark.parametrize("status", [400, 401])
def test_a_key_that_an_upstream_repeats_goes_nowhere(status: int, caplog: pytest.LogCaptureFixture):
    said = httpx.Response(status, json={"error": {"message": "wrong key sk-secret-1 here"}})
    upstream, call, account = answered(said)
    with pytest.raises(ApiError) as error:
        asyncio.run(upstream.complete(call.endpoint, {"model": "odd", "messages": []}, call, account))
    assert "sk-secret-1" not in str(error.value.body()) + caplog.text


def test_what_is_not_latin_is_not_billed_by_its_escapes():
    answer = {"choices": [{"message": {"content": "一二三"}, "finish_reason": "stop"}]}
    upstream, call, account = answered(httpx.Response(200, json=answer))
    body = {"model": "odd", "messages": [{"role": "user", "content": "汉" * 300}]}
    asyncio.run(upstream.complete(call.endpoint, body, call, account))
    assert 100 <= call.tally.prompt <= 130 and call.tally.completion == 1
