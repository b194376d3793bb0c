"""Every mistake has its answer: a status, a field, a sentence; and the server goes on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

MESSAGES = [{"role": "user", "content": "3 + 8 ?"}]
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": MESSAGES, "max_tokens": 4} | fields


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "3 + 8", "max_tokens": 4} | fields


CASES = [  # (path, body, param, words)
    (CHAT, chat(temperature=-1), "temperature", "greater than or equal to 0"),
    (CHAT, chat(temperature="hot"), "temperature", "number"),
    (CHAT, chat(temperature=True), "temperature", "number"),
    (CHAT, chat(top_p=1.5), "top_p", "less than or equal to 1"),
    (CHAT, chat(n=0), "n", "greater than or equal to 1"),
    (CHAT, chat(n=1000), "n", "at most 16"),
    (CHAT, chat(messages=[]), "messages", "at least 1"),
    (CHAT, {"model": "tiny", "mesages": MESSAGES}, "messages", 'Did you mean "mesages"'),
    (CHAT, chat(messages=[{"role": "robot", "content": "a"}]), "messages.0.role", "'robot'"),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages", "send text"),
    (CHAT, chat(stop=["a"] * 17), "stop", "at most 16"),
    (CHAT, chat(stop=[""]), "stop", "empty"),
    (CHAT, chat(logit_bias={"a": 1}), "logit_bias", "token ids"),
    (CHAT, chat(logit_bias={"5": 101}), "logit_bias", "between -100 and 100"),
    (CHAT, chat(logit_bias={"99999": 1}), "logit_bias", "no token id"),
    (CHAT, chat(top_logprobs=3), "top_logprobs", "needs `logprobs: true`"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", "at most 20"),
    (CHAT, chat(functions=[{"name": "f"}]), "functions", "send `tools`"),
    (CHAT, chat(audio={"voice": "x"}), "audio", "not supported"),
    (CHAT, chat(priority=3), "priority", "not supported"),
    (CHAT, chat(guided_json={}), "guided_json", "response_format"),
    (CHAT, chat(tool_choice="required"), "tool_choice", "without `tools`"),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice={"type": "function",
     "function": {"name": "g"}}), "tool_choice", '"g"'),
    (CHAT, chat(response_format={"type": "json_schema"}), "response_format.json_schema", "without"),
    (CHAT, chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs", "names"),
    (CHAT, chat(max_tokens=0), "max_tokens", "at least 1"),
    (CHAT, chat(max_tokens=5000), "messages", "maximum context length is 2048 tokens"),
    (CHAT, chat(messages=[{"role": "user", "content": "3 " * 100_000}]), "messages", "shorten"),
    (CHAT, chat(logit_bias={"9" * 5000: 1}), "logit_bias", "token ids"),
    (CHAT, chat(structured_outputs={"choice": []}), "structured_outputs.choice", "at least one"),
    (CHAT, chat(structured_outputs={"json": "[" * 100_000}), None, "not JSON"),
    (CHAT, chat(structured_outputs={"json": {"type": "odd"}}), None, "json_schema cannot be"),
    (TEXT, text(structured_outputs={"regex": "(a?){5000}a{5000}"}, logit_bias={"5": -100, "6": -100}), None, "simpler"),
    (TEXT, text(repetition_penalty=1e-300), None, "repetition_penalty is 1e-300"),
    (TEXT, text(prompt=""), "prompt", "empty"),
    (TEXT, text(prompt=[]), "prompt", "0 prompts"),
    (TEXT, text(prompt=["a"] * 200), "prompt", "1 to 128"),
    (TEXT, text(prompt=[99999]), "prompt", "no tokens"),
    (TEXT, text(prompt=[-1]), "prompt", "no tokens"),
    (TEXT, text(prompt=["a", 3]), None, "prompt"),
    (TEXT, text(prompt={"a": 1}), None, "prompt"),
    (TEXT, text(stop_token_ids=[99999]), "stop_token_ids", "no token id"),
    (TEXT, text(best_of=3), "best_of", "send `n`"),
    (TEXT, text(suffix="x"), "suffix", "not supported"),
    (RESPONSES, {"model": "tiny", "input": "a", "previous_response_id": "r"}, "previous_response_id", "conversation"),
    (RESPONSES, {"model": "tiny", "input": [{"type": "image_generation_call"}]}, "input.0.type", "not supported"),
    (RESPONSES, {"model": "tiny", "input": [{"type": "reasoning", "content": 5}]}, "input.0.content", "list of parts"),
    (RESPONSES, {"model": "tiny", "input": [{"type": "reasoning", "content": [{"text": 5}]}]}, None, "with a text"),
    (RESPONSES, {"model": "tiny", "input": "a", "tools": [{"type": "web_search"}]}, "tools", "only functions"),
    ("/tokenize", {"model": "tiny"}, "prompt", "either"),
    ("/tokenize", {"model": "tiny", "messages": []}, "messages", "at least 1"),
    ("/detokenize", {"model": "tiny", "tokens": [99999]}, "tokens", "no tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "words"), CASES)
def test_mistakes(server: Any, path: str, body: dict[str, Any], param: str | None, words: str):
    answer = server.post(path, body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert words in error["message"], error
    assert param is None or error["param"] == param, error


def test_nan_is_named(server: Any):
    body = json.dumps(chat(temperature=float("nan"))).encode()
    answer = httpx.post(server.url + CHAT, verify=False, content=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "temperature"
    assert "NaN or infinite" in answer.json()["error"]["message"]


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "9" * 400 + ".5"])
def test_a_number_that_no_answer_could_repeat_is_refused_wherever_it_stands(server: Any, number: str):
    body = '{"model": "tiny", "input": "a", "max_output_tokens": 2, "metadata": {"a": [1, {"b": ' + number + "}]}}"
    answer = httpx.post(server.url + RESPONSES, verify=False, content=body.encode())
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "metadata.a.1.b"


@pytest.mark.parametrize(
    "name", ["turns", "tokenizer", "source", "specials", "ask", "continue_final", "self", "variables"]
)
def test_a_template_s_variables_may_have_any_name(server: Any, name: str):
    assert server.chat(temperature=0, chat_template_kwargs={name: 1}).json()["choices"] == server.chat(
        temperature=0
    ).json()["choices"]  # fmt: skip


@pytest.mark.parametrize("fields", [{"temperature": 1e-300}, {"temperature": 1e-40, "top_k": 3}])
def test_as_cold_as_can_be_is_greedy(server: Any, fields: dict[str, Any]):
    cold, greedy = (server.post(TEXT, text(max_tokens=8) | more).json() for more in (fields, {"temperature": 0}))
    assert cold["choices"][0]["text"] == greedy["choices"][0]["text"]


def test_arguments_of_a_call_that_are_no_json(server: Any):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[" * 1500}}
    turns = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    answer = server.post(CHAT, chat(messages=[*turns, {"role": "tool", "tool_call_id": "a", "content": "3"}]))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"text"', b'{"model": "tiny", "messages": "\xff\xfe"}', b'{"a": "\\ud800"}', b"\x00" * 50,
     b'{"a":' * 5000, b"[" * 100_000],
)  # fmt: skip
def test_what_is_no_json_object(server: Any, body: bytes):
    answer = httpx.post(server.url + CHAT, verify=False, content=body)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


def test_a_ten_megabyte_prompt(server: Any):
    answer = server.chat("3 " * 5_000_000)
    assert answer.status_code == 413 and "larger than" in answer.json()["error"]["message"]
    answer = server.chat("3 " * 3_000_000)  # within the limit of bytes, hopeless for the context
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_body_without_a_declared_length_is_cut_off_too(server: Any):
    answer = httpx.post(server.url + CHAT, verify=False, content=(b"x" * 65536 for _ in range(200)))
    assert answer.status_code == 413


def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch):
    """408, and never a wait without end: on the reading of bodies itself, with a shorter patience."""
    from shoestring.serve import app
    from shoestring.serve.errors import ApiError

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError("waited for too long")

    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    request = app.Request({"type": "http", "headers": [(b"content-length", b"50")]}, receive)
    with pytest.raises(ApiError) as error:
        asyncio.run(app._body(request, 1000))
    assert error.value.status == 408


def test_unknown_model_and_path(server: Any):
    answer = server.post(CHAT, chat(model="big"))
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert "tiny, dense" in answer.json()["error"]["message"] and answer.headers["x-should-retry"] == "false"
    assert server.post(CHAT, {"messages": MESSAGES}).json()["error"]["param"] == "model"
    assert server.get("/v1/nothing").json()["error"]["code"] == "unknown_path"
    assert server.get(CHAT).status_code == 405 and "error" in server.get(CHAT).json()


def test_unknown_fields_are_ignored(server: Any):
    answer = server.post(CHAT, chat(store=True, metadata={"a": "b"}, service_tier="auto", whatever=1, temperature=None))
    assert answer.status_code == 200


def test_request_ids(server: Any):
    assert server.chat(headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert server.chat(headers={"x-request-id": "a b\tc"}).headers["x-request-id"].startswith("req-")
    assert server.get("/v1/nothing").headers["x-request-id"].startswith("req-")


def test_no_cors_by_default(server: Any):
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = httpx.options(server.url + CHAT, verify=False, headers=headers)
    assert "access-control-allow-origin" not in answer.headers


def test_the_server_is_well_after_all_that(server: Any):
    assert server.get("/health").json()["status"] == "ok"
    assert server.chat().status_code == 200
