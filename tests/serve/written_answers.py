"""A provider whose answers are written down: what the page's tests ask."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

EVIL = """Look: <img src=x onerror="window.hacked=1"> <script>window.hacked = 1</script>
<a href="javascript:window.hacked=1">a</a> [b](javascript:window.hacked=1) ![c](https://example.com/pixel.png)

```html
<script>window.hacked = 1</script>
```

<svg onload="window.hacked=1"></svg> $<img src=x onerror="window.hacked=1">$"""

MARKDOWN = r"""## How the sum goes

Adding **digit by digit** keeps only the *last digit*, so `(a + b) % 10` is enough:

1. begin with $a_0 = 3$;
2. add each operand, $a_{i+1} = (a_i + b_i) \bmod 10$;
   - never carry
   - never look back
3. say the last one.

$$\sum_{i=1}^{n} b_i = \frac{n(n+1)}{2} \quad\text{and}\quad \sqrt{x^2 + 1} \le \left|x\right| + 1$$

| step | digit |
|------|-------|
| 1 | 8 |
| 2 | 2 |

```python
def last_digit(numbers: list[int]) -> int:
    return sum(numbers) % 10
```

> The answer is $\boxed{2}$. See [the report](https://example.com/report)."""

THOUGHT = "3 + 8 is 11, so 1.\n1 + 4 is 5.\nCheck: 3 + 8 + 4 = 15, last digit 5."


class Provider(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    left = threading.Event()
    count = 0
    seen: list[dict[str, Any]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        data = json.dumps({"data": [{"id": name, "object": "model"} for name in ("teacher", "student")]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append(asked)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        try:
            self._answer(asked, asked["messages"][-1]["content"])
        except OSError:
            self.left.set()

    def _answer(self, asked: dict[str, Any], question: str) -> None:
        Provider.count += 1
        if question.startswith("repeat "):  # repeat 3 "ab" says ababab
            _, count, text = question.split(" ", 2)
            whole = json.loads(text) * int(count)
            for start in range(0, len(whole), 1000):
                self._say({"content": whole[start : start + 1000]})
        elif "slowly" in question:
            for word in ["a", "thought", "that", "takes", "its", "time", "and", "then", "some", "more", "of", "it"] * 8:
                self._say({"reasoning_content": word + " "})
                time.sleep(0.05)
            self._speak("Done thinking.")
        elif "evil" in question:
            self._speak(EVIL)
        elif "markdown" in question:
            self._speak(MARKDOWN)
        elif "endless" in question:
            for number in range(100_000):
                self._say({"content": f"{number} "})
                time.sleep(0.02)
        elif "think" in question:
            for word in THOUGHT.split(" "):
                self._say({"reasoning_content": word + " "})
                time.sleep(0.01)
            self._speak("The last digit is **5**.")
        elif "half" in question:
            self._speak("Half of it")
            return
        else:
            self._speak(f"{asked['model']} answers number {Provider.count}.")
        usage = {"prompt_tokens": 12, "completion_tokens": 20, "total_tokens": 32}
        self._send({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self._send({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _speak(self, text: str) -> None:
        for start in range(0, len(text), 7):
            self._say({"content": text[start : start + 7]})

    def _say(self, delta: dict[str, Any]) -> None:
        text = delta.get("content") or delta["reasoning_content"]
        other = {"token": "x<b>", "logprob": -2.3, "bytes": None}
        entry = {
            "token": text,
            "logprob": -0.1,
            "bytes": None,
            "top_logprobs": [{"token": text, "logprob": -0.1}, other],
        }
        self._send({"choices": [{"index": 0, "delta": delta, "logprobs": {"content": [entry]}, "finish_reason": None}]})

    def _send(self, document: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps({'id': 'c', 'object': 'chat.completion.chunk', **document})}\n\n".encode())
        self.wfile.flush()


@contextmanager
def provider() -> Iterator[str]:
    """Its address, ending in /v1."""
    found = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{found.server_address[1]}/v1"
    finally:
        found.shutdown()
        found.server_close()
