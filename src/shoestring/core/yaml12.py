"""YAML as people think it is: `1e-4` is a number, `no` and `2024-01-01` are strings, no key stands twice.

PyYAML reads YAML 1.1, where `lr: 1e-4` is a string and `answer: no` is false. This is its safe loader with the
core schema of YAML 1.2 (true/false, null, integers, floats) in place of those surprises.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from shoestring.core.errors import UserError

_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_SCALARS = {  # name: (pattern, what it may begin with; "\0" stands for the empty scalar)
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (_FLOAT, "-+.0123456789"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f'key "{key}" is given twice', node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        key: list(rules) for key, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):  # the dumper must quote every string that the loader would read otherwise
        _first_chars = [char if char != "\0" else "" for char in _first]
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first_chars)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def _string(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """YAML counts these as line breaks or nothing at all, and only double quotes keep them."""
    quoted = any(char in text for char in "\x85\u2028\u2029\ufeff")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _string)


def read_yaml(text: str, path: Path) -> Any:
    """The value of a YAML document. Raises UserError naming `path` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line} is not valid YAML: {getattr(error, 'problem', None) or error}.") from None


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML that `read_yaml` reads back to equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
