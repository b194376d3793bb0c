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
from shoestring.core.errors import UserError, did_you_mean
from shoestring.core.nouns import Sampling
from shoestring.core.registry import list_parts
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

    files: tuple[str, ...]


class ModelSpec(Config):
    """A model to make from nothing: the family is a file of models/, the rest its Hugging Face config keys."""

    family: str
    config: dict[str, Any]


class Optim(Config):
    """The optimiser and its schedule. Defaults are DeepSeek-V3's (section 4.2) where it states them."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    warmup_steps: int = Field(20, ge=0)
    schedule: Schedule = "wsd"
    final_ratio: float = 0.1
    decay_share: float = 0.2


class Compute(Config):
    """How products are computed. "auto" measures on this machine at this model's sizes and is recorded."""

    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    experts: Literal["auto", "loop", "bmm", "grouped"] = "auto"
    device: str = "cpu"
    threads: int | None = Field(None, ge=1)  # None: as many as torch takes


class Decoding(Config):
    """Sampling of a stage, without its seed and count."""

    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(128, ge=1)

    def sampling(self, *, n: int, seed: int, stop_ids: tuple[int, ...], routed_experts: bool = False) -> Sampling:
        return Sampling(n=n, seed=seed, stop_ids=stop_ids, routed_experts=routed_experts, **self.model_dump())


class StageBase(Config):
    """What every stage has. `headline` stages are the final run; the others are controls, ablations, evaluation."""

    name: str
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


class Lora(Config):
    """Adapters of low rank instead of all weights; `dora` learns the length of each row beside them."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dora: bool = False


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
                    f"{where}: policy_gradient learns from sampled tokens alone: on_policy_share=1, no text."
                )
        elif self.policy_gradient or self.on_policy_share < 1 or self.mix:
            raise UserError(f"{where}: policy_gradient, on_policy_share and mix belong to way=on_policy.")
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
    """A smaller model made of the most important parts of input "model", measured on "traces". None keeps all."""

    stage: Literal["prune"] = "prune"
    layers: int | None = Field(None, ge=1)
    hidden: int | None = Field(None, ge=1)
    ffn: int | None = Field(None, ge=1)  # neurons of dense layers
    experts: int | None = Field(None, ge=1)
    examples: int = Field(256, ge=1)
    row_tokens: int = Field(256, ge=8)
    tokens_per_microbatch: int = Field(8192, ge=1)

    @model_validator(mode="after")
    def _something(self) -> PruneStage:
        if missing := [role for role in ("model", "traces") if role not in self.inputs]:
            raise UserError(f'stage "{self.name}": prune needs the input "{missing[0]}".')
        if self.layers is self.hidden is self.ffn is self.experts is None:
            raise UserError(f'stage "{self.name}": say how many layers, hidden, ffn or experts to keep.')
        return self


class RlStage(TrainBase):
    """GRPO with rule-based rewards. problems_per_step x group_size completions make one step."""

    stage: Literal["rl"] = "rl"
    mix: tuple[TaskMix, ...] = Field(min_length=1)
    rewards: dict[str, float] = {"correct": 1.0}
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

    name: str
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
