"""What configurations of stages are made of: problems, text, a model, an optimiser, how to compute and to sample."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from shoestring.core.config import Config
from shoestring.core.errors import UserError
from shoestring.core.nouns import Sampling
from shoestring.optim.schedules import Schedule


class TaskMix(Config):
    """Problems of one task: which kinds (all when empty), how hard (uniform in the range), how often."""

    task: str
    kinds: tuple[str, ...] = ()
    difficulty: tuple[int, int] = (4, 4)
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> TaskMix:
        low, high = self.difficulty
        if not 1 <= low <= high:
            raise UserError(f"difficulty of {self.task} is {self.difficulty}; give two numbers from 1 up, in order.")
        return self


class Textbook(Config):
    """Worked solutions written by the tasks themselves. `long_share` of them think step by step, the rest
    answer at once; the rarity of the long voice is a construction, stated wherever results are shown."""

    mix: tuple[TaskMix, ...] = Field(min_length=1)
    long_share: float = Field(0.2, ge=0.0, le=1.0)


class TextFiles(Config):
    """A corpus of the user's: .txt files (one document each) or .jsonl files with a "text" field."""

    files: tuple[str, ...] = Field(min_length=1)


class ModelSpec(Config):
    """A model to make from nothing: the family is a file of models/, the rest its Hugging Face config keys."""

    family: str
    config: dict[str, Any]


def _folder_name(name: str) -> str:
    if not name or name[0] in "./-" or not name.isprintable() or "/" in name or "\\" in name or len(name) > 80:
        raise ValueError(f"{name!r} becomes part of a folder's name: up to 80 characters, no slash, no dot in front")
    return name


Name = Annotated[str, AfterValidator(_folder_name)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Optim(Config):
    """The optimiser and its schedule. Defaults are DeepSeek-V3's (section 4.2) where it states them."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    warmup_steps: int = Field(20, ge=0)
    schedule: Schedule = "wsd"
    final_ratio: float = Field(0.1, ge=0)
    decay_share: float = Field(0.2, ge=0, le=1)


class Compute(Config):
    """How products are computed. "auto" measures on this machine at this model's sizes and is recorded."""

    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    experts: Literal["auto", "loop", "bmm", "grouped"] = "auto"
    device: str = "cpu"
    threads: int | None = Field(None, ge=1, le=1024)  # None: as many as torch takes; tens of thousands would crash it


class Decoding(Config):
    """Sampling of a stage, without its seed and count."""

    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(128, ge=1)

    def sampling(self, *, n: int, seed: int, stop_ids: tuple[int, ...], routed_experts: bool = False) -> Sampling:
        return Sampling(n=n, seed=seed, stop_ids=stop_ids, routed_experts=routed_experts, **self.model_dump())


def teacher_roles(inputs: Iterable[str]) -> tuple[str, ...]:
    """The inputs that are teachers, in order: "teacher", "teacher2", "teacher3", ..."""
    return tuple(sorted((role for role in inputs if is_teacher(role)), key=lambda role: int(role[7:] or 1)))


def store_roles(inputs: Iterable[str]) -> tuple[str, ...]:
    """The inputs that are stores of logits, in order: "logits", "logits2", ..."""
    return tuple(sorted((role for role in inputs if is_store(role)), key=lambda role: int(role[6:] or 1)))


def is_store(role: str) -> bool:
    """Whether an input of this name is a store of logits."""
    return re.fullmatch(r"logits([2-9]|[1-9][0-9]+)?", role) is not None


def is_teacher(role: str) -> bool:
    """Whether an input of this name is a teacher."""
    return re.fullmatch(r"teacher([2-9]|[1-9][0-9]+)?", role) is not None


class StageBase(Config):
    """What every stage has. `headline` stages are the final run; the others are controls, ablations, evaluation."""

    name: Name
    inputs: dict[str, str] = {}
    headline: bool = True
    seed: int = 0
    compute: Compute = Compute()


class TrainBase(StageBase):
    """What every training stage has."""

    steps: int | None = Field(None, ge=1)
    match_flops: tuple[str, ...] = ()
    spent_flops: tuple[str, ...] = ()  # inputs whose FLOPs are taken off that budget: what was sampled for this stage
    optim: Optim
    tokens_per_microbatch: int = Field(8192, ge=1)
    checkpoint_every: int = Field(20, ge=1)  # steps: what a kill costs at most
    mtp_lambda: float = Field(0.0, ge=0)  # weight of the MTP loss (V3: 0.3, then 0.1)
    balance_alpha: float = Field(1e-4, ge=0)  # sequence-wise balance loss (V3: 1e-4)
    bias_gamma: float = Field(1e-3, ge=0)  # step of the auxiliary-loss-free bias (V3: 1e-3)

    @model_validator(mode="after")
    def _one_budget(self) -> TrainBase:
        if (self.steps is None) == (not self.match_flops):
            raise UserError(f'stage "{self.name}": give either steps or match_flops, not both or neither.')
        for key in ("match_flops", "spent_flops"):
            if missing := [role for role in getattr(self, key) if role not in self.inputs]:
                raise UserError(f'stage "{self.name}": {key} names "{missing[0]}", which is not among its inputs.')
        if self.spent_flops and not self.match_flops:
            raise UserError(f'stage "{self.name}": spent_flops is taken off a budget of match_flops; give that too.')
        return self
