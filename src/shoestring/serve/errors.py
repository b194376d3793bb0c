"""What goes wrong in a request, in the shape OpenAI's clients read: {"error": {message, type, param, code}}.

Statuses (facts of OpenAI, DeepSeek and vLLM): 400 the request, 401 no such key, 402 credit used up, 403 not allowed,
404 unknown model or path, 409 the same Idempotency-Key with another body, 413 too large, 429 this key's own limits,
502 the upstream, 503 full, draining or without its engine, 504 too slow. Clients of OpenAI try again on 408, 409, 429
and 5xx unless `x-should-retry: false`; `Retry-After` tells them when.
"""

from __future__ import annotations

import json
import math
from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    502: "upstream_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer other than 200. `retry_after` in seconds; `retry` False tells clients not to try again."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after: float | None = None, retry: bool | None = None, type: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.retry = retry
        self.type = type or TYPES.get(status, "server_error")
        self.more: dict[str, str] = {}  # headers: how the key stands with its limits

    def body(self) -> dict[str, Any]:
        """The JSON document of the answer, and of an error in the middle of a stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        found = dict(self.more)
        if self.retry_after is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.retry is not None:
            found["x-should-retry"] = "true" if self.retry else "false"
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found

    def raw(self) -> bytes:
        return json.dumps(self.body()).encode()


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A mistake in the request."""
    return ApiError(400, message, param=param, code=code)
