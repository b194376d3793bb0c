"""The configuration of every stage. Loads no torch, so that a dry run is instant.

A stage names its inputs by role: the value is an earlier stage of the same recipe, a run directory, or (for
models) a Hugging Face folder or id. Budgets are steps and tokens, never the clock. `match_flops` makes a control:
the stage trains until it has spent the training FLOPs of the named inputs together, less those of `spent_flops`, and
`steps` must be absent.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shoestring.core.config import Config
from shoestring.core.errors import UserError
from shoestring.train.configs_base import Compute as Compute
from shoestring.train.configs_base import Decoding, ModelSpec, Name, StageBase, TaskMix, Textbook, TextFiles, TrainBase
from shoestring.train.configs_base import Optim as Optim
from shoestring.train.configs_base import is_store as is_store
from shoestring.train.configs_base import is_teacher as is_teacher
from shoestring.train.configs_distill import CaptureStage, DistillStage, PruneStage
from shoestring.train.configs_distill import HiddenStates as HiddenStates
from shoestring.train.configs_distill import Lora as Lora


class TokenizerStage(StageBase):
    """Train a tokenizer on a corpus."""

    stage: Literal["tokenizer"] = "tokenizer"
    corpus: Textbook | TextFiles
    vocab_size: int = Field(512, ge=64)
    documents: int = Field(2000, ge=1)


class PretrainStage(TrainBase):
    """Next-token training on a stream of documents, from nothing (`model`) or from input "model"."""

    stage: Literal["pretrain"] = "pretrain"
    model: ModelSpec | None = None
    corpus: Textbook | TextFiles
    corpus_seed: int = 0
    corpus_tokens: int = Field(ge=1)  # the stream is made once and read in a seeded order, again when it ends
    row_tokens: int = Field(256, ge=8)
    tokens_per_step: int = Field(8192, ge=1)
    isolate: bool = False  # documents whole and blind to each other in a row; V3 cuts a stream without a mask

    @model_validator(mode="after")
    def _one_start(self) -> PretrainStage:
        if (self.model is None) == ("model" not in self.inputs):
            raise UserError(f'stage "{self.name}": give either a model spec or an input "model" to continue from.')
        return self


class SftStage(TrainBase):
    """Supervised fine-tuning with loss on the completion only: on the textbook as chat, or on input "traces"."""

    stage: Literal["sft"] = "sft"
    textbook: Textbook | None = None
    problems: int = Field(1000, ge=1)  # distinct problems taken from the textbook
    row_tokens: int = Field(256, ge=8)
    examples_per_step: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> SftStage:
        if (self.textbook is None) == ("traces" not in self.inputs):
            raise UserError(f'stage "{self.name}": give either a textbook or an input "traces".')
        return self


class RlStage(TrainBase):
    """GRPO with rule-based rewards. problems_per_step x group_size completions make one step."""

    stage: Literal["rl"] = "rl"
    mix: tuple[TaskMix, ...] = Field(min_length=1)
    rewards: dict[str, float] = Field({"correct": 1.0}, min_length=1)
    problems_per_step: int = Field(32, ge=1)
    group_size: int = Field(8, ge=2)
    minibatches: int = Field(1, ge=1)  # optimiser updates a rollout
    decoding: Decoding = Decoding()
    row_tokens: int = Field(256, ge=8)
    advantage: Literal["grpo", "dr_grpo"] = "grpo"
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.28, gt=0)
    kl_beta: float = Field(0.0, ge=0)
    reference_every: int = Field(400, ge=1)  # steps between copies of the policy to the reference (R1: 400)
    max_tries: int = Field(2, ge=1)  # dynamic sampling: rounds of problems until enough groups carry signal
    preflight_problems: int = Field(64, ge=0)  # 0: no check that RL can help
    preflight_samples: int = Field(16, ge=2)
    minimum_mixed: float = Field(0.05, ge=0, le=1)  # stop when fewer groups than this carry signal

    @model_validator(mode="after")
    def _whole_distribution(self) -> RlStage:
        d = self.decoding
        if d.temperature <= 0 or d.top_k or d.top_p < 1:
            raise UserError(f'stage "{self.name}": RL samples everything: temperature > 0, top_k=0, top_p=1.')
        return self

    shuffle_rewards: bool = False  # the control: rewards dealt out at random over the step's rollouts


class RejectStage(StageBase):
    """Rejection sampling: the model (input "model") answers, what is verified is kept as traces."""

    stage: Literal["reject"] = "reject"
    mix: tuple[TaskMix, ...] = Field(min_length=1)
    problems: int = Field(1000, ge=1)  # distinct ones
    samples: int = Field(4, ge=1)
    curate: tuple[str, ...] = ("correct", "dedup")
    keep_per_problem: int = Field(1, ge=1)
    decoding: Decoding = Decoding()
    problems_per_batch: int = Field(128, ge=1)


class AskStage(StageBase):
    """Ask a teacher new problems (input "teacher") and keep the answers that curation lets through."""

    stage: Literal["ask"] = "ask"
    mix: tuple[TaskMix, ...] = Field(min_length=1)
    problems: int = Field(1000, ge=1)  # distinct ones
    samples: int = Field(1, ge=1)
    decoding: Decoding = Decoding()
    curate: tuple[str, ...] = ("correct", "dedup")
    licence: str = "own model"  # of the teacher's outputs; it travels with every trace
    problems_per_batch: int = Field(128, ge=1)


class EvalStage(StageBase):
    """pass@1, pass@k and cons@k with standard errors on unseen problems of every entry of the mix."""

    stage: Literal["eval"] = "eval"
    headline: bool = False
    mix: tuple[TaskMix, ...] = Field(min_length=1)
    problems: int = Field(300, ge=2)  # for each entry of the mix
    samples: int = Field(4, ge=1)
    decoding: Decoding = Decoding()
    rows_per_batch: int = Field(256, ge=1)


Stage = Annotated[
    TokenizerStage
    | PretrainStage
    | SftStage
    | RlStage
    | RejectStage
    | AskStage
    | CaptureStage
    | DistillStage
    | PruneStage
    | EvalStage,
    Field(discriminator="stage"),
]


class Recipe(Config):
    """A road through stages, in order. `usd_per_hour` is the rate the bill is counted at."""

    name: Name
    runs_as: str = ""  # the name its runs go by, when they are to be shared with another recipe; else `name`
    about: str = ""
    stages: tuple[Stage, ...]
    usd_per_hour: float = Field(0.10, ge=0)
    report: dict[str, Any] = {}  # what the report shows: which stages are whose (see recipes/quickstart.py)

    @model_validator(mode="after")
    def _inputs_exist(self) -> Recipe:
        seen: set[str] = set()
        for stage in self.stages:
            if stage.name in seen:
                raise UserError(f'recipe "{self.name}": two stages are named "{stage.name}".')
            seen.add(stage.name)
        return self
