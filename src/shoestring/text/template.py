"""Chat templates as programs: Jinja2, sandboxed, in the environment that `transformers` gives them.

What a stranger's template may do is write text: nothing it is given can be changed, no attribute that begins with an
underscore is read or set, and Jinja2 is of a version without known ways out of its sandbox. One difference to
`transformers`: the date of `strftime_now` stands still unless who asks gives another, because a training that goes on
tomorrow must render what it rendered today.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from shoestring.core.errors import UserError

DAY = datetime(2024, 7, 26)  # what Llama's templates say themselves where no date is to be had


def fill(
    source: str, turns: list[dict[str, Any]], specials: dict[str, str], generation_prompt: bool,
    variables: dict[str, Any] | None = None,
) -> str:  # fmt: skip
    """The text that the template makes of the turns. Raises UserError for a template that is none, or that fails."""
    given = {**(variables or {}), **specials, "messages": turns, "add_generation_prompt": generation_prompt}
    try:
        return _compiled(source).render(given)
    except (jinja2.TemplateError, TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as error:
        raise UserError(f"the chat template cannot render these messages: {error}.") from error


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    """The template in its environment (trimmed blocks, loop controls, tojson, ...)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise, strftime_now=DAY.strftime, namespace=_Names)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid Jinja (line {error.lineno}): {error.message}.") from error


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Names(Namespace):
    """Jinja's namespace without names that Python itself looks up."""

    def __init__(*given: Any, **names: Any) -> None:  # as Jinja's: a template may call a name "self"
        whole = dict(*given[1:], **names)
        for name in whole:
            _check(name)
        Namespace.__init__(given[0], whole)

    def __setitem__(self, name: str, value: Any) -> None:
        _check(name)
        super().__setitem__(name, value)


def _check(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace holds no name like {name!r}")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}` of published templates: rendered as if the tags were not there."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
