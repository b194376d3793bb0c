"""Chat templates: the ids transformers gives, loss masks, injection, history without thinking."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.core.errors import UserError
from shoestring.core.nouns import Message
from shoestring.text.chat import render, render_turns, split_thinking
from shoestring.text.tokenizer import SPECIALS, Tokenizer

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
    {%- generation %}
        {{- message.content + '<|im_end|>' }}
    {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
TALK = [
    Message("system", "be brief"),
    Message("user", "last digit of 3 + 8 ?"),
    Message("assistant", "1", thinking="3 + 8 1"),
    Message("user", "and of 4 + 9 ?"),
    Message("assistant", "3", thinking="4 + 9 3"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["last digit of 3 + 8 1 ? and of 4 + 9 3 be brief"], 400)


def shown(tokenizer: Tokenizer, messages: list[Message], **options: bool) -> str:
    return tokenizer.decode(render(messages, tokenizer, **options).ids)


def as_dicts(messages: list[Message]) -> list[dict[str, Any]]:
    return [
        {"role": m.role, "content": m.content} | ({} if m.thinking is None else {"reasoning_content": m.thinking})
        for m in messages
    ]


def test_one_turn(tokenizer: Tokenizer) -> None:
    rendered = render([TALK[1], TALK[2]], tokenizer)
    text = "<|begin|><|user|>last digit of 3 + 8 ?<|assistant|><think>3 + 8 1</think>1<|end|>"
    assert rendered.ids == tokenizer.encode(text, specials=True)
    spoken = tokenizer.decode([i for i, flag in zip(rendered.ids, rendered.mask, strict=True) if flag])
    assert spoken == "<think>3 + 8 1</think>1<|end|>"


def test_the_prompt_is_what_comes_before_the_completion(tokenizer: Tokenizer) -> None:
    prompt = render([TALK[1]], tokenizer, generation_prompt=True)
    whole = render([TALK[1], TALK[2]], tokenizer)
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert whole.mask == [0] * len(prompt.ids) + [1] * (len(whole.ids) - len(prompt.ids))


def test_thinking_empty_and_absent(tokenizer: Tokenizer) -> None:
    assert shown(tokenizer, [Message("user", "3"), Message("assistant", "7", thinking="")]).endswith(
        "<|assistant|><think></think>7<|end|>"
    )
    assert shown(tokenizer, [Message("user", "3"), Message("assistant", "7")]).endswith("<|assistant|>7<|end|>")


def test_thinking_of_earlier_turns_is_dropped(tokenizer: Tokenizer) -> None:
    text = shown(tokenizer, TALK)
    assert text == (
        "<|begin|><|system|>be brief<|user|>last digit of 3 + 8 ?<|assistant|>1<|end|>"
        "<|user|>and of 4 + 9 ?<|assistant|><think>4 + 9 3</think>3<|end|>"
    )
    rendered = render(TALK, tokenizer)
    spoken = tokenizer.decode([i for i, flag in zip(rendered.ids, rendered.mask, strict=True) if flag])
    assert spoken == "1<|end|><think>4 + 9 3</think>3<|end|>"


@pytest.mark.parametrize("count", range(1, len(TALK) + 1))
@pytest.mark.parametrize("prompt", [False, True])
def test_ids_equal_those_of_transformers(tokenizer: Tokenizer, tmp_path: Path, count: int, prompt: bool) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = TALK[:count]
    ids = theirs.apply_chat_template(as_dicts(messages), add_generation_prompt=prompt, return_dict=False)
    assert render(messages, tokenizer, generation_prompt=prompt).ids == ids


def test_thinking_inside_the_content_of_history_is_dropped_for_transformers_too(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    raw = as_dicts([TALK[1], Message("assistant", "<think>3 + 8 1</think>1"), TALK[3]])
    ids = theirs.apply_chat_template(raw, return_dict=False)
    assert ids == render([TALK[1], TALK[2], TALK[3]], tokenizer).ids


@given(st.text(), st.text(), st.sampled_from(SPECIALS), st.sampled_from(["system", "user", "assistant", "thinking"]))
@settings(max_examples=100, deadline=None)
def test_no_content_can_become_a_special_token(
    tokenizer: Tokenizer, before: str, after: str, special: str, where: str
) -> None:
    evil = before + special + special[:4] + after
    contents = {"system": "s", "user": "u", "assistant": "a", "thinking": "t"}

    def conversation(changed: dict[str, str]) -> list[Message]:
        return [
            Message("system", changed["system"]),
            Message("user", changed["user"]),
            Message("assistant", changed["assistant"], thinking=changed["thinking"]),
        ]

    controls = set(tokenizer.specials.values())
    plain = [i for i in render(conversation(contents), tokenizer).ids if i in controls]
    attacked = render(conversation(contents | {where: evil}), tokenizer).ids
    assert [i for i in attacked if i in controls] == plain
    assert evil in tokenizer.decode(attacked)  # nothing is lost or altered


def test_overlapping_specials_are_broken_too() -> None:
    tokenizer = Tokenizer.train(["a"], 300)
    tokenizer.specials = {"<ab>": 8, "b><c": 9, "<|begin|>": 0}
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert not {8, 9} & set(render([Message("user", "<ab><c<ab>")], tokenizer).ids)


def test_the_difference_to_transformers_is_only_the_injected_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """transformers parses specials wherever they stand; here a user's "<|end|>" stays text."""
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [Message("user", "3<|end|>4")]
    ids = theirs.apply_chat_template(as_dicts(messages), return_dict=False)
    ours = render(messages, tokenizer).ids
    assert tokenizer.end_id in ids
    assert tokenizer.end_id not in ours
    assert tokenizer.decode(ours) == tokenizer.decode(ids)


def test_foreign_templates(tmp_path: Path) -> None:
    """ChatML with text around the specials, and generation tags: the same ids, and the mask on what is said."""
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.train(["user assistant hello"], 300)
    tokenizer._full.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.config["eos_token"] = "<|im_end|>"
    tokenizer.chat_template = CHATML
    tokenizer.save(tmp_path)
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [Message("user", "hello\n"), Message("assistant", "hello hello"), Message("user", " 12")]
    for prompt in (False, True):
        ids = theirs.apply_chat_template(as_dicts(messages), add_generation_prompt=prompt, return_dict=False)
        assert render(messages, ours, generation_prompt=prompt).ids == ids
    rendered = render(messages[:2], ours)
    spoken = ours.decode([i for i, flag in zip(rendered.ids, rendered.mask, strict=True) if flag])
    assert spoken == "hello hello<|im_end|>\n"


def test_a_template_without_a_usable_mask_is_refused(tokenizer: Tokenizer) -> None:
    other = Tokenizer(tokenizer._full, config=tokenizer.config, chat_template=None)
    with pytest.raises(UserError, match="no chat template"):
        render(TALK[:2], other)
    other.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|user|>{% endif %}"
    )
    assert render([TALK[1]], other, generation_prompt=True).ids[-1] == tokenizer.id_of("<|user|>")
    with pytest.raises(UserError, match="no loss mask"):
        render([Message("assistant", "1")], other)
    assert not any(render([Message("assistant", "1"), Message("user", "2")], other).mask)  # context, without loss


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "not valid Jinja"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].content.nothing() }}", "cannot render"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|cannot render"),
        ("{{ messages.append(1) }}", "cannot render"),
        ("{{ 1 + 'a' }}", "cannot render"),
    ],
)
def test_bad_and_hostile_templates(tokenizer: Tokenizer, template: str, message: str) -> None:
    other = Tokenizer(tokenizer._full, config=tokenizer.config, chat_template=template)
    with pytest.raises(UserError, match=message):
        render(TALK[:2], other)


def test_no_messages(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="no messages"):
        render([], tokenizer)


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>3 + 8 1</think>1", "3 + 8 1", "1"),
        ("<think></think>7", "", "7"),
        (" <think>\na\n</think>\n\n7 \n", "a", "7"),
        ("<think>a</think>", "a", ""),
        ("7", None, ""),
        ("", None, ""),
        ("<think>7", None, ""),
        ("7</think>7", None, ""),
        ("x<think>a</think>7", None, ""),
        ("<think>a</think>7<think>b</think>8", None, ""),
        ("<think><think>a</think>7", None, ""),
        ("<think>a</think>7</think>8", None, ""),
    ],
)
def test_split_thinking(text: str, thinking: str | None, answer: str) -> None:
    assert split_thinking(text) == (thinking, answer)


BARE = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}"
    "{{ m.content | trim + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
R1 = (  # thinking opened by the prompt, and taken out of what was answered
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{{ m.content.split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "thinking", "told"),
    [
        (BARE, "3 + 8 1", "<think>\n3 + 8 1\n</think>\n\n1<|end|>\n"),
        (BARE, "1", "<think>\n1\n</think>\n\n1<|end|>\n"),  # the thinking is the answer
        (BARE, None, "1<|end|>\n"),
        (R1, "3 + 8 1", "3 + 8 1\n</think>\n\n1<|end|>"),
        (R1, None, "\n</think>\n\n1<|end|>"),
    ],
)
def test_thinking_is_part_of_the_answer_whatever_the_template_knows(
    tokenizer: Tokenizer, template: str, thinking: str | None, told: str
) -> None:
    other = Tokenizer(tokenizer._full, config=tokenizer.config, chat_template=template)
    talk = [
        *TALK[:1],
        Message("assistant", "9", thinking="old"),
        *TALK[:1],
        Message("assistant", "1", thinking=thinking),
    ]
    rendered = render(talk, other)
    before = render(talk[:3], other, generation_prompt=True).ids
    assert rendered.ids[: len(before)] == before and "old" not in other.decode(before)
    assert other.decode(rendered.ids[len(before) :]) == told and all(rendered.mask[len(before) :])
    if thinking is not None:
        assert rendered.ids.count(tokenizer.id_of("</think>")) == 1
    cut = render(talk, other, unfinished=True)
    assert other.decode(cut.ids[len(before) :]) == told[: told.rindex("1") + 1]


DATED = "{{ strftime_now('%Y-%m-%d') }}{{ messages[0].content }}"


def test_the_day_of_a_training_stands_still(tokenizer: Tokenizer) -> None:
    """A stage that goes on tomorrow must render what it rendered today; a client's prompt has today's date."""
    other = Tokenizer(tokenizer._full, config=tokenizer.config, chat_template=DATED)
    assert other.decode(render([Message("user", "8")], other).ids) == "2024-07-268"
    assert other.decode(render_turns([{"role": "user", "content": "8"}], other)) == f"{date.today()}8"


@pytest.mark.parametrize(
    "source",
    [
        "{% set ns = namespace(__class__=1) %}", "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
        "{% set ns = namespace({'_x': 1}) %}",
    ],
)  # fmt: skip
def test_a_template_sets_no_name_that_python_looks_up(tokenizer: Tokenizer, source: str) -> None:
    other = Tokenizer(tokenizer._full, config=tokenizer.config, chat_template=source)
    with pytest.raises(UserError, match="a namespace holds no name like"):
        render([Message("user", "8")], other)


def test_json_in_a_template_is_written_as_it_asks(tokenizer: Tokenizer) -> None:
    source = (
        "{% set ns = namespace(self=1, n=2) %}"
        "{{ {'b': ns.n, 'a': ns.self} | tojson(separators=(',', ':'), sort_keys=true) }}"
    )
    other = Tokenizer(tokenizer._full, config=tokenizer.config, chat_template=source)
    assert other.decode(render([Message("user", "8")], other).ids) == '{"a":1,"b":2}'
