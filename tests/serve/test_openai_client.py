"""The official client against a real server: what it sends is understood, what it reads is there."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from shoestring.text.tokenizer import Tokenizer

openai = pytest.importorskip("openai")
QUESTION = [{"role": "user", "content": "last digit of 3 + 8 + 4 ?"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two digits.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2, 3]}, "b": {"enum": [4, 5]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def terse(tokenizer: Tokenizer) -> dict[str, Any]:
    """Fields that keep a model of random weights from thinking, and from filling its JSON with white space."""
    pytest.importorskip("llguidance")
    blank = [index for index in range(tokenizer.vocab_size) if tokenizer.decode([index]).isspace()]
    banned = [*blank, tokenizer.specials["<think>"]]  # "none" asks for no thinking; a model may open it all the same
    return {"reasoning_effort": "none", "logit_bias": {str(index): -100 for index in banned}, "max_tokens": 120}


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_models(client: Any):
    assert [model.id for model in client.models.list()] == ["tiny", "dense"]
    assert client.models.retrieve("tiny").max_model_len == 2048
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("big")
    assert error.value.code == "model_not_found"


def test_chat(client: Any):
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=12, temperature=0)
    choice = answer.choices[0]
    assert choice.finish_reason in ("stop", "length") and choice.message.role == "assistant"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == 12 or choice.finish_reason == "stop"
    assert usage.prompt_tokens_details.cached_tokens >= 0 and usage.completion_tokens_details.reasoning_tokens >= 0
    assert answer._request_id.startswith("req-")


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_whole_answer_in_pieces(client: Any, n: int):
    fields = {"model": "tiny", "messages": QUESTION, "max_tokens": 24, "seed": 5, "n": n}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    for index in range(n):
        deltas = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert deltas[0].delta.role == "assistant" and deltas[-1].finish_reason == whole.choices[index].finish_reason
        assert all(delta.finish_reason is None for delta in deltas[:-1])
        said = "".join(delta.delta.content or "" for delta in deltas)
        assert said == (whole.choices[index].message.content or "")
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_no_usage_unless_asked(client: Any):
    chunks = list(client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=3, stream=True))
    assert all(chunk.choices for chunk in chunks)


def test_continuous_usage(client: Any):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            max_tokens=5,
            stream=True,
            stream_options=options,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 5


def test_logprobs(client: Any, tokenizer: Tokenizer):
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=10, temperature=0, logprobs=True, top_logprobs=4
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        best = [top.logprob for top in entry.top_logprobs]
        assert len(best) == 4 and best == sorted(best, reverse=True) and entry.logprob == best[0] <= 0
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
    said = b"".join(bytes(entry.bytes) for entry in entries)
    if answer.choices[0].finish_reason == "length":
        assert said.decode("utf-8", "replace").startswith((answer.choices[0].message.content or "")[:4])


def test_streamed_logprobs_are_those_of_the_whole(client: Any):
    fields = {"model": "tiny", "messages": QUESTION, "max_tokens": 16, "seed": 1, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**fields).choices[0].logprobs.content
    chunks = client.chat.completions.create(**fields, stream=True)
    pieces = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert [(e.token, round(e.logprob, 4)) for e in pieces] == [(e.token, round(e.logprob, 4)) for e in whole]


def test_stop_strings(client: Any):
    fields = {"model": "tiny", "messages": QUESTION, "max_tokens": 40, "seed": 3}
    free = client.chat.completions.create(**fields).choices[0].message.content
    place = next(i for i in range(2, len(free) - 3) if free[i : i + 2] not in free[: i + 1])
    stop = free[place : place + 2]
    cut = client.chat.completions.create(**fields, stop=[stop])
    assert cut.choices[0].message.content == free[:place] and cut.choices[0].finish_reason == "stop"
    pieces = client.chat.completions.create(**fields, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == free[:place]


def test_json_schema(client: Any, terse: dict[str, Any]):
    schema = {
        "type": "object",
        "properties": {"digit": {"enum": [1, 2, 3]}, "sure": {"type": "boolean"}},
        "required": ["digit", "sure"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, response_format=wanted, **terse)
    found = json.loads(answer.choices[0].message.content)
    assert found["digit"] in (1, 2, 3) and isinstance(found["sure"], bool)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_tool_that_must_be_called(client: Any, choice: Any, terse: dict[str, Any]):
    fields = {"model": "tiny", "messages": QUESTION, "tools": [ADD], "tool_choice": choice, "seed": 2} | terse
    answer = client.chat.completions.create(**fields)
    call = answer.choices[0].message.tool_calls[0]
    assert call.type == "function" and call.function.name == "add" and call.id.startswith("call_")
    assert json.loads(call.function.arguments)["a"] in (1, 2, 3)
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
    with client.chat.completions.stream(**fields) as stream:
        final = stream.get_final_completion()
    assert json.loads(final.choices[0].message.tool_calls[0].function.arguments)["b"] in (4, 5)


def test_a_conversation_with_tools_and_thinking_goes_on(client: Any):
    messages = [
        {"role": "developer", "content": "be brief"},
        *QUESTION,
        {"role": "assistant", "content": None, "reasoning_content": "3 + 8",
         "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
        {"role": "assistant", "content": "5", "reasoning": "so"},
        {"role": "user", "content": [{"type": "text", "text": "and of 4 + 9 ?"}]},
    ]  # fmt: skip
    answer = client.chat.completions.create(model="tiny", messages=messages, tools=[ADD], max_tokens=4)
    assert answer.usage.prompt_tokens > 60


def test_thinking_switch(client: Any):
    base = {"model": "tiny", "messages": QUESTION, "max_tokens": 6, "temperature": 0}
    plain = client.chat.completions.create(**base).usage.prompt_tokens
    off = client.chat.completions.create(**base, reasoning_effort="none")
    on = client.chat.completions.create(**base, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    also = client.chat.completions.create(**base, extra_body={"thinking": {"type": "enabled"}})
    counts = [answer.usage.prompt_tokens - plain for answer in (off, on, also)]
    assert counts == [2, 1, 1]
    assert on.choices[0].message.content is None and on.choices[0].finish_reason == "length"
    assert on.choices[0].message.reasoning_content and on.choices[0].message.reasoning
    assert on.usage.completion_tokens_details.reasoning_tokens == 6
    assert off.choices[0].message.content and off.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_thinking_budget_leaves_room_for_the_answer(client: Any):
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=20, seed=1,
        extra_body={"thinking": {"type": "enabled"}, "thinking_token_budget": 5},
    )  # fmt: skip
    assert answer.usage.completion_tokens_details.reasoning_tokens <= 5
    assert answer.choices[0].message.content


def test_completions(client: Any, tokenizer: Tokenizer):
    ids = tokenizer.encode("last digit of")
    answer = client.completions.create(model="tiny", prompt=[ids, ids], n=2, max_tokens=4, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and answer.object == "text_completion"
    assert answer.usage.prompt_tokens == 2 * len(ids)
    text = client.completions.create(model="tiny", prompt="last digit of", max_tokens=4, temperature=0, echo=True)
    assert text.choices[0].text.startswith("last digit of")
    chunks = client.completions.create(
        model="tiny", prompt="last digit of", max_tokens=4, temperature=0, echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == text.choices[0].text


def test_legacy_logprobs(client: Any):
    answer = client.completions.create(
        model="tiny", prompt="last digit", max_tokens=3, temperature=0, logprobs=2, echo=True
    )
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == len(found.top_logprobs)
    assert found.token_logprobs[0] is None and len(found.tokens) == answer.usage.total_tokens
    for logprob, top in zip(found.token_logprobs[-3:], found.top_logprobs[-3:], strict=True):
        assert logprob == max(top.values())  # greedy, and the very same number


@pytest.mark.parametrize("new", [0, 3])
def test_streamed_legacy_logprobs_are_those_of_the_whole(client: Any, new: int):
    """With echo: the prompt's and the answer's, two prompts, two samples each; joined, they are the whole answer."""
    fields = {"model": "tiny", "prompt": ["last digit", "3 + 8 ?"], "n": 2, "max_tokens": new, "seed": 3}
    fields |= {"logprobs": 2, "echo": True}
    whole = client.completions.create(**fields)
    texts, found = [""] * 4, [{name: [] for name in ("text_offset", "token_logprobs", "tokens")} for _ in range(4)]
    ends: dict[int, str] = {}
    for chunk in client.completions.create(**fields, stream=True):
        (choice,) = chunk.choices
        assert choice.index not in ends  # nothing after the end
        texts[choice.index] += choice.text
        for name, values in found[choice.index].items():
            values += getattr(choice.logprobs, name)
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert texts[choice.index] == choice.text and ends[choice.index] == choice.finish_reason
        streamed, told = found[choice.index], choice.logprobs
        assert (streamed["tokens"], streamed["text_offset"]) == (told.tokens, told.text_offset)
        assert streamed["token_logprobs"][1:] == pytest.approx(told.token_logprobs[1:], abs=1e-5)
        assert len(choice.logprobs.tokens) >= 2 + new and choice.logprobs.token_logprobs[0] is None


def test_an_echoed_prompt_is_told_before_its_answer_is_there(client: Any, server: Any):
    """With its logprobs, in the first chunk, while the engine is still at the answer."""
    fields = {"model": "tiny", "prompt": "last digit", "max_tokens": 1900, "logprobs": 1, "echo": True}
    fields |= {"stream": True, "extra_body": {"ignore_eos": True}}
    with server.slowed(), client.completions.create(**fields) as chunks:
        (first,) = next(iter(chunks)).choices
        running = server.get("/health").json()["models"]["tiny"]["running"]
    assert first.text == "last digit" and first.finish_reason is None and running == 1
    assert "".join(first.logprobs.tokens) == "last digit" and first.logprobs.token_logprobs[0] is None
    assert all(math.isfinite(value) for value in first.logprobs.token_logprobs[1:])


def test_token_ids_and_prompt_logprobs(client: Any, tokenizer: Tokenizer):
    extra = {"return_token_ids": True, "prompt_logprobs": 1, "ignore_eos": True}
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=5, extra_body=extra)
    ids = answer.prompt_token_ids
    assert tokenizer.decode(ids).startswith("<|begin|><|user|>last digit") and len(answer.choices[0].token_ids) == 5
    assert answer.prompt_logprobs[0] is None and str(ids[1]) in answer.prompt_logprobs[1]
    assert all(math.isfinite(value["logprob"]) for row in answer.prompt_logprobs[1:] for value in row.values())


@pytest.fixture(scope="module")
def on(tokenizer: Tokenizer) -> dict[str, Any]:
    """Fields that make a model of random weights go on to the last token it may say, without thinking unless asked."""
    banned = (tokenizer.end_id, tokenizer.specials["<think>"], tokenizer.specials["</think>"])
    return {"logit_bias": {str(index): -100 for index in banned}, "seed": 1}


def test_responses(client: Any, on: dict[str, Any]):
    answer = client.responses.create(model="tiny", input="last digit of 3 + 8 ?", max_output_tokens=8, extra_body=on)
    assert answer.object == "response" and answer.status in ("completed", "incomplete")
    assert answer.output_text and answer.usage.output_tokens == 8
    assert answer.usage.input_tokens_details.cached_tokens >= 0


def test_responses_stream(client: Any, on: dict[str, Any]):
    fields = {"model": "tiny", "input": [{"role": "user", "content": "3 + 8 ?"}], "max_output_tokens": 12}
    fields |= {"extra_body": on}
    with client.responses.stream(**fields, instructions="be brief", reasoning={"effort": "low"}) as stream:
        events = list(stream)
    final = events[-1].response
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")][:3] == [0, 1, 2]
    assert final.output[0].type == "reasoning" and final.usage.output_tokens == 12


def test_responses_with_a_tool(client: Any, terse: dict[str, Any]):
    tool = {"type": "function", "name": "add", "parameters": ADD["function"]["parameters"], "strict": True}  # type: ignore[index]
    answer = client.responses.create(
        model="tiny", input="3 + 8 ?", tools=[tool], tool_choice="required", max_output_tokens=120,
        reasoning={"effort": "none"}, extra_body={"logit_bias": terse["logit_bias"], "seed": 1},
    )  # fmt: skip
    call = answer.output[0]
    assert call.type == "function_call" and call.name == "add" and json.loads(call.arguments)["a"] in (1, 2, 3)
    following = [
        {"role": "user", "content": "3 + 8 ?"},
        {"type": "function_call", "call_id": call.call_id, "name": "add", "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "5"},
    ]
    again = client.responses.create(model="tiny", input=following, tools=[tool], max_output_tokens=4)
    assert again.usage.input_tokens > answer.usage.input_tokens


async def _together(url: str) -> list[Any]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        import asyncio

        jobs = [
            client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=10, seed=index, temperature=1)
            for index in range(16)
        ]
        return await asyncio.gather(*jobs)


def test_many_at_once_are_each_what_they_are_alone(server: Any, client: Any):
    import asyncio

    together = asyncio.run(_together(server.url))
    alone = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=10, seed=3, temperature=1)
    assert together[3].choices[0].message.content == alone.choices[0].message.content
