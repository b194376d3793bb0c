"""Tiny real models, and real servers of them in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for what only these tests share
pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
import torch  # noqa: E402
from written_answers import provider as running_provider  # noqa: E402

from shoestring.models.checkpoint import save  # noqa: E402
from shoestring.models.deepseek import Deepseek, DeepseekConfig  # noqa: E402
from shoestring.models.dense import Dense, DenseConfig  # noqa: E402
from shoestring.serve.keys import KeyStore  # noqa: E402
from shoestring.text.tokenizer import Tokenizer  # noqa: E402

V = 400
POSITIONS = 2048
SOURCE = Path(__file__).resolve().parents[2] / "src"
TEXTS = ['last digit of 3 + 8 + 4 ? 1 2 5 6 7 9 0 the quick brown fox jumps over the lazy dog grüße 你好 😀 {}[]":,']


def tiny_deepseek(seed: int = 0) -> Deepseek:
    config = DeepseekConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
        first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        max_position_embeddings=POSITIONS, num_nextn_predict_layers=0, initializer_range=0.2,
    )  # fmt: skip
    return Deepseek(config, generator=torch.Generator().manual_seed(seed))


def tiny_dense(seed: int = 0) -> Dense:
    config = DenseConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.2,
    )  # fmt: skip
    return Dense(config, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def make_dense() -> Callable[[int], Dense]:
    """A tiny dense model of a seed."""
    return tiny_dense


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, V)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A V3-architecture model of random weights with a tokenizer and the default template."""
    return save(tiny_deepseek(), tokenizer, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return save(tiny_dense(), tokenizer, tmp_path_factory.mktemp("models") / "dense")


# Requests go to plain HTTP, and reading all the certificates there are costs a hundred times what one of them does.
PLAIN: dict[str, Any] = {"verify": False, "timeout": 120}


@dataclass
class Running:
    """A server in a process of its own."""

    url: str
    process: subprocess.Popen[str]
    log: Path
    store: Path | None = None

    def get(self, path: str, **more: Any) -> Any:
        return httpx.get(self.url + path, **(PLAIN | more))

    def post(self, path: str, body: Any, **more: Any) -> Any:
        return httpx.post(self.url + path, json=body, **(PLAIN | more))

    def stream(self, body: Any, **more: Any) -> Any:
        """A chat, streamed: a context manager."""
        return httpx.stream("POST", self.url + "/v1/chat/completions", json=body, **(PLAIN | more))

    def chat(self, text: str = "last digit of 3 + 8 ?", **fields: Any) -> Any:
        key = fields.pop("key", None)
        headers = fields.pop("headers", {}) | ({"authorization": f"Bearer {key}"} if key else {})
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 8} | fields
        return self.post("/v1/chat/completions", body, headers=headers)

    def engines(self) -> list[int]:
        """Process ids of the engines, the oldest first: children of the server that are Python's spawned ones."""
        found = []
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
                command = (status.parent / "cmdline").read_bytes()
                began = int((status.parent / "stat").read_text().rpartition(")")[2].split()[19])
            except OSError:  # it has ended meanwhile
                continue
            if int(lines["PPid"]) == self.process.pid and b"spawn_main" in command:
                found.append((began, int(status.parent.name)))
        return [pid for _, pid in sorted(found)]

    @contextmanager
    def held(self, engine: int = 0) -> Iterator[None]:
        """An engine stands still: what it is at does not end meanwhile, however fast the machine."""
        pid = self.engines()[engine]
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    @contextmanager
    def slowed(self, engine: int = 0) -> Iterator[None]:
        """An engine works 2 of 50 milliseconds: answers begin, and a long one takes many seconds on any machine."""
        pid, enough = self.engines()[engine], threading.Event()

        def hold_back() -> None:
            with suppress(ProcessLookupError):  # it may be killed meanwhile
                while not enough.is_set():
                    os.kill(pid, signal.SIGSTOP)
                    enough.wait(0.048)
                    os.kill(pid, signal.SIGCONT)
                    enough.wait(0.002)

        thread = threading.Thread(target=hold_back)
        thread.start()
        try:
            yield
        finally:
            enough.set()
            thread.join()

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextmanager
def started(*arguments: str, folder: Path, store: Path | None = None, seconds: float = 200.0) -> Iterator[Running]:
    """`shoestring serve` with these arguments on a free port; stopped at the end, gently."""
    log = folder / f"serve-{time.monotonic_ns()}.log"
    more = ["--store", str(store)] if store else []
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    with open(log, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "shoestring.cli", "serve", "--port", "0", "--threads", "1", *arguments, *more],
            stdout=out, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip
    try:
        yield Running(_address(log, process, seconds), process, log, store)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(log: Path, process: subprocess.Popen[str], seconds: float) -> str:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = [line for line in log.read_text().splitlines() if line.startswith("Serving on ")]
        if found:
            return found[0].removeprefix("Serving on ")
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


@pytest.fixture(scope="session")
def provider() -> Iterator[str]:
    """The address of a provider with written answers."""
    with running_provider() as address:
        yield address


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    """The context manager that starts a server."""
    return started


@pytest.fixture(scope="session")
def server(checkpoint: Path, dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two models, no keys: for tests that leave nothing behind."""
    folder = tmp_path_factory.mktemp("server")
    with started(f"tiny={checkpoint}", f"dense={dense_checkpoint}", folder=folder) as running:
        yield running


@pytest.fixture(scope="session")
def metered(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One model with keys, prices and an audit log."""
    folder = tmp_path_factory.mktemp("metered")
    store = folder / "keys.db"
    KeyStore(store).close()
    more = ["--require-keys", "--price", "1,0.1,10", "--audit", str(folder / "audit.jsonl")]
    with started(f"tiny={checkpoint}", *more, folder=folder, store=store) as running:
        yield running


@pytest.fixture
def new_key(metered: Running) -> Callable[..., str]:
    """Make a key with limits on the metered server."""
    store = KeyStore(metered.store)  # type: ignore[arg-type]

    def make(**limits: Any) -> str:
        return store.create(f"key-{time.monotonic_ns()}", **limits)[0]

    return make
