"""What lm-eval reads of echoed logprobs, against transformers on the same checkpoint: exact where it must be."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.models.checkpoint import save
from shoestring.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
SEQUENCES = 12


def sequences(tokenizer: Tokenizer) -> list[list[int]]:
    """Ids as a harness sends them, of many lengths."""
    rng = random.Random(5)
    ids = [index for index in range(tokenizer.vocab_size) if index not in tokenizer.specials.values()]
    return [[tokenizer.end_id, *(rng.choice(ids) for _ in range(rng.randrange(2, 90)))] for _ in range(SEQUENCES)]  # type: ignore[list-item]


def theirs(folder: Path, rows: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """transformers' logprobs of each token after the first, one sequence at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    found = []
    with torch.inference_mode():
        for ids in rows:
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return found


def ours(server: Any, model: str, rows: list[list[int]]) -> list[Any]:
    """What lm-eval's local-completions asks for a loglikelihood, and the choices that answer it."""
    body = {
        "model": model,
        "prompt": rows,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return sorted(answer.json()["choices"], key=lambda choice: choice["index"])


@pytest.mark.parametrize("model", ["tiny", "dense"])
def test_logprobs_are_those_of_transformers(
    server: Any, tokenizer: Tokenizer, checkpoint: Path, dense_checkpoint: Path, model: str
):
    rows = sequences(tokenizer)
    expected = theirs(checkpoint if model == "tiny" else dense_checkpoint, rows, torch.float32)
    for ids, want, choice in zip(rows, expected, ours(server, model, rows), strict=True):
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(ids) + 1
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        torch.testing.assert_close(torch.tensor(found["token_logprobs"][1:-1]), want, atol=1e-4, rtol=0)


def test_greedy_is_the_same_float(server: Any, tokenizer: Tokenizer, checkpoint: Path):
    """lm-eval calls a continuation greedy iff each token's logprob equals the largest of top_logprobs, exactly."""
    start = tokenizer.encode("last digit of 3 + 8")
    body = {"model": "tiny", "prompt": start, "temperature": 0, "max_tokens": 6, "return_token_ids": True}
    greedy = server.post("/v1/completions", body).json()["choices"][0]["token_ids"]
    other = [*greedy[:3], (greedy[3] + 1) % 300 + 1]
    for continuation, expected in ((greedy, True), (other, False)):
        found = ours(server, "tiny", [[*start, *continuation]])[0]["logprobs"]
        pairs = zip(found["token_logprobs"], found["top_logprobs"], strict=True)
        part = list(pairs)[len(start) : -1]
        assert len(part) == len(continuation)
        assert all(logprob == max(top.values()) for logprob, top in part) is expected


def test_the_last_entry_is_there_even_when_it_is_the_end(server: Any, tokenizer: Tokenizer):
    bias = {str(tokenizer.end_id): 100}
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 1, "logprobs": 1, "echo": True, "logit_bias": bias}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["logprobs"]["tokens"][-1] == "<|end|>"
    assert len(choice["logprobs"]["tokens"]) == 4


def test_only_the_prompt(server: Any):
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 0, "logprobs": 1, "echo": True}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_as_long_as_the_context_can_be_scored(server: Any, tokenizer: Tokenizer, stream: bool):
    """Nothing is to be written, so nothing has to fit behind it; what is to be written has to."""
    ids = [5 + index % 200 for index in range(2048)]
    body = {"model": "tiny", "prompt": ids, "max_tokens": 0, "logprobs": 1, "echo": True, "stream": stream}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    if stream:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        assert sum(len(c["logprobs"]["tokens"]) for chunk in chunks for c in chunk["choices"]) == 2048
    else:
        (choice,), usage = answer.json()["choices"], answer.json()["usage"]
        assert len(choice["logprobs"]["token_logprobs"]) == 2048 and choice["text"] == tokenizer.decode(ids)
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2048, 0)
    for refused in (body | {"max_tokens": 1}, body | {"prompt": [*ids, 5]}):
        again = server.post("/v1/completions", refused)
        assert again.status_code == 400 and again.json()["error"]["code"] == "context_length_exceeded"


def test_remote_tokenizer(server: Any, tokenizer: Tokenizer):
    info = server.get("/tokenizer_info?model=tiny").json()
    assert info["eos_token"] == "<|end|>" and info["bos_token"] == "<|begin|>" and "messages" in info["chat_template"]
    assert server.get("/tokenizer_info").json() == info  # two models of one tokenizer: lm-eval cannot say which
    ids = server.post("/tokenize", {"model": "tiny", "prompt": "<|end|>3 + 8", "add_special_tokens": False}).json()
    assert ids["tokens"] == tokenizer.encode("<|end|>3 + 8", specials=True) and ids["tokens"][0] == tokenizer.end_id
    text = server.post("/detokenize", {"model": "tiny", "tokens": ids["tokens"]}).json()["prompt"]
    assert text == "<|end|>3 + 8"
    chat = server.post("/tokenize", {"model": "tiny", "messages": [{"role": "user", "content": "<|end|>"}]}).json()
    assert tokenizer.end_id not in chat["tokens"]  # what a user writes never is a special token
    body = {"model": "tiny", "messages": [{"role": "user", "content": "<|end|>"}], "add_generation_prompt": False}
    assert server.post("/tokenize", body).json()["tokens"] == chat["tokens"][:-1]  # without the assistant's mark
    spent = server.post("/v1/chat/completions", body | {"max_tokens": 1}).json()["usage"]
    assert spent["prompt_tokens"] == chat["count"] - 1


@pytest.fixture(scope="module")
def bf16(
    start: Any, make_dense: Any, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Path]]:
    folder = tmp_path_factory.mktemp("bf16")
    path = save(make_dense(3), tokenizer, folder / "model", dtype="bfloat16")
    with start(f"tiny={path}", folder=folder) as running:
        yield running, path


def test_bf16_is_as_near_to_the_truth_as_transformers(bf16: tuple[Any, Path], tokenizer: Tokenizer):
    """Mean error against the fp32 logprobs of the same (bf16) weights: at most 1.2 times theirs."""
    server, path = bf16
    rows = sequences(tokenizer)
    truth = torch.cat(theirs(path, rows, torch.float32))
    error = (torch.cat(theirs(path, rows, torch.bfloat16)) - truth).abs().mean()
    found = [choice["logprobs"]["token_logprobs"][1:-1] for choice in ours(server, "tiny", rows)]
    mine = (torch.tensor([value for row in found for value in row]) - truth).abs().mean()
    assert mine <= 1.2 * error, (mine, error)
