"""The configuration of the stages that make a student: distill, capture and prune."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from shoestring.core.config import Config
from shoestring.core.errors import UserError, did_you_mean
from shoestring.core.registry import list_parts
from shoestring.train.configs_base import Decoding, StageBase, TaskMix, TextFiles, TrainBase, store_roles, teacher_roles


class Lora(Config):
    """Adapters of low rank instead of all weights; `dora` learns the length of each row beside them."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dora: bool = False


class HiddenStates(Config):
    """A term on projected hidden states: `weight` times the mean over the matched layers.

    `layers`: pairs (layer of the student, layer of the teacher), counted from 0; none: every layer of the student with
    the teacher's at the same depth.
    """

    weight: float = Field(1.0, gt=0)
    layers: tuple[tuple[int, int], ...] = ()
    measure: Literal["mse", "cosine"] = "mse"


class DistillStage(TrainBase):
    """A student (input "model") learns from a teacher, in one of these ways:

    text: next-token loss on its kept answers (input "traces").
    forward_kl, reverse_kl, jsd, skew_kl, total_variation, adaptive, or a file of losses/ with a `form`: that
        divergence from its logits, computed beside the student (input "teacher"), on the tokens of "traces".
    offline: `divergence` from a store of its logits (input "logits", made by a capture stage) on "traces".
    on_policy: the student writes, the teacher (input "teacher") scores, and `divergence` (reverse_kl) is minimised.
        Prompts are those of `mix`, or of "traces". `on_policy_share` of the steps do so, the others learn from
        "traces" (GKD's lambda). With `policy_gradient` by the advantage ln p - ln q of the sampled tokens only.
    universal_logit, span_likelihood: as the divergences, from a teacher of another tokenizer.

    Several teachers (inputs "teacher", "teacher2", ...) stand beside the student as one, pooled by `teacher_weights`
    (equal when empty); several stores (inputs "logits", "logits2", ...) only with teacher_pool=divergences.
    `hidden_states` adds a term on projected hidden states of one teacher.
    """

    stage: Literal["distill"] = "distill"
    way: str = "text"
    divergence: str = ""  # of offline (forward_kl) and on_policy (reverse_kl)
    loss_options: dict[str, float | bool] = {}  # beta of jsd, alpha and reverse of skew_kl, head_mass of adaptive
    temperature: float = Field(1.0, gt=0)  # of both softmaxes of a divergence
    text_weight: float = Field(0.0, ge=0)  # next-token loss added to the divergence
    on_policy_share: float = Field(1.0, gt=0, le=1)
    policy_gradient: bool = False
    lora: Lora | None = None
    teacher_weights: tuple[float, ...] = ()  # of several teachers, in their order; they need not sum to 1
    teacher_pool: Literal["probabilities", "logits", "divergences"] = "probabilities"  # what is averaged
    hidden_states: HiddenStates | None = None
    mix: tuple[TaskMix, ...] = ()
    decoding: Decoding = Decoding()
    row_tokens: int = Field(256, ge=8)
    examples_per_step: int = Field(64, ge=1)

    @property
    def loss(self) -> str:
        """The file of losses/ that is minimised."""
        defaults = {"text": "next_token", "offline": "forward_kl", "on_policy": "reverse_kl"}
        return self.divergence or defaults.get(self.way, self.way)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The inputs that are teachers."""
        return teacher_roles(self.inputs)

    @property
    def accounts(self) -> tuple[str, ...]:
        """The inputs that say what is learnt of every token: the stores of way=offline, else the teachers."""
        return store_roles(self.inputs) if self.way == "offline" else self.teachers

    @property
    def shares(self) -> tuple[float, ...]:
        """What each teacher counts for; they sum to 1."""
        weights = self.teacher_weights or (1.0,) * len(self.accounts)
        return tuple(weight / sum(weights) for weight in weights)

    @property
    def beside(self) -> bool:
        """Whether teachers of the student's vocabulary run beside it."""
        return self.way not in ("text", "offline", "universal_logit", "span_likelihood")

    @property
    def roles(self) -> tuple[str, ...]:
        """The inputs that this way needs."""
        if self.way == "text":
            return ("model", "traces")
        if self.way == "offline":
            return ("model", "traces", "logits")
        if self.way != "on_policy":
            return ("model", "traces", "teacher")
        return ("model", "teacher") if self.mix and self.on_policy_share == 1 else ("model", "teacher", "traces")

    @model_validator(mode="after")
    def _known_way(self) -> DistillStage:
        where = f'stage "{self.name}"'
        losses = [name for name in list_parts("losses") if name not in ("next_token", "policy")]
        ways = ["text", "offline", "on_policy", *losses]
        if self.way not in ways and not self.way.endswith(".py"):
            raise UserError(f'{where}: there is no way "{self.way}".{did_you_mean(self.way, ways)}')
        if self.divergence and self.way not in ("offline", "on_policy"):
            raise UserError(f"{where}: divergence belongs to way=offline and way=on_policy; way={self.way} is its own.")
        if self.divergence and self.divergence not in losses and not self.divergence.endswith(".py"):
            raise UserError(f'{where}: no divergence "{self.divergence}".{did_you_mean(self.divergence, losses)}')
        if missing := [role for role in self.roles if role not in self.inputs]:
            raise UserError(f'{where}: way={self.way} needs the input "{missing[0]}"; it has {", ".join(self.inputs)}.')
        if self.way == "on_policy":
            d = self.decoding
            if d.top_k or d.top_p < 1 or d.temperature != self.temperature:
                raise UserError(
                    f"{where}: on_policy samples the distribution it trains: decoding.temperature must equal "
                    f"temperature ({self.temperature:g}), with top_k=0 and top_p=1."
                )
            if self.policy_gradient and (self.on_policy_share < 1 or self.divergence or self.text_weight):
                raise UserError(
                    f"{where}: policy_gradient is the reverse KL's, from sampled tokens alone: leave divergence, "
                    "text_weight and on_policy_share out."
                )
        elif self.policy_gradient or self.on_policy_share < 1 or self.mix:
            raise UserError(f"{where}: policy_gradient, on_policy_share and mix belong to way=on_policy.")
        return self

    @model_validator(mode="after")
    def _teachers_beside(self) -> DistillStage:
        where, weights = f'stage "{self.name}"', self.teacher_weights
        if self.way == "offline" and len(self.accounts) > 1 and self.teacher_pool != "divergences":
            raise UserError(
                f"{where}: what several stores hold cannot be pooled, only the divergences from each: set "
                "teacher_pool=divergences."
            )
        if len(self.teachers) > 1 and self.way in ("text", "offline"):
            raise UserError(f"{where}: several teachers are for divergences and on_policy; way={self.way} has none.")
        if len(self.teachers) > 1 and not self.beside and self.teacher_pool != "divergences":
            raise UserError(
                f"{where}: teachers of different vocabularies cannot be pooled, only their distances from the student: "
                "set teacher_pool=divergences."
            )
        if weights and len(weights) != len(self.accounts):
            what = "stores" if self.way == "offline" else "teachers"
            raise UserError(
                f"{where}: teacher_weights has {len(weights)} numbers for {len(self.accounts)} {what} "
                f"({', '.join(self.accounts) or 'none'}); give one each."
            )
        if any(not 0 < weight < float("inf") for weight in weights):
            raise UserError(f"{where}: teacher_weights are {list(weights)}; each must be a positive number.")
        if self.policy_gradient and self.teacher_pool != "probabilities" and len(self.teachers) > 1:
            raise UserError(f"{where}: policy_gradient scores sampled tokens only: use teacher_pool=probabilities.")
        if self.hidden_states is None:
            return self
        if not self.beside or self.policy_gradient:
            raise UserError(f"{where}: hidden_states goes with a divergence whose teacher stands beside the student.")
        if len(self.teachers) > 1:
            raise UserError(f"{where}: hidden_states matches the layers of one teacher; this stage has several.")
        return self


class CaptureStage(StageBase):
    """What a teacher (input "teacher") says at every answer token of "traces", kept for `distill` with way=offline.

    topk: k likeliest with the tail's mass; sampled: k draws; hidden: the state before the head, rounded to `number`.
    """

    stage: Literal["capture"] = "capture"
    kind: Literal["topk", "sampled", "hidden"] = "topk"
    k: int = Field(32, ge=1)
    temperature: float = Field(1.0, gt=0)
    number: Literal["float16", "bfloat16", "int8"] = "float16"
    row_tokens: int = Field(256, ge=8)
    tokens_per_microbatch: int = Field(8192, ge=1)
    shard_tokens: int = Field(1 << 16, ge=1)

    @model_validator(mode="after")
    def _two_inputs(self) -> CaptureStage:
        if missing := [role for role in ("teacher", "traces") if role not in self.inputs]:
            raise UserError(f'stage "{self.name}": capture needs the input "{missing[0]}".')
        return self


class PruneStage(StageBase):
    """A smaller model made of the most important parts of input "model". None keeps all of a kind.

    Importance is measured on `examples` pieces of text, input "traces" or `corpus`; the loss before and after on
    `held_out` others.
    """

    stage: Literal["prune"] = "prune"
    layers: int | None = Field(None, ge=1)
    hidden: int | None = Field(None, ge=1)
    ffn: int | None = Field(None, ge=1)  # neurons of dense layers
    experts: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)  # of attention: as many of each group, or whole groups; with MLA any
    corpus: TextFiles | None = None
    examples: int = Field(256, ge=1)
    held_out: int = Field(64, ge=2)
    row_tokens: int = Field(256, ge=8)
    tokens_per_microbatch: int = Field(8192, ge=1)

    @model_validator(mode="after")
    def _something(self) -> PruneStage:
        if "model" not in self.inputs:
            raise UserError(f'stage "{self.name}": prune needs the input "model".')
        if (self.corpus is None) == ("traces" not in self.inputs):
            raise UserError(f'stage "{self.name}": give text to measure importance on: "traces" or corpus.files.')
        if self.layers is self.hidden is self.ffn is self.experts is self.heads is None:
            raise UserError(f'stage "{self.name}": say how many layers, hidden, ffn, experts or heads to keep.')
        return self

    def kept(self) -> dict[str, int | None]:
        """How many of each kind stay; None: all."""
        return {name: getattr(self, name) for name in ("layers", "hidden", "ffn", "experts", "heads")}
