"""Fields beyond the common ones do what they say: seen in what comes back from the real server."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoestring.text.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "last digit of 3 + 8 ?"}]


def text(server: Any, **fields: Any) -> dict[str, Any]:
    """The one choice of a completion, with its token ids."""
    body = {"model": "tiny", "prompt": [5, 6, 7], "temperature": 0, "return_token_ids": True} | fields
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice


def test_what_was_read_before_is_counted_and_costs_less(metered: Any, new_key: Callable[..., str]):
    """The second of two equal prompts comes from the cache, in the counts of OpenAI and DeepSeek and in the price."""
    prompt, key = "all of this is the beginning of a long conversation " * 12, new_key()
    first, second = (metered.chat(prompt, key=key, max_tokens=4, seed=1).json()["usage"] for _ in range(2))
    assert first["prompt_tokens"] == second["prompt_tokens"] > 200
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert first["prompt_tokens_details"]["cached_tokens"] < 20 and cached > 0.7 * second["prompt_tokens"]
    assert second["prompt_cache_hit_tokens"] == cached
    assert second["prompt_cache_miss_tokens"] == second["prompt_tokens"] - cached
    price = ((second["prompt_tokens"] - cached) * 1 + cached * 0.1 + second["completion_tokens"] * 10) / 1e6
    assert second["cost_usd"] == pytest.approx(price) and second["cost_usd"] < first["cost_usd"]


def test_another_salt_shares_nothing(server: Any):
    prompt = [20 + place % 200 for place in range(150)]
    seen = []
    for salt in ("a", "a", "b"):
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "cache_salt": salt}
        seen.append(server.post("/v1/completions", body).json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert seen[0] == seen[2] == 0 < seen[1]


@pytest.fixture(scope="module")
def terse(tokenizer: Tokenizer) -> dict[str, Any]:
    """Fields that keep a model of random weights from thinking, and from filling its JSON with white space."""
    pytest.importorskip("llguidance")
    unsaid = [index for index in range(tokenizer.vocab_size) if tokenizer.decode([index]).isspace()]
    unsaid.append(tokenizer.specials["<think>"])
    return {"reasoning_effort": "none", "logit_bias": {str(index): -100 for index in unsaid}, "seed": 1}


def test_choices_and_patterns(server: Any, terse: dict[str, Any]):
    chosen = server.chat(max_tokens=20, structured_outputs={"choice": ["red", "green"]}, **terse)
    assert chosen.json()["choices"][0]["message"]["content"] in ("red", "green")
    pattern = "[0-9]{3}-(a|b)"
    drawn = server.chat(max_tokens=20, structured_outputs={"regex": pattern}, **terse)
    assert re.fullmatch(pattern, drawn.json()["choices"][0]["message"]["content"])


def test_any_json_object(server: Any, terse: dict[str, Any]):
    answer = server.chat(max_tokens=3, response_format={"type": "json_object"}, **terse).json()
    assert answer["choices"][0]["message"]["content"].startswith("{")


def test_a_message_is_gone_on_with(server: Any, tokenizer: Tokenizer):
    """The prompt ends in the middle of the assistant's turn, and what comes is what a completion of that text is."""
    turns = [*QUESTION, {"role": "assistant", "content": "The last digit"}]
    fields = {"continue_final_message": True, "temperature": 0, "return_token_ids": True, "max_tokens": 5}
    answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": turns, **fields}).json()
    assert tokenizer.decode(answer["prompt_token_ids"]).endswith("<|assistant|>The last digit")
    same = text(server, prompt=answer["prompt_token_ids"], max_tokens=5)
    assert answer["choices"][0]["token_ids"] == same["token_ids"]


@pytest.mark.parametrize(("effort", "share"), [("minimal", 0.1), ("low", 0.25), ("medium", 0.5)])
def test_effort_is_a_budget_of_thinking(server: Any, effort: str, share: float):
    """With a template that knows no effort; a model that never stops by itself uses all of it and then answers."""
    template = {"enable_thinking": True}
    answer = server.chat(reasoning_effort=effort, chat_template_kwargs=template, max_tokens=40, seed=1).json()
    thought = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < thought <= share * 40 and answer["choices"][0]["message"]["content"]


def test_ends(server: Any, tokenizer: Tokenizer):
    """stop_token_ids, the end that is waited for, and the end that is ignored."""
    free = text(server, max_tokens=6)["token_ids"]
    place = next(i for i in range(1, 6) if free[i] not in free[:i])
    cut = text(server, max_tokens=6, stop_token_ids=[free[place]])
    assert cut["finish_reason"] == "stop" and cut["token_ids"] == free[: place + 1]
    end = {str(tokenizer.end_id): 100}
    assert text(server, max_tokens=6, logit_bias=end)["token_ids"] == [tokenizer.end_id]
    waited = text(server, max_tokens=6, logit_bias=end, min_tokens=3)["token_ids"]
    assert len(waited) == 4 and tokenizer.end_id not in waited[:3]
    ignored = text(server, max_tokens=6, logit_bias=end, ignore_eos=True)
    assert len(ignored["token_ids"]) == 6 and ignored["finish_reason"] == "length"


def test_shapes_of_the_distribution(server: Any):
    """top_k=1 and min_p=1 are greedy whatever the seed; a repetition penalty keeps a greedy loop from closing."""
    greedy = text(server, max_tokens=8)["token_ids"]
    for fields in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
        assert text(server, max_tokens=8, temperature=1.5, seed=11, **fields)["token_ids"] == greedy, fields
    assert text(server, max_tokens=8, temperature=1.5, seed=11)["token_ids"] != greedy
    long = text(server, max_tokens=60, ignore_eos=True, repetition_penalty=100.0)["token_ids"]
    assert len(set(long)) == 60


EXTRAS = {"return_token_ids": True, "prompt_logprobs": 1, "routed_experts": True, "temperature": 0, "max_tokens": 6}


def streamed(server: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = server.post(path, body | {"stream": True}).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def same_rows(found: list[Any], wanted: list[Any]) -> bool:
    """prompt_logprobs of two runs: the same tokens, about the same numbers."""
    assert found[0] is None and len(found) == len(wanted)
    for row, other in zip(found[1:], wanted[1:], strict=True):
        assert row.keys() == other.keys() and row
        assert all(row[key]["logprob"] == pytest.approx(other[key]["logprob"], abs=1e-4) for key in row)
    return True


def test_what_was_asked_for_beside_the_text_of_a_completion(server: Any, checkpoint: Path):
    """Whole and streamed (with the choice's end); the experts are those the engine in this process routes to."""
    from shoestring import Engine, Sampling, load

    body = {"model": "tiny", "prompt": [5, 6, 7]} | EXTRAS
    (whole,) = server.post("/v1/completions", body).json()["choices"]
    *earlier, last = (chunk["choices"][0] for chunk in streamed(server, "/v1/completions", body))
    assert all("token_ids" not in entry for entry in earlier)
    assert last["token_ids"] == whole["token_ids"] and last["prompt_token_ids"] == [5, 6, 7]
    assert last["routed_experts"] == whole["routed_experts"]
    assert same_rows(last["prompt_logprobs"], whole["prompt_logprobs"])
    experts = np.load(io.BytesIO(base64.b64decode(whole["routed_experts"])))
    engine = Engine(*load(str(checkpoint)))
    sampling = Sampling(temperature=0, max_new_tokens=6, routed_experts=True)
    ((wanted,),) = engine.generate([[5, 6, 7]], sampling)
    assert experts.shape == (3 + len(whole["token_ids"]) - 1, 1, 2) and experts.tolist() == wanted.routed_experts


def test_what_was_asked_for_beside_the_text_of_a_chat(server: Any):
    """Of the prompt in a stream's last chunk, which has no choices; of the answer where it ends."""
    body = {"model": "tiny", "messages": QUESTION} | EXTRAS
    whole = server.post("/v1/chat/completions", body).json()
    *_, end, last = streamed(server, "/v1/chat/completions", body)
    assert last["choices"] == [] and "usage" not in last  # nobody asked for usage
    assert last["prompt_token_ids"] == whole["prompt_token_ids"]
    assert same_rows(last["prompt_logprobs"], whole["prompt_logprobs"])
    for name in ("token_ids", "routed_experts", "finish_reason"):
        assert end["choices"][0][name] == whole["choices"][0][name]


def test_small_endpoints(server: Any):
    from shoestring import __version__

    assert server.get("/version").json() == {"version": __version__}
    assert server.get("/ping").json()["status"] == "ok"
    found = server.post("/tokenize", {"model": "tiny", "prompt": "3 + 8 😀", "return_token_strs": True}).json()
    assert len(found["token_strs"]) == found["count"] == len(found["tokens"]) and found["max_model_len"] == 2048
    assert found["token_strs"][0] == "3"


def test_tools_that_may_not_be_called_are_not_told_of(server: Any):
    tool = {"type": "function", "function": {"name": "add", "description": "Add two digits.", "parameters": {}}}
    sizes = [
        server.chat(max_tokens=1, **fields).json()["usage"]["prompt_tokens"]
        for fields in ({}, {"tools": [tool], "tool_choice": "none"}, {"tools": [tool]})
    ]
    assert sizes[0] == sizes[1] < sizes[2]
