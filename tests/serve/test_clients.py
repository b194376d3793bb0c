"""Clients that nobody here wrote, against the real server: openai 2.x, LangChain, lm-eval, schemathesis, curl.

Those that are heavy live in an environment of their own (`make clients`); a test of one that is absent is skipped by
name. openai 3.x is in test_openai_client.py.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
APART = Path(os.environ.get("SHOESTRING_CLIENTS", ROOT / ".venv-clients")).absolute() / "bin"


def python_with(package: str, *, other_than_ours: bool = False) -> str:
    """An interpreter that has the package; skips the test where there is none."""
    for python in [str(APART / "python"), *([] if other_than_ours else [sys.executable])]:
        if Path(python).exists():
            found = subprocess.run([python, "-c", f"import {package}"], capture_output=True)
            if found.returncode == 0:
                return python
    pytest.skip(f"{package} is not installed; `make clients` installs it")


def run(
    *command: str, seconds: float = 500, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, env=os.environ | quiet | environment, cwd=folder
    )


def say(python: str, program: str, *arguments: str) -> Any:
    """Run a small program in another environment; the JSON it prints last."""
    found = run(python, "-c", program, *arguments)
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout.splitlines()[-1])


OPENAI_2 = """
import sys, json, openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
messages = [{"role": "user", "content": "last digit of 3 + 8 ?"}]
fields = {"model": "tiny", "messages": messages, "max_tokens": 8, "seed": 1}
whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
text = client.completions.create(model="tiny", prompt=[[5, 6], [7]], max_tokens=2, logprobs=1, echo=True)
on = {"logit_bias": {sys.argv[2]: -100}}  # an answer that does not end by itself
answer = client.responses.create(model="tiny", input="3 + 8 ?", max_output_tokens=4, extra_body=on)
try:
    client.chat.completions.create(model="big", messages=messages)
except openai.NotFoundError as error:
    code = error.code
print(json.dumps({
    "version": openai.__version__, "whole": whole.choices[0].message.content,
    "streamed": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
    "usage": chunks[-1].usage.completion_tokens, "logprobs": len(whole.choices[0].logprobs.content),
    "indices": [c.index for c in text.choices], "response": answer.usage.output_tokens, "code": code}))
"""


def test_openai_2(server: Any, tokenizer: Tokenizer):
    found = say(python_with("openai", other_than_ours=True), OPENAI_2, server.url, str(tokenizer.end_id))
    assert found["version"].startswith("2.") and found["streamed"] == found["whole"]
    assert (found["usage"], found["logprobs"], found["response"]) == (8, 8, 4)
    assert found["indices"] == [0, 1] and found["code"] == "model_not_found"


LANGCHAIN = """
import sys, json
from langchain_openai import ChatOpenAI
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
model = ChatOpenAI(base_url=sys.argv[1] + "/v1", api_key="none", model="tiny", max_tokens=8, seed=1, temperature=0.5,
                   max_retries=0, stream_usage=True)
messages = [SystemMessage("be brief"), HumanMessage("3 + 8 ?"), AIMessage("1"), HumanMessage("and 4 + 9 ?")]
whole = model.invoke(messages)
pieces = list(model.stream(messages))
batch = model.batch([messages, [HumanMessage("3")]])
logprobs = model.bind(logprobs=True, top_logprobs=1).invoke(messages).response_metadata["logprobs"]["content"]
responses = ChatOpenAI(base_url=sys.argv[1] + "/v1", api_key="none", model="tiny", max_tokens=6,
                       use_responses_api=True, extra_body={"logit_bias": {sys.argv[2]: -100}})
print(json.dumps({
    "whole": whole.content, "usage": whole.usage_metadata, "streamed": "".join(piece.content for piece in pieces),
    "batch": len(batch), "logprobs": len(logprobs), "finish": whole.response_metadata["finish_reason"],
    "responses": responses.invoke("3 + 8 ?").usage_metadata["output_tokens"],
    "stream_usage": sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata)}))
"""


def test_langchain(server: Any, tokenizer: Tokenizer):
    found = say(python_with("langchain_openai"), LANGCHAIN, server.url, str(tokenizer.end_id))
    assert found["streamed"] == found["whole"] and found["finish"] in ("length", "stop") and found["batch"] == 2
    assert found["usage"]["output_tokens"] == found["logprobs"] == found["stream_usage"] == 8
    assert found["responses"] == 6


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two lm-eval tasks on local files: one of likelihoods, one of generation."""
    rows = [
        {"q": f"last digit of {a} + {b} ?", "choices": list("0123"), "gold": (a + b) % 4}
        for a in (1, 3)
        for b in (2, 5)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\ntest_split: test\n"
    (tmp_path / "choose.yaml").write_text(
        f"task: choose\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{gold}}'\nmetric_list:\n  - metric: acc\n"
    )
    (tmp_path / "say.yaml").write_text(
        f"task: say\n{common}output_type: generate_until\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: '{{{{gold}}}}'\n"
        "generation_kwargs:\n  until: ['Q:']\n  max_gen_toks: 6\nmetric_list:\n  - metric: exact_match\n"
    )
    return tmp_path


def lm_eval(kind: str, endpoint: str, task: str, tasks: Path, server: Any, *more: str) -> list[dict[str, Any]]:
    """The samples that lm-eval logged."""
    python = python_with("lm_eval")
    arguments = f"model=tiny,base_url={server.url}{endpoint},num_concurrent=4,max_length=1024"
    if kind == "local-completions":
        arguments += ",tokenizer_backend=remote"
    found = run(
        python, "-m", "lm_eval", "--model", kind, "--model_args", arguments, "--tasks", task, "--log_samples",
        "--include_path", str(tasks), "--output_path", str(tasks / "out"), *more, OPENAI_API_KEY="none",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    files = sorted((tasks / "out").rglob("samples_*.jsonl"))
    return [json.loads(line) for line in files[-1].read_text().splitlines()]


@pytest.mark.timeout(600)
def test_lm_eval_likelihoods_equal_those_of_transformers(
    server: Any, tasks: Path, checkpoint: Path, tokenizer: Tokenizer
):
    transformers = pytest.importorskip("transformers")
    samples = lm_eval("local-completions", "/v1/completions", "choose", tasks, server)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    compared = 0
    for sample in samples:
        for argument, response in zip(sample["arguments"].values(), sample["resps"], strict=True):
            context, continuation = argument["arg_0"], argument["arg_1"]
            ids = tokenizer.encode(context + continuation)
            start = len(tokenizer.encode(context))
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
            wanted = logits[range(start - 1, len(ids) - 1), ids[start:]].sum().item()
            greedy = logits[start - 1 :].argmax(-1).tolist() == ids[start:]
            logprob, said_greedy = response[0]
            assert math.isclose(float(logprob), wanted, abs_tol=1e-4 * (len(ids) - start))
            assert str(said_greedy) == str(greedy)
            compared += 1
    assert compared == 16


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "endpoint", "more"),
    [("local-completions", "/v1/completions", ()),
     ("local-chat-completions", "/v1/chat/completions", ("--apply_chat_template",))],
)  # fmt: skip
def test_lm_eval_generates(server: Any, tasks: Path, kind: str, endpoint: str, more: tuple[str, ...]):
    samples = lm_eval(kind, endpoint, "say", tasks, server, *more)
    answers = [sample["resps"][0][0] for sample in samples]
    assert len(answers) == 4 and all(isinstance(answer, str) and answer for answer in answers)


@pytest.mark.slow
@pytest.mark.timeout(660)
def test_schemathesis_finds_no_500(server: Any, tmp_path: Path):
    """Requests made up from our own OpenAPI document, valid and invalid: no answer of 500, none off the document."""
    python = python_with("schemathesis")
    found = run(
        str(Path(python).parent / "schemathesis"), "run", f"{server.url}/openapi.json", "--max-examples", "40",
        "--checks", "not_a_server_error,status_code_conformance,content_type_conformance", "--request-timeout", "30",
        "--phases", "examples,coverage,fuzzing", "--seed", "1", "--no-color", seconds=600, folder=tmp_path,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-6000:]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl(server: Any):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "3 + 8 ?"}], "max_tokens": 4, "stream": True}
    found = run("curl", "-sN", "-i", f"{server.url}/v1/chat/completions", "-d", json.dumps(body))
    head, _, text = found.stdout.replace("\r\n", "\n").partition("\n\n")
    assert "text/event-stream" in head and "cache-control: no-cache" in head and "x-accel-buffering: no" in head
    events = text.strip().split("\n\n")
    assert all(event.startswith("data: ") for event in events) and events[-1] == "data: [DONE]"
