"""The real thing: GSM8K questions put to `shoestring serve`, the server restarted and the client killed in the middle."""
# ruff: noqa: E501 (command lines)

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from asked import ENVIRONMENT, a_port
from test_ask_crash import answered

from shoestring.data.store import Store
from shoestring.data.traces import TraceStore
from shoestring.models.checkpoint import save
from shoestring.models.dense import Dense, DenseConfig
from shoestring.tasks.gsm8k import SAMPLE
from shoestring.text.tokenizer import Tokenizer

pytest.importorskip("fastapi")
AT_ONCE = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says nonsense, quickly."""
    text = [json.loads(line)["question"] for line in SAMPLE.read_text().splitlines()]
    tokenizer = Tokenizer.train(text, 600)
    config = DenseConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model") / "teacher"
    save(Dense(config, generator=torch.Generator().manual_seed(0)), tokenizer, folder)
    return folder


class Serving:
    """`shoestring serve` on one port, again and again, with one audit log."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.port = a_port()
        self.audit = folder / "audit.jsonl"
        self._log = open(folder / "server.log", "ab")  # noqa: SIM115
        self._command = [sys.executable, "-m", "shoestring.cli", "serve", f"teacher={model}", "--port", str(self.port),
                         "--audit", str(self.audit), "--store", str(folder / "keys.db")]  # fmt: skip
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"}, stdout=self._log,
                                        stderr=subprocess.STDOUT)  # fmt: skip

    def wait(self) -> None:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def stop(self, number: int) -> None:
        self.process.send_signal(number)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def answered(self) -> int:
        """Calls that the server says it answered."""
        rows = [json.loads(line) for line in self.audit.read_text().splitlines() if line.startswith("{")]
        return sum(row.get("status") == 200 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("count", [150, 2000])
@pytest.mark.timeout(900)
def test_gsm8k_through_restarts_and_kills(model: Path, tmp_path: Path, count: int) -> None:
    questions = Path(os.environ.get("GSM8K_QUESTIONS", SAMPLE))
    lines = [line for line in _lines(questions) if line.strip()]
    while len(lines) < count:  # the sample is short: number its questions
        lines += [
            json.dumps(json.loads(line) | {"question": f"({len(lines)}) {json.loads(line)['question']}"})
            for line in lines
        ]
    (tmp_path / "q.jsonl").write_text("\n".join(lines[:count]) + "\n")
    serving, out = Serving(model, tmp_path), tmp_path / "traces"
    serving.wait()
    command = [
        sys.executable, "-m", "shoestring.cli", "ask", "--teacher", f"http://127.0.0.1:{serving.port}", "--model", "teacher",
        "--questions", str(tmp_path / "q.jsonl"), "--out", str(out), "--max-tokens", "8", "--concurrency", str(AT_ONCE),
        "--quiet", "--json", "--system", "Put the answer in \\boxed{}.", "--temperature", "1", "--seed", "3",
    ]  # fmt: skip

    def reach(share: float) -> None:
        deadline = time.monotonic() + 240
        while answered(out) < share * count:
            assert client.poll() is None and time.monotonic() < deadline, (client.returncode, answered(out))
            time.sleep(0.01)

    client = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    in_flight = 0
    for share, event in ((0.15, "kill"), (0.35, "restart"), (0.55, "kill"), (0.75, "restart")):
        reach(share)
        if event == "kill":
            client.kill()
            client.communicate()
            store = Store(out)
            in_flight += store.counts()["sent"]
            store.close()
            client = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        else:
            serving.stop(signal.SIGTERM if share < 0.5 else signal.SIGKILL)
            serving.start()
    report = json.loads(client.communicate(timeout=300)[0])
    assert client.returncode == 0
    serving.stop(signal.SIGTERM)  # which writes the last lines of the audit log
    billed = serving.answered()
    assert report["answered"] == count and report["failed"] == report["planned"] == report["sent"] == 0
    traces = TraceStore(out).read()
    assert len(traces) == len({trace.messages[-1]["content"] for trace in traces}) == count
    assert in_flight <= report["in_doubt_rows"] <= in_flight + 2 * AT_ONCE  # two kills of ours, two of the server's
    assert (
        count - 2 * AT_ONCE <= billed <= count + report["in_doubt_rows"]
    )  # kill -9 may cost the server its last lines
    assert traces[0].task == "gsm8k" and traces[0].decoding["seed"] == 3


def _lines(path: Path) -> list[str]:
    if path.suffix != ".gz":
        return path.read_text().splitlines()
    import gzip

    with gzip.open(path, "rt") as file:
        return file.read().splitlines()
