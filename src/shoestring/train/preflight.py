"""Can RL help here? Sample before training, and look for problems that are sometimes solved.

GRPO learns from groups whose rewards differ. With success rate p a group of G is mixed with probability
1 - p^G - (1-p)^G; when nearly none is, RL will not move and the cold start or the difficulty must change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

from shoestring.core.contracts import Generator
from shoestring.core.errors import UserError
from shoestring.data.textbook import problems
from shoestring.evals.passk import pass_at_k
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import RlStage
from shoestring.train.context import Context, derived_seed
from shoestring.train.rollouts import Grade, answer_groups, lengths_of, reward_groups, sampled_tokens

FlopsOf = Callable[[list[tuple[int, list[int]]]], float]


def preflight(
    stage: RlStage, ctx: Context, engine: Generator, tokenizer: Tokenizer, grade: Grade, flops_of: FlopsOf
) -> tuple[int, float]:
    """Record pass@1, pass@k and the share of mixed groups, once a run. Returns the (tokens, FLOPs) the check took.

    Raises UserError below `minimum_mixed`.
    """
    if stage.preflight_problems == 0:
        return 0, 0.0
    facts = ctx.run.manifest["facts"].get("preflight")
    if facts is None:
        facts = _sample(stage, engine, tokenizer, grade, flops_of)
        ctx.run.note(preflight=facts)
        tokens, flops = facts["tokens"], facts["flops"]
        ctx.run.metric(0, tokens=tokens, sampled_tokens=tokens, flops=flops)  # for the ledger, whatever comes next
    if facts["mixed_groups_expected"] < stage.minimum_mixed:
        k = facts["samples"]
        raise UserError(
            f"RL cannot help here: {facts['mixed_groups_expected']:.1%} of groups of {stage.group_size} would carry "
            f"signal (pass@1 {facts['pass@1']:.1%}, pass@{k} {facts[f'pass@{k}']:.1%}); change the difficulty, train "
            "more first, or lower minimum_mixed."
        )
    return facts["tokens"], facts["flops"]


def _sample(stage: RlStage, engine: Generator, tokenizer: Tokenizer, grade: Grade, flops_of: FlopsOf) -> dict[str, Any]:
    asked = list(islice(problems(stage.mix, derived_seed(stage.seed, 8)), stage.preflight_problems))
    k = stage.preflight_samples
    sampling = stage.decoding.sampling(n=k, seed=derived_seed(stage.seed, 9), stop_ids=(tokenizer.end,))
    groups = answer_groups(engine, tokenizer, asked, sampling)
    reward_groups(groups, {"correct": 1.0}, grade)
    solved = [sum(r.rewards["correct"] > 0.5 for r in group) for group in groups]
    mixed = sum(1 - (c / k) ** stage.group_size - (1 - c / k) ** stage.group_size for c in solved) / len(solved)
    histogram = Counter(solved)
    return {
        "problems": len(solved), "samples": k, "pass@1": sum(solved) / (k * len(solved)),
        f"pass@{k}": sum(pass_at_k(k, c, k) for c in solved) / len(solved),
        "mixed_groups_expected": mixed, "solved_histogram": [histogram[c] for c in range(k + 1)],
        "tokens": sampled_tokens(groups), "flops": flops_of(lengths_of(groups)),
    }  # fmt: skip
