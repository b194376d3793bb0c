"""Strict, frozen configs with a JSON round trip, a digest and `--set a.b=c`.

An unknown key, a wrong type or a value out of range is a `UserError` of one sentence that says where it is and,
for a misspelt key, what was probably meant. JSON is the truth: a config read from YAML, changed by `--set` or made
in Python passes the same validation, and the digest is taken of the canonical JSON of the *resolved* config.
Left out: environment variables, interpolation, includes. A recipe is a Python function; it can compute.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, Union, get_args, get_origin

import pydantic
from pydantic import BaseModel, ConfigDict

from shoestring.core.atomic import write_text
from shoestring.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # the same class by a public road


class _Strict(ModelMetaclass):
    """Turns pydantic's error into a sentence at the outermost call only, so that nested paths stay whole."""

    if not TYPE_CHECKING:

        def __call__(cls, *args: Any, **values: Any) -> Any:
            try:
                return super().__call__(*args, **values)
            except pydantic.ValidationError as error:
                raise _sentence(cls, error, cls.__name__) from None


class Config(BaseModel, metaclass=_Strict):
    """Base of every config: frozen, strict types (an int is a fine float), unknown keys refused, no NaN."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,  # a default of 1 for a float is 1.0, as it is after a round trip
        protected_namespaces=(),
    )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, subclasses' fields included."""
        return self.model_dump(mode="json", serialize_as_any=True)

    def to_json(self) -> str:
        """Indented JSON of every field, defaults resolved."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "") -> Self:
        """Validate JSON values. `where` (a file, an option) begins the sentence when something is wrong."""
        return cls.from_json(json.dumps(values, default=_not_json), where=where)

    @classmethod
    def from_json(cls, text: str, *, where: str = "") -> Self:
        """Read what `to_json` wrote. Raises UserError."""
        try:
            return cls.model_validate_json(text)
        except pydantic.ValidationError as error:
            raise _sentence(cls, error, where or cls.__name__) from None

    def digest(self) -> str:
        """12 hex digits of the canonical JSON: equal configs have equal digests, on any machine."""
        return digest_of(self.to_dict())

    def save(self, path: str | Path) -> Path:
        """Write as .json or .yaml, atomically."""
        return write_text(Path(path), _dump_text(self.to_dict(), Path(path)))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a .json or .yaml file of this schema. Raises UserError naming the file."""
        return cls.from_dict(read_mapping(path), where=str(path))

    def with_set(self, assignment: str) -> Self:
        """One value changed: "a.b=c". c is read as JSON, else as a string; items go by index or by their `name`.

        >>> recipe.with_set("stages.sft.steps=200").with_set("stages.0.name=warm")
        """
        path, given, text = assignment.partition("=")
        if not given or not path.strip():
            raise UserError(f'--set "{assignment}" is not of the form key.key=value.')
        keys = path.strip().split(".")
        refused: UserError | None = None
        for value in _readings(text.strip()):
            values = self.to_dict()
            _assign(values, keys, value, path.strip())
            try:
                return self.from_dict(values, where=f"--set {assignment}")
            except UserError as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def with_sets(self, assignments: Iterable[str]) -> Self:
        """All values changed, in order: each by `with_set`; where one is refused, all at once, for they may be valid
        only together. Raises UserError for what is wrong then."""
        given, config = list(assignments), self
        try:
            for assignment in given:
                config = config.with_set(assignment)
        except UserError as error:
            if len(given) == 1:
                raise
            alone = error
        else:
            return config
        parts = [assignment.partition("=") for assignment in given]
        refused: UserError | None = None
        for values in itertools.islice(itertools.product(*(_readings(text.strip()) for *_, text in parts)), 64):
            changed = self.to_dict()
            for (path, equals, _), value in zip(parts, values, strict=True):
                if not equals or not path.strip():
                    raise alone
                _assign(changed, path.strip().split("."), value, path.strip())
            try:
                return self.from_dict(changed, where="--set")
            except UserError as error:
                refused = refused or error
        assert refused is not None
        raise alone if _body(alone) == _body(refused) else refused


def _body(error: UserError) -> str:
    """What is wrong, without the assignment that was named first."""
    text = str(error)
    return text[text.index(": ") :] if text.startswith("--set") and ": " in text else text


def digest_of(value: Any) -> str:
    """12 hex digits of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


# ---- files ------------------------------------------------------------------------------------------------------


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a .json or .yaml file; a key given twice is refused. Raises UserError naming the file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}.") from None
    if path.suffix == ".json":
        try:
            values = json.loads(text, object_pairs_hook=_no_twice)
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}.") from None
    elif path.suffix in (".yaml", ".yml"):
        from shoestring.core.yaml12 import read_yaml  # only those who use YAML load it

        values = read_yaml(text, path)
    else:
        raise UserError(f"{path} must end in .json, .yaml or .yml.")
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping at its top, not {type(values).__name__}.")
    return values


def _dump_text(values: dict[str, Any], path: Path) -> str:
    if path.suffix == ".json":
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    if path.suffix in (".yaml", ".yml"):
        from shoestring.core.yaml12 import dump_yaml

        return dump_yaml(values)
    raise UserError(f"{path} must end in .json, .yaml or .yml.")


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'key "{next(key for key in keys if keys.count(key) > 1)}" is given twice')
    return values


def _not_json(value: Any) -> Any:
    raise UserError(f"{value!r} ({type(value).__name__}) has no JSON form; use numbers, strings, lists and mappings.")


# ---- --set ------------------------------------------------------------------------------------------------------


_PYTHON_WORDS = {"True": True, "False": False, "None": None}


def _readings(text: str) -> list[Any]:
    """What `text` may mean, likeliest first: JSON; 1e6 as a whole number; the bare string."""
    if text in _PYTHON_WORDS:
        return [_PYTHON_WORDS[text], text]
    try:
        value = json.loads(text)
    except ValueError:
        return [text]
    readings = [value]
    if isinstance(value, float) and value.is_integer():
        readings.append(int(value))
    if not isinstance(value, str):
        readings.append(text)
    return readings


def _assign(values: dict[str, Any], keys: list[str], value: Any, path: str) -> None:
    """Set values[keys...] = value in place. Keys that do not exist are left to validation to judge in a mapping."""
    here: Any = values
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        where = ".".join(keys[:depth])
        slot: Any = key
        if isinstance(here, list):
            slot = _item(here, key, where)
        elif not isinstance(here, dict):
            raise UserError(f'--set {path}: "{where}" is a single value and has no "{key}" in it.')
        if last:
            here[slot] = value
            return
        if isinstance(here, dict) and here.get(slot) is None:
            here[slot] = {}
        here = here[slot]


def _item(items: list[Any], key: str, where: str) -> int:
    if key.isdigit():
        if int(key) < len(items):
            return int(key)
        raise UserError(f"--set {where}.{key}: {where} has {len(items)} items, numbered from 0.")
    names = [item.get("name") for item in items if isinstance(item, dict)]
    if names.count(key) == 1:
        return names.index(key)
    if key in names:
        raise UserError(f'--set {where}.{key}: several items are named "{key}"; use their number (from 0).')
    raise UserError(f'--set {where}.{key}: no item is named "{key}".{did_you_mean(key, [n for n in names if n])}')


# ---- sentences --------------------------------------------------------------------------------------------------


def _sentence(model: type[BaseModel], error: pydantic.ValidationError, where: str) -> UserError:
    """The first complaint as one sentence (and how many more there are)."""
    problems = _likeliest(model, error.errors(include_url=False))
    # a misspelt key is the cause of the key that is then missing
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    loc = [str(part) for part in first["loc"]]
    place = ".".join(_walk(model, loc)[1])
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
    if first["type"] == "extra_forbidden":
        text = f'unknown key "{place}".{_instead(model, loc)}'
    elif first["type"] == "missing":
        text = f'"{place}" is missing.'
    elif first["type"] in ("value_error", "assertion_error"):
        text = f"{place}: {message}" if place else message
        text += "" if text.endswith("?") else "."
    elif first["type"] == "too_short":
        text = (
            f'"{place}" needs at least {first["ctx"]["min_length"]} item(s), and has {first["ctx"]["actual_length"]}.'
        )
    elif place:
        must = message.replace("Input should", "must").replace("String should", "must")
        text = f'"{place}" {must}, not {_short(first["input"])}.'
    else:
        text = f"{message}."
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return UserError(f"{where}: {text}{more}")


def _likeliest(model: type[BaseModel], problems: list[Any]) -> list[Any]:
    """Where a value fits no member of a union, the complaints of the member that it is nearest to."""
    for start in [problem["loc"] for problem in problems]:
        for depth in range(len(start)):
            rivals = [problem for problem in problems if problem["loc"][:depth] == start[:depth]]
            tags = list(dict.fromkeys(problem["loc"][depth] for problem in rivals if len(problem["loc"]) > depth))
            if len(tags) < 2 or len(_choices(_walk(model, [str(part) for part in start[:depth]])[0])) < 2:
                continue
            by_tag = [[problem for problem in rivals if problem["loc"][depth] == tag] for tag in tags]
            nearest = min(by_tag, key=_distance)
            return _likeliest(model, [problem for problem in problems if problem not in rivals or problem in nearest])
    return problems


def _distance(problems: list[Any]) -> tuple[int, int, int]:
    shape = sum(problem["type"] in ("extra_forbidden", "missing") for problem in problems)
    return shape, len(problems), -max(len(problem["loc"]) for problem in problems)


def _instead(model: type[BaseModel], loc: list[str]) -> str:
    """What was probably meant by an unknown key: another name, or another form of what holds it."""
    key, outer = loc[-1], _walk(model, loc[:-2])[0] if len(loc) > 2 else None
    if loc[-2:-1] in [[member.__name__] for member in _choices(outer) if _is_model(member)]:
        whole = _walk(model, loc[:-1])[1][-1]
        if key in _field_names(outer):
            return f' It belongs to another form of {whole}; give that whole: {whole}={{"{key}": ...}}.'
    return did_you_mean(key, _field_names(_walk(model, loc[:-1])[0]))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _walk(annotation: Any, loc: list[str]) -> tuple[Any, list[str]]:
    """Follow pydantic's path through annotations; the keys a user wrote, without the tags of unions."""
    keys = []
    for part in loc:
        annotation, written = _step(annotation, part)
        if written:
            keys.append(part)
    return annotation, keys


def _step(annotation: Any, key: str) -> tuple[Any, bool]:
    """The annotation one step further: a field, an item, or (not written by a user) the member of a union."""
    members = _members(annotation)
    if len(_choices(annotation)) > 1:  # a member by pydantic's name: a class, a tag, "int", "tuple[int, ...]"
        return next((member for member in members if key in _tags(member)), None), False
    for member in members:
        if _is_model(member) and key in member.model_fields:
            return member.model_fields[key].annotation, True
    for member in members:
        if get_origin(member) in (tuple, list, dict):
            inner = [part for part in get_args(member) if part is not Ellipsis]
            return (inner[-1] if inner else None), True
    return None, True


def _members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, without Annotated and Union around them."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _choices(annotation: Any) -> list[Any]:
    """The members of a union, None aside; of anything else itself."""
    return [member for member in _members(annotation) if member is not type(None)]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _field_names(annotation: Any) -> list[str]:
    return [name for member in _members(annotation) if _is_model(member) for name in member.model_fields]


def _tags(member: Any) -> set[str]:
    """What pydantic's path calls a member of a union: a class by its name or by the value of a Literal field (of a
    discriminated union), another type as it is written."""
    if not _is_model(member):
        return {str(member), getattr(member, "__name__", "")}
    values = [value for field in member.model_fields.values() for value in get_args(field.annotation)]
    return {member.__name__, *(value for value in values if isinstance(value, str))}
