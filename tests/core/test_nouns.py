"""The nouns every package shares: what they refuse, and that a trace survives a round trip."""

from __future__ import annotations

import dataclasses

import pytest

from shoestring.core.contracts import Generator, LedgerEntry, Teacher
from shoestring.core.errors import UserError, did_you_mean
from shoestring.core.nouns import Sampling, Trace

TRACE = Trace(
    id="t1",
    teacher="rl-quickstart-0123",
    teacher_reported="0123",
    messages=[{"role": "user", "content": "3 + 4 ?"}],
    thinking="3 + 4 7",
    answer="7",
    prompt_ids=[1, 2],
    token_ids=None,
    finish_reason="stop",
    task="questions",
    problem_id="p1",
    correct=True,
    decoding={"temperature": 1.0},
    usage={"prompt_tokens": 2, "completion_tokens": 3},
    cost_usd=0.0,
    licence="unknown",
    date="2026-01-31T00:00:00+00:00",
)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"min_p": 1.5},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"repetition_penalty": 0.0},
        {"min_new_tokens": -1},
        {"top_logprobs": -1},
        {"prompt_logprobs": -1},
        {"thinking_budget": -1},
        {"logit_bias": {3: float("inf")}},
        {"stop": "text"},
        {"stop": ("a", "")},
    ],
)
def test_sampling_refuses_what_cannot_be_sampled(wrong):
    with pytest.raises(UserError, match=rf"sampling\.{next(iter(wrong))}"):
        Sampling(**wrong)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens 9 is more than max_new_tokens 8"),
        ({"json_schema": "{}", "regex": "a"}, "json_schema and regex exclude each other"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos excludes"),
        ({"regex": "a", "min_new_tokens": 2}, "min_new_tokens excludes"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Sampling(**options)


def test_a_trace_survives_a_round_trip():
    assert Trace.from_dict(TRACE.to_dict()) == TRACE


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": 2}, "trace t1 has schema 2; this version reads schema 1"),
        ({"mood": "good"}, r"unknown field\(s\) mood"),
        ({"licence": None}, r"lacks field\(s\) licence"),
    ],
)
def test_a_trace_of_another_schema_is_refused(change, sentence):
    row = {**TRACE.to_dict(), **change}
    row = {key: value for key, value in row.items() if key != "licence" or value is not None}
    with pytest.raises(UserError, match=sentence):
        Trace.from_dict(row)


def test_did_you_mean():
    assert did_you_mean("quickstrat", ["quickstart", "r1"]) == ' Did you mean "quickstart"?'
    assert did_you_mean("zzz", ["b", "a"]) == " Known: a, b."
    assert did_you_mean("zzz", []) == did_you_mean("zzz", [f"{n:03d}" for n in range(100)]) == ""


def test_protocols_can_be_asked_at_run_time():
    class Double:
        name, licence = "x", "y"

        def answer(self, questions, sampling): ...

    assert isinstance(Double(), Teacher)
    assert not isinstance(Double(), Generator)


def test_a_ledger_entry_names_its_schema():
    assert {field.name: field.default for field in dataclasses.fields(LedgerEntry)}["schema"] == 1
