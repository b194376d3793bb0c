"""Prometheus metrics under vLLM's names, so that the dashboards people have show this server too.

Names and labels are those of vLLM 0.32 (prefix `vllm:`, labels model_name and engine). What the engine counts comes
with its `stats()`; what clients see is measured here. Each app has a registry of its
own: two in one process do not meet.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from shoestring.serve.generation import Tally

LABELS = ("model_name", "engine")
FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
SLOW = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """All series of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._counted: dict[tuple[str, str], float] = {}
        gauge = self._gauge
        self.running = gauge("num_requests_running", "Requests in the engine.")
        self.waiting = gauge("num_requests_waiting", "Requests waiting for their turn.")
        self.kv = gauge("kv_cache_usage_perc", "Share of the cache in use (1 is all of it).")
        counter = self._counter
        self.prompt = counter("prompt_tokens", "Prompt tokens of all calls.")
        self.cached = counter("prompt_tokens_cached", "Prompt tokens that came from the prefix cache.")
        self.generated = counter("generation_tokens", "Tokens generated.")
        self.engine_counters = {  # by the engine's own names
            "prefix_cache_queries": counter("prefix_cache_queries", "Tokens looked up in the prefix cache."),
            "prefix_cache_hits": counter("prefix_cache_hits", "Tokens found in the prefix cache."),
            "num_preemptions": counter("num_preemptions", "Sequences put back for want of memory."),
            "spec_decode_num_drafts": counter("spec_decode_num_drafts", "Drafts made."),
            "spec_decode_num_draft_tokens": counter("spec_decode_num_draft_tokens", "Tokens drafted."),
            "spec_decode_num_accepted_tokens": counter("spec_decode_num_accepted_tokens", "Drafted tokens kept."),
        }
        self.accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Drafted tokens kept, by place in the draft.", "position"
        )
        self.success = counter("request_success", "Answers finished.", "finished_reason")
        self.rejected = counter("admission_rejections", "Requests refused.", "reason")
        histogram = self._histogram
        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", FAST)
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens of a call.", FAST)
        self.per_token = histogram("request_time_per_output_token_seconds", "Mean of a call's tokens.", FAST)
        self.e2e = histogram("e2e_request_latency_seconds", "From arrival to the end.", SLOW)
        self.queued = histogram("request_queue_time_seconds", "Waiting for its turn.", SLOW)
        self.inference = histogram("request_inference_time_seconds", "In the engine.", SLOW)
        self.prefill = histogram("request_prefill_time_seconds", "From its turn to the first token.", SLOW)
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.", SLOW)
        self.prompt_size = histogram("request_prompt_tokens", "Prompt tokens of a call.", SIZES)
        self.answer_size = histogram("request_generation_tokens", "Tokens of an answer.", SIZES)
        self.max_tokens = histogram("request_params_max_tokens", "max_tokens asked for.", SIZES)
        self.n = histogram("request_params_n", "n asked for.", (1, 2, 5, 10, 20))

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, LABELS, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"vllm:{name}", text, (*LABELS, *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, LABELS, buckets=buckets, registry=self.registry)

    def finished(self, model: str, tally: Tally, *, max_tokens: int, n: int) -> None:
        """A call has ended, one way or another."""
        now = time.monotonic()
        labels = (model, "0")
        self.prompt.labels(*labels).inc(tally.prompt)
        self.cached.labels(*labels).inc(tally.cached)
        self.generated.labels(*labels).inc(tally.completion)
        for reason in tally.finish.values():
            self.success.labels(*labels, reason).inc()
        self.e2e.labels(*labels).observe(now - tally.began)
        self.prompt_size.labels(*labels).observe(tally.prompt)
        self.max_tokens.labels(*labels).observe(max_tokens)
        self.n.labels(*labels).observe(n)
        if tally.started is not None:
            self.queued.labels(*labels).observe(tally.started - tally.began)
            self.inference.labels(*labels).observe(now - tally.started)
        if tally.first is None or tally.last is None:
            return
        self.ttft.labels(*labels).observe(tally.first - tally.began)
        if tally.started is not None:
            self.prefill.labels(*labels).observe(tally.first - tally.started)
        self.decode.labels(*labels).observe(tally.last - tally.first)
        self.answer_size.labels(*labels).observe(tally.completion / max(1, len(tally.finish)))
        gap = self.itl.labels(*labels)
        for seconds in tally.gaps:
            gap.observe(seconds)
        if tally.completion > 1:
            self.per_token.labels(*labels).observe((tally.last - tally.first) / (tally.completion - 1))

    def left(self, model: str) -> None:
        """The client went away; vLLM's word for it."""
        self.success.labels(model, "0", "abort").inc()

    def refused(self, model: str, reason: str) -> None:
        self.rejected.labels(model, "0", reason).inc()

    def engine(self, model: str, stats: Mapping[str, Any], *, waiting: int) -> None:
        """What the engine says of itself, just before it is shown."""
        labels = (model, "0")
        self.running.labels(*labels).set(stats.get("running", 0))
        self.waiting.labels(*labels).set(waiting + stats.get("waiting", 0))
        self.kv.labels(*labels).set(stats.get("kv_used", 0.0))
        for name, counter in self.engine_counters.items():
            value = float(stats.get(name, 0))
            before = self._counted.get((model, name), 0.0)
            # an engine that was started again counts from zero
            gained = value - before if value >= before else value
            counter.labels(*labels).inc(gained)
            if name == "spec_decode_num_accepted_tokens":  # drafts are one token long
                self.accepted_at.labels(*labels, "0").inc(gained)
            self._counted[model, name] = value

    def text(self) -> bytes:
        return generate_latest(self.registry)
