"""Events of the engine to the older text completions, with `echo` and logprobs of the prompt as lm-eval reads them.

Of a request with `echo` and `logprobs` the arrays have one entry for each prompt token and each generated one; the
first is null, the last is the generated token even when it ends the text: whoever cuts `[:-1]` loses that one only.
Streamed, the echoed prompt comes with the first token, for then the engine has read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoestring.core.nouns import Completion, Event, TokenLogprobs
from shoestring.serve.generation import Part, Tally
from shoestring.serve.protocol import CompletionRequest
from shoestring.serve.served import Served
from shoestring.serve.shapes import LegacyLogprobs, prompt_logprobs, routed_experts


class CompletionWriter:
    """`feed` gives the `choices` entries of chunks; `whole` all choices."""

    def __init__(self, request: CompletionRequest, parts: list[Part], texts: list[str], served: Served) -> None:
        self._request, self._parts, self._prompts, self._served = request, parts, texts, served
        self._n = request.n or 1
        count = len(parts) * self._n
        self._text: list[list[str]] = [[] for _ in range(count)]
        self._done: list[Completion | None] = [None] * count
        self._finish: list[str | None] = [None] * count
        self._offset = [len(texts[index // self._n]) if request.echo else 0 for index in range(count)]
        self.silent = request.max_tokens == 0  # only the prompt was asked about
        self._scored = request.echo and request.logprobs is not None

    def begin(self) -> list[dict[str, Any]]:
        """Echoed prompts come first."""
        if not self._request.echo or self._scored:
            return []
        return [self._chunk(index, self._prompts[index // self._n], None, None) for index in range(len(self._text))]

    def feed(self, index: int, event: Event, tally: Tally) -> list[dict[str, Any]]:
        text = "" if self.silent else event.text
        if self.silent:  # the engine reads prompts by going one token on; nobody asked for that
            tally.completion -= len(event.token_ids)
        self._text[index].append(text)
        if event.finish_reason is not None:
            self._done[index] = event.completion
            self._finish[index] = tally.finish[index] = str(event.finish_reason)
        elif not text and self._request.logprobs is None:
            return []
        if self._scored and event.prompt_logprobs is not None:
            prompt = self._echoed(index, event.prompt_logprobs)
            return [prompt, self._told(index, event, self._finish[index])]
        return [self._told(index, event, self._finish[index])]

    def _echoed(self, index: int, scores: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """The chunk of the prompt with its logprobs; where its tokens end, the offsets of what follows go on."""
        legacy = self._of_prompt(index, scores)
        ids = self._parts[index // self._n].ids
        self._offset[index] = sum(len(self._served.texts.text(token)) for token in ids)
        return self._chunk(index, self._prompts[index // self._n], legacy.fields, None)

    def _of_prompt(self, index: int, scores: Sequence[TokenLogprobs | None]) -> LegacyLogprobs:
        legacy = self._legacy(0)
        for token, pairs in zip(self._parts[index // self._n].ids, scores, strict=True):
            legacy.add(token, None if pairs is None else pairs[0][1], None if pairs is None else pairs[1:])
        return legacy

    def _told(self, index: int, event: Event, finish: str | None) -> dict[str, Any]:
        text, logprobs = "" if self.silent else event.text, None
        if self._request.logprobs is not None:
            legacy = self._legacy(self._offset[index])
            pairs = [] if self.silent else zip(event.token_ids, event.logprobs, strict=True)
            for place, (token, value) in enumerate(pairs):
                legacy.add(token, value, event.top_logprobs[place] if event.top_logprobs else None)
            self._offset[index] += sum(len(self._served.texts.text(token)) for token in event.token_ids)
            logprobs = legacy.fields
        entry = self._chunk(index, text, logprobs, finish)
        return entry if finish is None else entry | self._more(index)

    def _more(self, index: int) -> dict[str, Any]:
        """Fields of a finished choice that were asked for."""
        request, completion = self._request, self._done[index]
        assert completion is not None
        found: dict[str, Any] = {}
        if request.return_token_ids:
            found["token_ids"] = [] if self.silent else completion.token_ids
            found["prompt_token_ids"] = self._parts[index // self._n].ids
        if request.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(completion.prompt_logprobs, self._served.texts)
        if request.routed_experts:
            found["routed_experts"] = routed_experts(completion)
        return found

    @staticmethod
    def _chunk(index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _legacy(self, offset: int) -> LegacyLogprobs:
        as_ids = bool(self._request.return_tokens_as_token_ids)
        return LegacyLogprobs(self._served.texts, count=self._request.logprobs or 0, as_ids=as_ids, offset=offset)

    def whole(self) -> list[dict[str, Any]]:
        return [self._choice(index) for index in range(len(self._text))]

    def _choice(self, index: int) -> dict[str, Any]:
        request, completion = self._request, self._done[index]
        assert completion is not None
        text = "".join(self._text[index])
        entry = self._chunk(
            index, (self._prompts[index // self._n] if request.echo else "") + text, None, self._finish[index]
        )
        if request.logprobs is not None:
            scores = completion.prompt_logprobs or []
            legacy = self._of_prompt(index, scores) if request.echo else self._legacy(0)
            if not self.silent:
                for place, (token, value) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
                    legacy.add(token, value, completion.top_logprobs[place] if completion.top_logprobs else None)
            entry["logprobs"] = legacy.fields
        return entry | self._more(index)

    def extras(self) -> dict[str, Any]:
        return {}

    def texts(self) -> tuple[str, ...]:
        return tuple("".join(pieces) for pieces in self._text)
