"""Servers for the tests here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `asked` is within reach of the tests here

from asked import Server


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """`start(*options)` starts a server; all are killed in the end."""
    servers: list[Server] = []

    def begin(*options: str) -> Server:
        servers.append(Server(*options))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    return start()
