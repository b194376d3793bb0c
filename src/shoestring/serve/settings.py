"""Everything about a server that can be set, with each default in one place."""

from __future__ import annotations

import ipaddress

from pydantic import Field, field_validator, model_validator

from shoestring.core.config import Config

KEEP_ALIVE_SECONDS = 15.0


class ModelSpec(Config):
    """One model to serve: its name, where its weights are, what a million tokens cost."""

    name: str = Field(min_length=1)
    path: str
    dtype: str = "auto"
    device: str | None = None
    threads: int = Field(0, ge=0)  # 0: the machine's cores divided by the models served
    usd_per_million_prompt: float = Field(0.0, ge=0)
    usd_per_million_cached: float = Field(0.0, ge=0)
    usd_per_million_completion: float = Field(0.0, ge=0)
    owner: str = "shoestring"


class UpstreamSpec(Config):
    """Another provider behind the same keys, metering and hooks. `url` ends in /v1; `key` is sent to it as Bearer."""

    url: str
    key: str | None = None
    usd_per_million_prompt: float = Field(0.0, ge=0)
    usd_per_million_cached: float = Field(0.0, ge=0)
    usd_per_million_completion: float = Field(0.0, ge=0)
    seconds: float = Field(600.0, gt=0)

    @field_validator("url")
    @classmethod
    def _url(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("must be an http:// or https:// address ending in /v1")
        return url.rstrip("/")


class ServeConfig(Config):
    """How to serve. Times in seconds; limits are per model unless they say otherwise."""

    models: tuple[ModelSpec, ...] = ()
    upstream: UpstreamSpec | None = None
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    # who may ask
    store: str | None = None  # SQLite file or a database URL with keys and usage; None: none are kept
    require_keys: bool = False
    audit: str | None = None  # a file of JSON lines: who asked what size when, and what came of it
    audit_text: bool = False  # prompts and answers too
    hooks: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    # how much at once
    max_running: int = Field(64, ge=1)  # answers in the engine at once
    max_queue: int = Field(1024, ge=0)  # requests that may wait
    max_queue_tokens: int = Field(4_000_000, ge=1)  # and their prompt and new tokens together
    max_body_bytes: int = Field(8 << 20, ge=1024)
    max_n: int = Field(16, ge=1)
    max_prompts: int = Field(128, ge=1)  # in one /v1/completions
    max_logprobs: int = Field(20, ge=0)
    # for how long
    queue_seconds: float = Field(300.0, gt=0)
    request_seconds: float = Field(600.0, gt=0)
    reader_seconds: float = Field(60.0, gt=0)  # a client that reads nothing for so long is gone
    drain_seconds: float = Field(30.0, ge=0)
    keep_alive_seconds: float = Field(KEEP_ALIVE_SECONDS, gt=0)
    # shapes
    reasoning_alias: bool = True  # `reasoning` beside `reasoning_content`
    max_engine_tokens: int = Field(1 << 17, ge=1)  # cache positions of one engine
    deterministic: bool = False  # answers do not depend, to the bit, on what else is answered; slower
    speculative: bool = False  # drafts by the model's own multi-token prediction
    log_level: str = "info"

    @model_validator(mode="after")
    def _consistent(self) -> ServeConfig:
        if not self.models and self.upstream is None:
            raise ValueError("there is nothing to serve; name a model or an upstream")
        names = [model.name for model in self.models]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(
                f"two models are called {', '.join(sorted(twice))}; give each a name of its own, NAME=PATH"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both a certificate and a key file")
        if self.require_keys and self.store is None:
            raise ValueError("keys are required but there is no store of keys; give --store FILE")
        return self

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
