"""Scoring: packed equals one at a time; top-k, tail and hidden states; bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoestring.core.errors import UserError
from shoestring.infer import score as score_module
from shoestring.infer.engine import Engine
from shoestring.infer.score import Scored, packed

from .conftest import V

SEQUENCES = [[5, 9, 12], [7], list(range(60)), [250, 3, 3, 8, 99, 41, 17], [5, 9, 12], [100, 200], list(range(50, 80))]


def plain(model: Any, ids: list[int], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        return (model(torch.tensor([ids])).logits_BTV[0, :-1] / temperature).log_softmax(-1)


def scored(engine: Engine, **options: Any) -> list[Scored]:
    found = engine.score(SEQUENCES, **options)
    assert all(isinstance(each, Scored) for each in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("tokens", [1, 64, 1 << 14])
def test_top_k_tail_and_hidden(model: Any, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(score_module, "SCORE_TOKENS", tokens)
    monkeypatch.setattr(score_module, "CHUNK_ELEMENTS", 20 * V)  # several chunks of positions
    engine = Engine(model)
    flat = engine.score(SEQUENCES, temperature=0.7)
    for ids, each, logprobs in zip(SEQUENCES, scored(engine, temperature=0.7, top_k=9, hidden=True), flat, strict=True):
        logp_TV = plain(model, ids, 0.7)
        own = logp_TV.gather(1, torch.tensor(ids[1:], dtype=torch.int64)[:, None]).squeeze(1)
        assert torch.allclose(each.logprobs_T, own, atol=1e-5)
        assert torch.allclose(torch.tensor(logprobs), own, atol=1e-5)
        best = logp_TV.topk(9, dim=-1)
        assert each.top_logprobs_TK is not None and each.tail_T is not None and each.hidden_TD is not None
        assert torch.allclose(each.top_logprobs_TK, best.values, atol=1e-5)
        mass = each.top_logprobs_TK.exp().sum(-1) + each.tail_T.exp()
        assert torch.allclose(mass, torch.ones(len(ids) - 1), atol=1e-5)
        again = (model.unembed(each.hidden_TD).detach() / 0.7).log_softmax(-1)
        assert torch.allclose(again, logp_TV, atol=1e-5)


def test_all_of_the_vocabulary_leaves_no_tail(model: Any) -> None:
    for each in scored(Engine(model), top_k=10 * V):
        assert each.tail_T is not None and each.top_ids_TK is not None
        assert each.top_ids_TK.shape[1] == V and bool((each.tail_T == float("-inf")).all())


def test_rows_are_full_and_everything_is_there_once() -> None:
    lengths = [3, 1, 60, 7, 3, 2, 30, 20, 28]
    (rows,) = packed(lengths)
    assert sorted(index for row in rows for index in row) == [0, 2, 3, 4, 5, 6, 7, 8]
    assert all(sum(lengths[index] for index in row) <= 60 for row in rows)
    assert len(rows) == 3  # 153 tokens in rows of 60


def test_logits_are_never_all_there(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    linear = torch.nn.functional.linear

    def watched(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(x.shape[0] if len(weight) == V else 0)
        return linear(x, weight, *rest)

    monkeypatch.setattr(score_module, "CHUNK_ELEMENTS", 16 * V)
    monkeypatch.setattr(score_module.F, "linear", watched)
    Engine(model).score([list(range(100))], top_k=3)
    assert 0 < max(seen) <= 16


def test_a_negative_top_k_is_refused(model: Any) -> None:
    with pytest.raises(UserError, match="top_k is -1"):
        Engine(model).score([[1, 2]], top_k=-1)
