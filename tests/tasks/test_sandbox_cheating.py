"""Attacks on the verdict, on every layer: nothing but the right values is right."""

from __future__ import annotations

import pytest

from shoestring.tasks.sandbox import Program, Sandbox

from .conftest import call

GOLD = "gold-7f3a91"
CHEATS = {
    "leave early": "import os\nos._exit(0)",
    "leave early in the call": "import os\ndef f(): os._exit(0)",
    "exit": "import sys\nsys.exit(0)",
    "equal to everything": """
class Equal(str):
    def __eq__(self, other): return True
    __hash__ = None
def f(): return Equal("x")
""",
    "patched builtins": """
import builtins
builtins.all = builtins.isinstance = lambda *_: True
def f(): return "x"
""",
    "patched json": """
import json
json.dumps = lambda *_, **__: '{"test": 0, "ok": true, "passed": true}'
def f(): return 1
""",
    "claims on the reply pipe": """
import os
def f():
    for fd in range(64):
        for text in (b'{"test":0,"ok":true}\\n', b'{"test":0,"value":true}\\n', b"\\x00" * 64, b"[" * 1000 + b"\\n"):
            try: os.write(fd, text)
            except OSError: pass
    os._exit(0)
""",
    "search the frames": f"""
import sys
def f():
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            if "{GOLD[:6]}" in str(value) and value is not frame.f_globals.get("f"):
                return str(value)
        frame = frame.f_back
    return "nothing"
""",
    "search all objects": f"""
import gc
def f():
    target = "{GOLD[::-1]}"[::-1]
    found = any(isinstance(thing, (list, tuple)) and target in thing for thing in gc.get_objects())
    return target if found else "nothing"
""",
    "nothing": "",
    "no such function": "def g(): pass",
    "not Python": "def f(",
    "another type": "def f(): return ['gold-7f3a91']",
    "bytes": "def f(): return b'gold-7f3a91'",
    "a lone surrogate": "def f(): return '\ud800'",
    "a null character": "def f(): return 1\0",
}
REMEMBER = """
import sys
def f(reversed):  # reversed, or the word would be found in this program's own job
    buffers, frame = [], sys._getframe()
    while frame:
        for value in frame.f_locals.values():
            if isinstance(value, (bytes, bytearray, memoryview)):
                buffers.append(bytes(getattr(value, "obj", value)))
        frame = frame.f_back
    return [len(buffers) > 1, any(reversed[::-1].encode() in buffer for buffer in buffers)]
"""


@pytest.mark.parametrize("name", CHEATS)
def test_is_not_right(sandbox: Sandbox, name: str) -> None:
    outcome = call(sandbox, CHEATS[name], expected=GOLD)
    assert not outcome.ok and outcome.passed == (False,)


def test_first_reply_counts(sandbox: Sandbox) -> None:
    source = 'import os, json\ndef f(x):\n    os.write(3, b\'{"test":0,"value":0}\\n\')\n    return x'
    assert call(sandbox, source, 5, expected=5).values == (0,)


def test_nothing_is_left_of_an_earlier_program(sandbox: Sandbox) -> None:
    told = "earlier-answer-5511"
    first = Program(source=f"def f(): return {told!r}", entry="f", tests=(((), told),))
    spy = Program(source=REMEMBER, entry="f", tests=(((told[::-1],), [True, False]),))
    outcomes = sandbox.run([first, spy])
    assert outcomes[0].ok and outcomes[1].ok, outcomes


def test_values_are_compared_strictly(sandbox: Sandbox) -> None:
    cases = [
        ("1", 1, True), ("1.0", 1, True), ("True", 1, False), ("1", True, False), ("'1'", 1, False), ("None", 0, False),
        ("None", None, True), ("(1, 2)", [1, 2], True), ("[1, 2, 3]", [1, 2], False), ("0.1 + 0.2", 0.3, True),
        ("float('nan')", 1.0, False), ("float('inf')", 1e308, False), ("{'a': [1]}", {"a": [1]}, True),
        ("{'a': 1, 'b': 2}", {"a": 1}, False), ("10 ** 400", 1.5, False), ("0.3000001", 0.3, False),
    ]  # fmt: skip
    programs = [Program(source=f"def f(): return {text}", entry="f", tests=(((), want),)) for text, want, _ in cases]
    assert [outcome.ok for outcome in sandbox.run(programs)] == [ok for _, _, ok in cases]
