"""Strict configs: round trips, digests, --set, and sentences for every mistake."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from shoestring.core.config import Config, read_mapping
from shoestring.core.errors import UserError, without_password


class Optim(Config):
    lr: float = 1
    betas: tuple[float, float] = (0.9, 0.95)


class Pretrain(Config):
    kind: Literal["pretrain"] = "pretrain"
    name: str
    steps: int = Field(10, ge=1)
    optim: Optim | None = None


class Rl(Config):
    kind: Literal["rl"] = "rl"
    name: str
    group_size: int = 8

    @model_validator(mode="after")
    def _even(self) -> Rl:
        if self.group_size % 2:
            raise UserError("group_size must be even")
        return self


class Recipe(Config):
    name: str = "r"
    stages: tuple[Annotated[Pretrain | Rl, Field(discriminator="kind")], ...] = (Pretrain(name="base"), Rl(name="grpo"))
    weights: dict[str, float] = {}
    verbose: bool = False
    note: str | None = None


FINITE = st.floats(allow_nan=False, allow_infinity=False)
RECIPES = st.builds(
    Recipe,
    name=st.text(),
    stages=st.lists(
        st.one_of(
            st.builds(
                Pretrain, name=st.text(), steps=st.integers(1, 10**12), optim=st.none() | st.builds(Optim, lr=FINITE)
            ),
            st.builds(Rl, name=st.text(), group_size=st.integers(0, 50).map(lambda n: 2 * n)),
        )
    ).map(tuple),
    weights=st.dictionaries(st.text(), FINITE),
    verbose=st.booleans(),
    note=st.none() | st.text(),
)


@given(RECIPES)
def test_json_round_trip_is_exact(recipe):
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.to_json() == recipe.to_json()
    assert again.digest() == recipe.digest()


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
@settings(max_examples=30)
@given(recipe=RECIPES)
def test_files_round_trip(suffix, recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / f"recipe{suffix}"
    recipe.save(path)
    assert Recipe.load(path) == recipe


def test_the_digest_is_of_the_resolved_values():
    assert len(Recipe().digest()) == 12
    assert Recipe().digest() == Recipe(name="r", verbose=False).digest()
    assert Optim().digest() == Optim(lr=1.0).digest() == Optim(lr=1).digest()
    assert Recipe().digest() != Recipe(verbose=True).digest()


def test_the_digest_sees_the_fields_of_subclasses():
    class Wide(Optim):
        momentum: float = 0.5

    one, other = Pretrain(name="a", optim=Wide()), Pretrain(name="a", optim=Wide(momentum=0.6))
    assert one.digest() != other.digest()


@pytest.mark.parametrize(
    ("assignment", "read"),
    [
        ("name=x", lambda r: r.name == "x"),
        ("name=12", lambda r: r.name == "12"),
        ('name="true"', lambda r: r.name == "true"),
        ("stages.base.steps=7", lambda r: r.stages[0].steps == 7),
        ("stages.base.steps=1e6", lambda r: r.stages[0].steps == 1_000_000),
        ("stages.1.group_size=4", lambda r: r.stages[1].group_size == 4),
        ("stages.base.optim.lr=1e-4", lambda r: r.stages[0].optim.lr == 1e-4),
        ("stages.base.optim.betas=[0.8, 0.9]", lambda r: r.stages[0].optim.betas == (0.8, 0.9)),
        ("weights.correct=2", lambda r: r.weights == {"correct": 2.0}),
        ("verbose=true", lambda r: r.verbose is True),
        ("verbose=True", lambda r: r.verbose is True),
        ("note=a=b", lambda r: r.note == "a=b"),
        ("note=null", lambda r: r.note is None),
    ],
)
def test_set(assignment, read):
    recipe = Recipe()
    assert read(recipe.with_set(assignment))
    assert recipe == Recipe()  # frozen: the original is as it was


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("nme=x", r'unknown key "nme"\. Did you mean "name"\?'),
        ("stages.base.stepz=1", r'unknown key "stages\.0\.stepz"\. Did you mean "steps"\?'),
        ("stages.bse.steps=1", r'no item is named "bse"\. Did you mean "base"\?'),
        ("stages.2.steps=1", "stages has 2 items, numbered from 0"),
        ("stages.base.steps=0", r'"stages\.0\.steps" must be greater than or equal to 1, not 0'),
        ("stages.base.steps=many", r'"stages\.0\.steps" must be a valid integer, not \'many\''),
        ("stages.base.optim.lrr=1", r'unknown key "stages\.0\.optim\.lrr"\. Did you mean "lr"\?'),
        ("stages.grpo.group_size=3", r"stages\.1: group_size must be even"),
        ("verbose=maybe", r'"verbose" must be a valid boolean'),
        ("name.x=1", '"name" is a single value'),
        ("name", "not of the form"),
        ("=1", "not of the form"),
    ],
)
def test_set_mistakes_say_where_and_how_to_mend(assignment, sentence):
    with pytest.raises(UserError, match=sentence):
        Recipe().with_set(assignment)


class Band(Config):
    low: int = 1
    high: int = 2
    name: str = "x"

    @model_validator(mode="after")
    def _ordered(self):
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        return self


@pytest.mark.parametrize("given", [["low=5", "high=6"], ["high=6", "low=5"], ["low=5", "name=7", "high=1e1", "high=6"]])
def test_values_that_are_valid_together_are_taken_in_any_order(given):
    made = Band().with_sets(given)
    assert (made.low, made.high) == (5, 6)
    assert made.name == ("7" if len(given) == 4 else "x")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["low=5", "high=4"], r"^--set low=5: low 5 is not below high 2|^--set: low 5 is not below high 4"),
        (["low=5", "hihg=6"], r'unknown key "hihg"\. Did you mean "high"\?'),
        (["low=many", "high=6"], r'^--set low=many: "low" must be a valid integer'),
        (["low=5"], r"^--set low=5: low 5 is not below high 2"),
        (["low=5", "high"], r"low 5 is not below|not of the form"),
    ],
)
def test_values_that_are_not_are_said(given, sentence):
    with pytest.raises(UserError, match=sentence):
        Band().with_sets(given)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Optim(lrate=1), r'^Optim: unknown key "lrate"\.'),
        (lambda: Optim(lr="1"), '"lr" must be a valid number'),
        (lambda: Optim(lr=float("nan")), '"lr" must be a finite number'),
        (lambda: Rl(name="x", group_size=True), '"group_size" must be a valid integer'),
        (lambda: Rl(name="x", group_size=2.0), '"group_size" must be a valid integer'),
        (lambda: Rl(), '"name" is missing'),
        (lambda: Rl(nam="x"), r'unknown key "nam"\. Did you mean "name"\?.*and 1 more'),
        (lambda: Recipe.from_dict({"stages": [{"kind": "sft"}]}), "sft"),
        (lambda: Recipe.from_dict({"name": {1, 2}}), "no JSON form"),
        (lambda: Recipe.from_json("{"), "Invalid JSON"),
    ],
)
def test_mistakes_in_python_are_one_sentence(make, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().name = "x"


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.json", '{"name": "x", "name": "y"}', 'key "name" is given twice'),
        ("a.json", "{", "is not valid JSON"),
        ("a.yaml", "name: x\nname: y\n", "line 1.*given twice"),
        ("a.yaml", "name: [x\n", "is not valid YAML"),
        ("a.yaml", "- 1\n", "mapping at its top"),
        ("a.toml", "name = 1", r"must end in \.json, \.yaml or \.yml"),
        ("a.yaml", "nmae: x\n", r'a\.yaml: unknown key "nmae"'),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=sentence):
        Recipe.load(tmp_path / name)
    with pytest.raises(UserError, match="There is no file"):
        Recipe.load(tmp_path / "absent.json")


def test_yaml_is_read_as_people_mean_it(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("lr: 1e-4\nanswer: no\nday: 2024-01-01\nn: 010\nnothing:\nflag: true\n")
    expected = {"lr": 1e-4, "answer": "no", "day": "2024-01-01", "n": 10, "nothing": None, "flag": True}
    assert read_mapping(path) == expected


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://ann:s3cret@db.example/traces#mine", "postgresql://ann:s3cret:x@db/traces",
        "postgresql:///traces?user=ann&password=s3cret#mine", "https://ann:s3cret@host/v1",
    ],
)  # fmt: skip
def test_no_password_is_shown(address):
    assert "s3cret" not in without_password(address) and "ann" in without_password(address)
    assert without_password("postgresql://ann@db:5432/traces") == "postgresql://ann@db:5432/traces"
