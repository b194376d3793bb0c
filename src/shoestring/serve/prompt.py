"""Chat requests to token ids: the checkpoint's own template, with what it cannot express put into words.

`developer` is `system`. Thinking that clients send back (`reasoning_content`, `reasoning`, or tags at the head of the
content) is kept only after the last user turn, as R1's template does. Tools, tool results and the thinking switch go
to the template where it knows them; where it does not, tools are told of in a system turn, their results in a user
turn, and thinking is switched by writing its opening tag, or both tags, after the generation prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoestring.core.errors import UserError
from shoestring.serve.errors import bad
from shoestring.serve.protocol import ChatMessage, ChatRequest, NamedTool, Tool
from shoestring.serve.reasoning import is_open, think_ids
from shoestring.serve.tools import told_in_words
from shoestring.text.chat import render_turns
from shoestring.text.tokenizer import END_THINK, THINK, Tokenizer

SWITCHES = ("enable_thinking", "thinking")
BUDGET_SHARE = {"minimal": 0.1, "low": 0.25, "medium": 0.5}  # of the new tokens, where the template knows no effort


@dataclass(frozen=True)
class ChatPrompt:
    """What goes to the engine: ids, whether thinking is open at their end, and the effort left to a budget."""

    ids: list[int]
    opened: bool
    budget_share: float | None


def chat_prompt(request: ChatRequest, tokenizer: Tokenizer) -> ChatPrompt:
    """Render a chat. Raises ApiError 400 for what the template refuses."""
    template = tokenizer.chat_template
    if template is None:
        raise bad("this model has no chat template; use /v1/completions.", "messages", "no_chat_template")
    tools = offered(request)
    variables = dict(request.chat_template_kwargs or {})
    thinking = _thinking(request, variables)
    if thinking is not None:
        variables |= {name: thinking for name in SWITCHES if name in template}
    effort = request.reasoning_effort
    knows_effort = "reasoning_effort" in template
    if knows_effort and effort is not None:
        variables["reasoning_effort"] = effort
    if tools and "tools" in template:
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    turns = as_turns(request.messages, template)
    if tools and "tools" not in template:
        turns = _with_words(turns, told_in_words(tools))
    going_on = bool(request.continue_final_message)
    if going_on and request.add_generation_prompt:
        raise bad("`continue_final_message` excludes `add_generation_prompt`.", "continue_final_message")
    asks = not going_on and request.add_generation_prompt is not False
    ids = _render(turns, tokenizer, going_on, asks, variables)
    if thinking is not None and asks and not any(name in template for name in SWITCHES):
        ids = _switched(ids, thinking, tokenizer)
    share = None if knows_effort or effort is None else BUDGET_SHARE.get(effort)
    return ChatPrompt(ids, is_open(ids, tokenizer), share)


def offered(request: ChatRequest) -> list[Tool]:
    """The tools that may be called: none for tool_choice "none", one when it names one."""
    tools = request.tools or []
    choice = request.tool_choice
    if choice is not None and choice != "none" and not tools:
        raise bad("`tool_choice` is given without `tools`.", "tool_choice")
    if choice == "none":
        return []
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            raise bad(f'`tool_choice` names "{choice.function.name}", which is not among `tools`.', "tool_choice")
        return named
    return tools


def as_turns(messages: Sequence[ChatMessage], template: str) -> list[dict[str, Any]]:
    """Messages as templates read them."""
    last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
    turns = []
    for index, message in enumerate(messages):
        if message.role == "tool" and "tool" not in template.replace("tools", ""):
            words = f"<tool_response>\n{message.text}\n</tool_response>"
            turns.append({"role": "user", "content": words})
        elif message.role == "assistant":
            turns.append(_assistant(message, template, keep=index > last_user))
        else:
            role = "system" if message.role == "developer" else message.role
            turn = {"role": role, "content": message.text}
            if message.tool_call_id is not None:
                turn["tool_call_id"] = message.tool_call_id
            if message.name is not None:
                turn["name"] = message.name
            turns.append(turn)
    return turns


def _assistant(message: ChatMessage, template: str, *, keep: bool) -> dict[str, Any]:
    content, thought = message.text, message.reasoning_content or message.reasoning
    if thought is None and content.lstrip().startswith(THINK) and END_THINK in content:
        thought, _, content = content.lstrip().removeprefix(THINK).partition(END_THINK)
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    if thought is not None and keep:
        turn["reasoning_content"] = thought
    if message.tool_calls:
        calls = [{"name": call.function.name, "arguments": _arguments(call.function.arguments)} for call in
                 message.tool_calls]  # fmt: skip
        if "tool_calls" in template:
            ids = [call.id for call in message.tool_calls]
            turn["tool_calls"] = [
                {"id": index, "type": "function", "function": call} for index, call in zip(ids, calls, strict=True)
            ]
        else:
            written = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
            turn["content"] = "\n".join([content, *written] if content else written)
    return turn


def _arguments(text: str) -> Any:
    """Templates read arguments as an object; what is not one stays a string."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _with_words(turns: list[dict[str, Any]], words: str) -> list[dict[str, Any]]:
    if turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{words}"}, *turns[1:]]
    return [{"role": "system", "content": words}, *turns]


def _render(
    turns: list[dict[str, Any]], tokenizer: Tokenizer, going_on: bool, asks: bool, variables: dict[str, Any]
) -> list[int]:
    known = {"messages", "add_generation_prompt"} & set(variables)
    if known or any(not name.isidentifier() for name in variables):
        raise bad("`chat_template_kwargs` holds names that a template cannot be given.", "chat_template_kwargs")
    try:
        return render_turns(turns, tokenizer, variables, continue_final=going_on, ask=asks)
    except UserError as error:
        raise bad(str(error), "messages", "template_error") from None


def _thinking(request: ChatRequest, variables: dict[str, Any]) -> bool | None:
    """The switch: OpenAI's effort "none", DeepSeek's `thinking`, or the template's own variable."""
    for name in SWITCHES:
        if isinstance(variables.get(name), bool):
            return bool(variables[name])
    if request.thinking is not None:
        return request.thinking.type == "enabled"
    if request.reasoning_effort is not None:
        return request.reasoning_effort != "none"
    return None


def _switched(ids: list[int], thinking: bool, tokenizer: Tokenizer) -> list[int]:
    tags = think_ids(tokenizer)
    if tags is None:
        return ids
    opened = is_open(ids, tokenizer)
    if thinking:
        return ids if opened else [*ids, tags[0]]
    return [*ids, tags[1]] if opened else [*ids, *tags]
