"""TLS, CORS, hooks that fail, shapes that can be switched; and mistakes on the command line."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoestring.cli import main

HOOK = """
import time
def before(call):
    if "clumsy" in str(call.raw):
        raise RuntimeError("oops")
    if "shorter" in str(call.raw):
        import dataclasses
        call.parts = [dataclasses.replace(part, sampling=dataclasses.replace(part.sampling, max_new_tokens=2))
                      for part in call.parts]
def after(call, outcome):
    raise RuntimeError("late oops")
"""


@pytest.fixture(scope="module")
def secure(start: Any, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """A server with everything switched on, and a client that trusts its certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here to make a certificate")
    folder = tmp_path_factory.mktemp("secure")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True,
    )  # fmt: skip
    (folder / "hook.py").write_text(HOOK)
    more = ["--tls-cert", str(cert), "--tls-key", str(key), "--cors", "https://ours.example", "--hook",
            str(folder / "hook.py"), "--set", "reasoning_alias=false", "--set", "deterministic=true"]  # fmt: skip
    with (
        start(f"tiny={checkpoint}", *more, folder=folder) as running,
        httpx.Client(base_url=running.url, verify=ssl.create_default_context(cafile=str(cert)), timeout=60) as client,
    ):
        yield running, client


def chat(client: Any, text: str = "3 + 8 ?", **fields: Any) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 6} | fields
    return client.post("/v1/chat/completions", json=body)


def test_tls(secure: Any):
    running, client = secure
    assert running.url.startswith("https://") and chat(client).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(running.url + "/health")


def test_cors_is_for_those_named(secure: Any):
    _, client = secure
    ours = client.get("/health", headers={"origin": "https://ours.example"})
    assert ours.headers["access-control-allow-origin"] == "https://ours.example"
    assert "access-control-allow-origin" not in client.get("/health", headers={"origin": "https://a.example"}).headers


def test_a_hook_that_fails_lets_nobody_through(secure: Any):
    running, client = secure
    answer = chat(client, "clumsy")
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "hook_failed"
    assert "oops" not in answer.text and "oops" in running.log.read_text()
    assert chat(client).status_code == 200 and "late oops" in running.log.read_text()


def test_a_hook_may_change_the_sampling(secure: Any):
    assert chat(secure[1], "shorter", ignore_eos=True).json()["usage"]["completion_tokens"] == 2


def test_one_name_for_thinking(secure: Any):
    answer = chat(secure[1], thinking={"type": "enabled"}, temperature=0, ignore_eos=True)
    message = answer.json()["choices"][0]["message"]
    assert message["reasoning_content"] and "reasoning" not in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to serve"),
        (["nowhere/at/all"], "not a run directory"),
        (["a={model}", "a={model}"], "two models are called a"),
        (["a={model}", "--host", "0.0.0.0"], "no keys are required"),
        (["a={model}", "--tls-cert", "c.pem"], "certificate and a key"),
        (["a={model}", "--require-keys"], "no store of keys"),
        (["a={model}", "--price", "1,2"], "three numbers"),
        (["a={model}", "--set", "max_que=3"], 'Did you mean "max_queue"'),
        (["a={model}", "--hook", "none.py"], "no hook at none.py"),
        (["a={model}", "--hook", "{folder}/broken.py"], "cannot be imported: SyntaxError"),
        (["a={model}", "--audit", "/proc/none/audit.jsonl"], "audit log"),
        (["--upstream", "localhost:8000"], "http:// or https://"),
        (["--upstream", "http://a/v1", "--upstream-key-file", "none.txt"], "key file none.txt"),
        (["{folder}"], "no config.json"),
        (["a={model}", "--set", "speculative=true"], "speculative"),
    ],
)
def test_mistakes_cost_a_sentence(
    arguments: list[str], words: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "broken.py").write_text("def before(:")
    told = [argument.format(model=checkpoint, folder=tmp_path) for argument in arguments]
    assert main(["serve", "--port", "0", *told]) == 2
    assert words in capsys.readouterr().err


def test_a_port_in_use(server: Any, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    port = server.url.rpartition(":")[2]
    assert main(["serve", str(checkpoint), "--port", port]) == 2
    assert "choose another --port" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The engine's process finds out; the sentence is the user's all the same."""
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert main(["serve", str(broken), "--port", "0"]) == 2
    assert "broken" in capsys.readouterr().err
