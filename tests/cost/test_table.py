"""Predictions of published runs, each left out of the fit, and the scores they are judged by."""

import json
from statistics import median

import pytest

from shoestring.core.errors import UserError
from shoestring.cost.plan import fitted_residual
from shoestring.cost.residual import NAMES, Interval, Observation, features_of, fit
from shoestring.cost.rows import read_run
from shoestring.cost.table import (
    binomial_p,
    class_method,
    constant_method,
    leave_one_out,
    predict_table,
    read_cases,
    residual_without,
    shipped_cases,
    summary,
    winkler,
)
from shoestring.cost.tables import number, read_rows, shipped_rows

# effective causal utilisation implied by each row (shares of the 16-bit peak)
EFFECTIVE = {
    "deepseek-v3-pretrain": 0.391, "deepseek-67b": 0.389, "llama1-13b": 0.524, "llama1-65b": 0.485, "llama2-7b": 0.414,
    "llama2-70b": 0.443, "llama3.1-405b": 0.358, "bloom-176b": 0.322, "palm-540b": 0.306, "falcon-180b": 0.483,
    "starcoderbase": 0.292, "pythia-2.8b": 0.317, "pythia-12b": 0.265, "tinyllama-1.1b": 0.522, "olmoe-1b-7b": 0.186,
    "smollm3-3b": 0.288, "mpt-7b": 0.369, "glm-130b": 0.255, "nanochat-d24": 0.488,
}  # fmt: skip


@pytest.fixture(scope="module")
def cases():
    return shipped_cases()


@pytest.mark.parametrize("name", sorted(EFFECTIVE))
def test_effective_utilisation_of_rows(name):
    row = next(r for r in shipped_rows("published_runs") if r["id"] == name)
    run = read_run(row)
    shape = run.shape.with_(window=0, window_layers=0)  # the golden values count attention without windows
    flops = shape.flops_per_token(run.seq_len) * run.tokens
    assert flops / (run.truth * 3600 * run.cluster.chip.bf16) == pytest.approx(EFFECTIVE[name], rel=0.02)


def test_whole_runs_reach_their_targets(cases):
    runs = [c for c in cases if c.run.quantity == "gpu_hours"]
    truths = [c.run.truth for c in runs]
    ours = summary(leave_one_out(runs), truths)
    plain = [summary(method(runs), truths) for method in (constant_method, class_method)]
    assert ours["median_error"] <= 0.20
    assert all(ours["median_error"] <= 2 / 3 * other["median_error"] for other in plain)
    assert ours["coverage_p"] > 0.05
    assert all(ours["winkler"] < other["winkler"] for other in plain)


def test_known_layout_rates(cases):
    rates = [c for c in cases if c.run.layout_known and c.run.steady]
    assert summary(leave_one_out(rates), [c.run.truth for c in rates])["median_error"] <= 0.10


def test_rows_with_known_layout(cases):
    """Rates and hours; also with every row of the same paper left out, and in rows that no fit sees."""
    known = [c for c in cases if c.run.layout_known]
    held = [c for c in read_cases(shipped_rows("holdout_runs"))[0] if c.run.layout_known]
    assert len(known) == 18 and len(held) == 17
    for group, by_study in ((known, False), (known, True), (held, False)):
        truths = [c.run.truth for c in group]
        ours = summary(leave_one_out(group, by_study=by_study), truths)
        assert ours["median_error"] <= 0.10 and ours["coverage_p"] > 0.05
        assert all(ours["median_error"] < summary(m(group), truths)["median_error"]
                   for m in (constant_method, class_method))  # fmt: skip


def test_rows_outside_the_table_do_as_well():
    held, skipped = read_cases(shipped_rows("holdout_runs"))
    score = summary(leave_one_out(held), [c.run.truth for c in held])
    assert not skipped and score["median_error"] <= 0.15 and score["coverage_p"] > 0.05


def row(name):
    return dict(next(r for t in ("published_runs", "holdout_runs") for r in shipped_rows(t) if r["id"] == name))


@pytest.mark.parametrize(
    ("name", "metered"),
    [("deepseek-v3-pretrain", False), ("pythia-12b", False), ("nanochat-d24", False), ("tinyllama-1.1b", False),
     ("deepseek-67b", False), ("llama3.1-405b", True), ("bloom-176b", True), ("palm-540b", True),
     ("mt-nlg-530b-280n", False)],
)  # fmt: skip
def test_hours_that_are_a_rate_times_tokens(name, metered):
    """Their notes say so; restarts cannot be in them, so what whole runs lose is not added."""
    assert read_run(row(name)).metered is metered
    spent = read_run(row("llama2-7b") | {"notes": ""})
    rate = read_run(row("llama2-7b") | {"notes": "published as hours PER TRILLION tokens"})
    assert spent.metered and not rate.metered
    fitted = residual_without()
    at = [fitted.at(features_of(r, 0.45), steady=r.steady)[0] for r in (spent, rate)]
    assert at[0] - at[1] == pytest.approx(fitted.mean[NAMES.index("whole")])


def test_what_notes_state_is_read():
    smol = read_run(row("smollm3-3b"))
    assert smol.fixed["micro_batch"] == 3 and smol.fixed["zero"] == 0
    nano = read_run(row("nanochat-d24"))
    assert (nano.shape.window, nano.shape.window_layers) == (1024, 18)
    assert read_run(row("deepseek-v2")).fixed["schedule"] == "zb1p"


def test_an_unnamed_pipeline_is_1f1b():
    """MT-NLG names no schedule, and its 240 micro-batches do not go in groups of 35 as interleaving needs."""
    by_id = {c.run.id: c.physical.found.layout for c in shipped_cases()}
    assert by_id["mt-nlg-530b-280n"].schedule == by_id["bloom-176b"].schedule == "1f1b"
    assert (by_id["nemotron4-340b"].schedule, by_id["nemotron4-340b"].virtual) == ("interleaved", 2)
    assert by_id["megatron2021-529.6b"].virtual == 3  # 105 layers on 35 ranks


def test_stored_constants_are_the_fitted_ones():
    fresh, stored = residual_without(), fitted_residual()
    assert stored.mean == pytest.approx(fresh.mean, rel=1e-6) and stored.rows == fresh.rows
    for a, b in zip(stored.covariance, fresh.covariance, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_v3_enters_no_fit():
    rows = [c.observation() for c in shipped_cases()]
    v3 = [o for o in rows if o.model.startswith("DeepSeek-V3")]
    assert v3 and fit(rows).mean == fit(o for o in rows if o not in v3).mean


def test_a_row_does_not_see_its_own_truth(tmp_path):
    row = dict(next(r for r in shipped_rows("published_runs") if r["id"] == "llama2-7b"))
    honest = predict_table([row])["rows"][0]
    lying = predict_table([row | {"gpu_hours": "1000000"}])["rows"][0]
    assert honest["mid"] == lying["mid"] and honest["low"] == lying["low"]


def test_document_has_the_promised_fields():
    document = predict_table(shipped_rows("published_runs")[:5])
    json.dumps(document)
    assert {"id", "quantity", "truth", "low", "mid", "high", "error", "inside"} <= set(document["rows"][0])
    assert {"median_error", "coverage", "n"} <= set(document["summary"])
    assert (
        document["skipped"][0]["id"] == "deepseek-v3-posttrain"
        and "tokens is empty" in document["skipped"][0]["reason"]
    )
    errors = [abs(r["mid"] / r["truth"] - 1) for r in document["rows"]]
    assert document["summary"]["median_error"] == pytest.approx(median(errors))


EMPTIED = ("parallelism", "global_batch", "interconnect", "precision")


def test_empty_cells_widen():
    row = dict(next(r for r in shipped_rows("published_runs") if r["id"] == "nemotron4-340b"))
    full = predict_table([row])["rows"][0]
    bare = predict_table([row | dict.fromkeys(EMPTIED, "")])["rows"][0]
    assert bare["high"] / bare["low"] > full["high"] / full["low"] and set(bare["guesses"]) > set(full["guesses"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chip": "H101"}, "unknown chip"), ({"chip": ""}, "chip is empty"), ({"tokens": "many"}, 'tokens is "many"'),
        ({"gpu_hours": "-5"}, "must be positive"), ({"n_layers": "-3"}, "cannot be negative"),
        ({"tokens": "inf"}, "finite"), ({"n_chips": "8.5"}, "must be a whole number"),
        ({"tokens": "12x"}, '"12x"'), ({"tokens": "1,5"}, '"1,5"'),
    ],
)  # fmt: skip
def test_bad_cells(changes, words):
    row = dict(shipped_rows("published_runs")[3]) | changes
    with pytest.raises(UserError, match=words):
        read_run(row)


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no file"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_text("id,chip\nx\n")
    with pytest.raises(UserError, match="number of cells"):
        read_rows(tmp_path / "a.csv")


def test_tables_of_other_hands(tmp_path):
    """Marks before the header, carriage returns, semicolons, tabs, capitals, spaces, empty lines: the same rows."""
    file = tmp_path / "a.csv"
    texts = (
        "id,chip,tokens\nx,H100,1e12\n", "\ufeffid,chip,tokens\r\nx,H100,1e12\r\n,,\r\n",
        "id;chip;tokens\nx;H100;1e12\n",
        "ID ,Chip, Tokens\nx,H100,1e12\n\n", "id\tchip\ttokens\nx\tH100\t1e12\n",
    )  # fmt: skip
    for text in texts:
        file.write_bytes(text.encode())
        assert read_rows(file, ("id", "chip")) == [{"id": "x", "chip": "H100", "tokens": "1e12"}], text
    file.write_text("name,chip\nx,H100\n")
    with pytest.raises(UserError, match='has no column "id"'):
        read_rows(file, ("id", "chip"))


def test_cells_with_separators_and_units():
    cells = {
        "1,000": 1e3,
        "14.8T": 14.8e12,
        "160K": 160e3,
        "2.788m": 2.788e6,
        "$5.576M": 5.576e6,
        " 5e11 ": 5e11,
        "": None,
    }
    assert {text: number({"id": "x", "tokens": text}, "tokens") for text in cells} == cells


def test_scores():
    assert binomial_p(24, 30) == pytest.approx(1.0) and binomial_p(10, 30) < 1e-4
    good, bad = Interval(0.9, 1.0, 1.1), Interval(1.9, 2.0, 2.1)
    assert winkler(good, 1.0) < winkler(bad, 1.0)
    prior_only = fit([])
    one = fit([Observation("a", "m", "s", (1, 0, 0, 0, 0, 0.0), True, 0.5, 0.0)])
    assert prior_only.mean[0] < one.mean[0] < 0.5
