"""A counting API in a process of its own, for tests that ask it."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from shoestring.data.claims import Budget
from shoestring.data.questions import source_of
from shoestring.teachers import _batch
from shoestring.teachers._job import Api
from shoestring.teachers._session import Job

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tools'}", "NO_COLOR": "1"}
ENVIRONMENT["RAY_worker_niceness"] = "0"  # on a busy machine a worker of low priority never begins
# the command line with every job's store written by a process of its own
APART = """
import sys
from shoestring.cli import main
from shoestring.data import journal
journal.MANY = 1
sys.exit(main())
"""


def a_port() -> int:
    """A free port below those that systems give to whoever asks for any: nobody takes it before it is used."""
    for port in random.SystemRandom().sample(range(10_000, 30_000), 100):
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


class Server:
    """tools/stub_api.py; `stats()` asks what it has counted."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, str(ROOT / "tools" / "stub_api.py"), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict[str, int]:
        return {"requests": 0, "billed": 0, "replayed": 0} | self._get("stats")

    def release(self) -> None:
        """Answer what waits since `--hold-after`, and whatever comes."""
        self._get("release")

    def asked(self, wanted: int) -> None:
        """Wait until so many requests have come."""
        deadline = time.monotonic() + 120
        while self.stats()["requests"] < wanted:
            assert time.monotonic() < deadline, self.stats()
            time.sleep(0.02)

    def _get(self, what: str) -> dict[str, int]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{what}", timeout=60) as response:
            found: dict[str, int] = json.load(response)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def batch_dies(when: str) -> Iterator[None]:
    """Inside, death comes "before" a batch is made, "after" that and before it is noted, or while it is "waiting"."""
    name = "wait" if when == "waiting" else "make"
    real = getattr(_batch.Remote, name)

    async def dies(self: object, *arguments: object) -> None:
        if when == "after":
            await real(self, *arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_batch.Remote, name, dies)
        with pytest.raises(KeyboardInterrupt):
            yield


def write_questions(path: Path, texts: list[str], **more: Any) -> Path:
    path.write_text(
        "".join(json.dumps({"question": text, "id": str(i), **more}) + "\n" for i, text in enumerate(texts))
    )
    return path


def job(server: Server, folder: Path, texts: list[str] | None = None, **options: Any) -> Job:
    """A job that asks `texts` of `server`; `options` of Api, and of Job."""
    if texts is not None:
        write_questions(folder / "q.jsonl", texts)
    whole = {name: options.pop(name) for name in [*options] if name in Job.__dataclass_fields__}
    source, identity = source_of(str(folder / "q.jsonl"), skipped=whole.get("skipped"))
    api = Api(server.url, "m", **{"name": "t", "max_tokens": 50, "price": "1,2,0.5", "start": 64} | options)
    whole = {"out": folder / "traces", "apis": [api], "budget": Budget(10**14)} | whole
    return Job(source=source, identity=identity, **whole)
