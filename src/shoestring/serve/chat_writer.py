"""Events of the engine to OpenAI's chat answers: as chunks of a stream, or folded into one message.

There is one way: the deltas. A message that is not streamed is the sum of the deltas that would have been.
"""

from __future__ import annotations

from typing import Any

from shoestring.core.nouns import Completion, Event
from shoestring.serve.generation import Tally
from shoestring.serve.prompt import ChatPrompt, offered
from shoestring.serve.protocol import ChatRequest, NamedTool
from shoestring.serve.reasoning import Splitter
from shoestring.serve.served import Served
from shoestring.serve.shapes import chat_logprobs, prompt_logprobs, routed_experts
from shoestring.serve.tools import BARE, CallParser, writing_of


class _Choice:
    """One sample: where it stands, and what it has said."""

    def __init__(self, splitter: Splitter, parser: CallParser | None) -> None:
        self.splitter = splitter
        self.parser = parser
        self.spoken = False  # the role has been sent
        self.pending: list[dict[str, Any]] = []  # logprobs whose text is held back
        self.ids: list[int] = []
        self.content: list[str] = []
        self.thinking: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish: str | None = None
        self.completion: Completion | None = None


class ChatWriter:
    """`feed` gives the `choices` entries of chunks; `message` the whole of a choice."""

    def __init__(self, request: ChatRequest, prompt: ChatPrompt, served: Served, *, alias: bool) -> None:
        self._request, self._served, self._alias, self._prompt = request, served, alias, prompt
        template = served.tokenizer.chat_template
        tools = offered(request)
        forced = isinstance(request.tool_choice, NamedTool) or request.tool_choice == "required"
        limit = 1 if request.parallel_tool_calls is False else None
        writing = BARE if forced else writing_of(template)
        self._choices = [
            _Choice(
                Splitter(served.tokenizer, opened=prompt.opened),
                CallParser(writing, limit=limit) if tools else None,
            )
            for _ in range(request.n or 1)
        ]

    def begin(self) -> list[dict[str, Any]]:
        """The chunk that opens each choice."""
        return [self._entry(index, {"role": "assistant", "content": ""}) for index in range(len(self._choices))]

    def feed(self, index: int, event: Event, tally: Tally) -> list[dict[str, Any]]:
        """What an event adds to a choice."""
        choice, request = self._choices[index], self._request
        last = event.finish_reason is not None
        before = choice.splitter.reasoning_tokens
        thinking, answer = choice.splitter.feed(event.token_ids, event.text, last=last)
        tally.reasoning += choice.splitter.reasoning_tokens - before
        choice.ids += event.token_ids
        if request.logprobs:
            choice.pending += chat_logprobs(
                event.token_ids, event.logprobs, event.top_logprobs, request.top_logprobs or 0, self._served.texts,
                bool(request.return_tokens_as_token_ids),
            )  # fmt: skip
        deltas = self._deltas(choice, thinking, answer, last)
        entries = [self._entry(index, delta, choice) for delta in deltas]
        if last:
            choice.completion = event.completion
            choice.finish = self._reason(choice, str(event.finish_reason))
            tally.finish[index] = choice.finish
            entries.append(self._entry(index, {}, choice))
        return entries

    def _deltas(self, choice: _Choice, thinking: str, answer: str, last: bool) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if thinking:
            choice.thinking.append(thinking)
            deltas.append(self._thought(thinking))
        calls = []
        if choice.parser is not None:
            parsed = choice.parser.feed(answer, last=last)
            answer, calls = parsed.text, parsed.calls
        if answer:
            choice.content.append(answer)
            deltas.append({"content": answer})
        for piece in calls:
            self._gather(choice, piece)
            deltas.append({"tool_calls": [piece]})
        return deltas

    def _thought(self, text: str) -> dict[str, Any]:
        return {"reasoning_content": text} | ({"reasoning": text} if self._alias else {})

    @staticmethod
    def _gather(choice: _Choice, piece: dict[str, Any]) -> None:
        if "id" in piece:
            choice.calls.append({k: v for k, v in piece.items() if k != "index"} | {"function": {**piece["function"]}})
        else:
            choice.calls[-1]["function"]["arguments"] += piece["function"]["arguments"]

    @staticmethod
    def _reason(choice: _Choice, reason: str) -> str:
        return "tool_calls" if reason == "stop" and choice.calls else reason

    def _entry(self, index: int, delta: dict[str, Any], choice: _Choice | None = None) -> dict[str, Any]:
        entry: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if choice is not None:
            if choice.pending:
                entry["logprobs"] = {"content": choice.pending, "refusal": None}
                choice.logprobs += choice.pending
                choice.pending = []
            entry["finish_reason"] = choice.finish
            if choice.finish is not None:
                entry |= self._more(choice)
        return entry

    def _more(self, choice: _Choice) -> dict[str, Any]:
        """Fields of a finished choice that were asked for."""
        found: dict[str, Any] = {}
        if self._request.return_token_ids:
            found["token_ids"] = choice.ids
        if self._request.routed_experts and choice.completion is not None:
            found["routed_experts"] = routed_experts(choice.completion)
        return found

    def message(self, index: int) -> dict[str, Any]:
        """A whole choice."""
        choice, request = self._choices[index], self._request
        content: str | None = "".join(choice.content)
        thinking = "".join(choice.thinking)
        if not content and (choice.calls or (choice.finish == "length" and choice.splitter.opened)):
            content = None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        message |= self._thought(thinking) if choice.splitter.opened else {"reasoning_content": None}
        if choice.calls:
            message["tool_calls"] = choice.calls
        entry: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": {"content": choice.logprobs, "refusal": None} if request.logprobs else None,
            "finish_reason": choice.finish,
        }
        return entry | self._more(choice)

    def whole(self) -> list[dict[str, Any]]:
        return [self.message(index) for index in range(len(self._choices))]

    def extras(self) -> dict[str, Any]:
        """Fields beside `choices` that were asked for."""
        found: dict[str, Any] = {}
        if self._request.return_token_ids:
            found["prompt_token_ids"] = self._prompt.ids
        first = self._choices[0].completion
        if self._request.prompt_logprobs is not None and first is not None:
            found["prompt_logprobs"] = prompt_logprobs(first.prompt_logprobs, self._served.texts)
        return found

    def texts(self) -> tuple[str, ...]:
        """Everything said, thinking included, for hooks and the audit."""
        return tuple("".join(c.thinking) + "".join(c.content) for c in self._choices)
