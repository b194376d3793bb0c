"""Bubbles, calls, messages, memory and step time against published figures."""

import pytest

from shoestring.core.errors import UserError
from shoestring.cost.chips import Cluster, find_chip, parse_cluster
from shoestring.cost.chunks import Chunks, share_out
from shoestring.cost.layout import (
    Layout,
    check_layout,
    complete,
    even_chunks,
    parse_layout,
    parse_published,
)
from shoestring.cost.memory import check_fits, layer_activation_bytes, memory_per_rank
from shoestring.cost.models import named_shape
from shoestring.cost.pipeline import bubble, dualpipe_calls, in_flight
from shoestring.cost.search import search
from shoestring.cost.shape import ModelShape
from shoestring.cost.step import step_time
from shoestring.cost.work import LINK, NETWORK, all_to_all_seconds, layer_chunk, nodes_reached

V3 = named_shape("deepseek-v3")
H800 = find_chip("H800")
V3_LAYOUT = Layout(pp=16, dp=128, ep=64, schedule="dualpipe", precision="fp8", recompute="selective")


def test_bubbles_of_the_dualpipe_table():
    for p, wanted in ((8, (21, 7, 6)), (16, (45, 15, 14))):
        assert tuple(bubble(s, p, 1, 2, 1, 3) for s in ("1f1b", "zb1p", "dualpipe")) == wanted
    v3 = dict(F=57.9, B=126.7, W=41.7, FB=138.8)
    assert bubble("1f1b", 16, **v3) == pytest.approx(2769)
    assert bubble("interleaved", 16, **v3, v=2) == pytest.approx(1384.5)
    assert bubble("zb1p", 16, **v3) == pytest.approx(1518)
    assert bubble("dualpipe", 16, **v3) == pytest.approx(982.8)
    assert all(bubble(s, 1, 1, 2, 1) == 0 for s in ("gpipe", "dualpipe"))


def test_dualpipe_calls():
    calls = dualpipe_calls(16, 120)
    assert (calls.forward, calls.pairs, calls.weight) == (19.5, 100.5, 11.5)
    assert (calls.backward_full, calls.backward_input) == (8.0, 11.5)
    assert calls.forward + calls.pairs == 120 == calls.backward_full + calls.backward_input + calls.pairs


def test_activations_in_flight():
    assert in_flight("gpipe", 4, 32) == 32 and in_flight("1f1b", 4, 32) == 4 and in_flight("dualpipe", 16, 120) == 17
    assert in_flight("1f1b", 16, 3) == 3


def test_nodes_reached_and_all_to_all():
    assert nodes_reached(V3, 8) == pytest.approx(3.5)
    free = V3.with_(n_group=1, topk_group=1)
    assert nodes_reached(free, 8) / (1 - 1 / 8) == pytest.approx(5.29, abs=0.005)
    dispatch = all_to_all_seconds(V3, H800, 4096, 64, 1.0) * NETWORK  # the golden value is at the full 50 GB/s
    assert dispatch == pytest.approx(2.06e-3, rel=0.01)
    inside = all_to_all_seconds(V3, H800, 4096, 8, 1.0)
    assert inside == pytest.approx(4096 * 7168 * 8 * 7 / 8 / (200e9 * LINK))


def test_plain_gpt_keeps_34_bytes():
    gpt = ModelShape(vocab=51200, d_model=6144, layers=48, heads=64, ffn=4 * 6144, ffn_mats=2, tied=True)
    kept = layer_activation_bytes(gpt, Layout(), 2048)
    assert kept / 6144 == pytest.approx(34, rel=0.1)


def test_v3_memory_and_step():
    memory = memory_per_rank(V3, V3_LAYOUT, 4096, 120)
    assert 60e9 < sum(memory.values()) < 80e9
    step = step_time(V3, Cluster(H800, 2048), V3_LAYOUT, 4096, 15360)
    assert sum(step.phases.values()) == pytest.approx(step.seconds)
    assert step.seconds == pytest.approx(19.926, rel=0.15)  # published; nothing here is fitted to it


def test_full_recomputation_costs_a_third():
    shape, cluster = named_shape("llama-2-70b"), parse_cluster("512xA100")
    layout = Layout(tp=8, pp=4, dp=16)
    none = step_time(shape, cluster, layout, 4096, 512)
    full = step_time(shape, cluster, layout.with_(recompute="full"), 4096, 512)
    assert 1.25 < full.seconds / none.seconds < 1.4
    assert full.hardware_ratio == pytest.approx(4 / 3, abs=0.02) and none.hardware_ratio == 1


def test_more_stages_more_bubble_less_memory():
    shape, cluster = named_shape("llama-2-70b"), parse_cluster("512xA100")
    steps = [step_time(shape, cluster, Layout(tp=8, pp=p, dp=64 // p), 4096, 512) for p in (2, 4, 8)]
    assert [s.phases["bubble"] / s.seconds for s in steps] == sorted(s.phases["bubble"] / s.seconds for s in steps)
    sizes = [sum(memory_per_rank(shape, Layout(tp=8, pp=p, dp=64 // p), 4096, 8 * p).values()) for p in (1, 2, 4)]
    assert sizes == sorted(sizes, reverse=True)


def test_layers_are_shared_out():
    """V3's 61 layers: the last stage carries both heads and the MTP layer, so it gets few; DualPipe halves the load."""
    chunks = Chunks(V3, H800, 4096)
    counts = share_out(61, V3_LAYOUT, chunks.of(V3_LAYOUT).layers(chunks.of(V3_LAYOUT).tail))
    assert sum(counts) == 61 and len(counts) == 16 and max(counts) == 4 and counts[-1] < 4
    assert share_out(126, Layout(pp=16), 0.4) == [7, *[8] * 14, 7]  # Llama 3 405B drops a layer at either end
    assert share_out(96, Layout(pp=12, schedule="interleaved", virtual=2), 0.0) == [4] * 24
    assert len(share_out(61, V3_LAYOUT.with_(schedule="dualpipev"), 1.5)) == 32


def test_v3_s_ends_are_stages_of_their_own():
    chunks = Chunks(V3, H800, 4096)
    stages, parts = chunks.stages(V3_LAYOUT), chunks.of(V3_LAYOUT)
    assert stages[0].parts["embedding"] > 0 and stages[-1].parts["head"] > 0 and "head" not in stages[1].parts
    assert stages[0].message_forward == pytest.approx(stages[1].message_forward / 4)  # three of four layers are dense
    whole = sum(s.forward for s in stages)
    assert whole == pytest.approx(3 * parts.dense.forward + 58 * parts.experts.forward + parts.embedding.forward
                                  + parts.tail.forward)  # fmt: skip
    with_mtp, without = (
        parts.tail.parts["products"],
        Chunks(V3.with_(mtp_layers=0), H800, 4096).of(V3_LAYOUT).tail.parts,
    )
    projection = 6 * 4096 * 2 * 7168**2  # FLOPs, forward and backward
    assert with_mtp > projection / H800.fp8 and "products" not in without


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb1p"])
def test_played_is_the_formula_where_stages_are_even(schedule):
    shape = ModelShape(vocab=64, d_model=4096, layers=32, heads=32, ffn=14336)
    layout = Layout(pp=8, dp=8, schedule=schedule, virtual=2 if schedule == "interleaved" else 1)
    cluster = parse_cluster("64xH100")
    by_formula, played = (step_time(shape, cluster, layout, 4096, 512, played=p) for p in (False, True))
    assert played.seconds == pytest.approx(by_formula.seconds, rel=2e-3)
    assert played.phases["bubble"] == pytest.approx(by_formula.phases["bubble"], rel=0.05)


def test_uneven_stages_wait_for_the_slowest():
    """A wide head on the last of eight stages: every rank waits for it, and less than if all were as slow."""
    shape, cluster = named_shape("llama-3.1-8b"), parse_cluster("64xH100")
    layout = Layout(pp=8, dp=8)
    by_formula, played = (step_time(shape, cluster, layout, 4096, 512, played=p) for p in (False, True))
    even = step_time(shape.with_(vocab=64), cluster, layout, 4096, 512)
    assert even.phases["bubble"] < played.phases["bubble"]
    assert even.seconds < played.seconds < by_formula.seconds
    assert played.phases["forward"] < by_formula.phases["forward"]  # mean over ranks, not the slowest


def test_schedules_run_with_what_they_can_be_fed():
    shape, cluster = named_shape("llama-2-70b"), parse_cluster("512xA100")
    layout = Layout(tp=8, pp=8, dp=8, schedule="interleaved", virtual=2)
    full, odd = (step_time(shape, cluster, layout, 4096, b) for b in (8 * 64, 8 * 57))
    assert odd.seconds == pytest.approx(full.seconds, rel=5e-3) and odd.tokens < full.tokens  # 57 take as long as 64
    assert even_chunks(105, 35) == 3 and even_chunks(96, 12) == 2 and even_chunks(61, 16) == 2


def test_a_split_sequence_sends_its_keys_and_values():
    """Llama 70B, 128K tokens over 16 chips: 1/16 of the work each; keys and values of the others pass by."""
    shape, chip = named_shape("llama-2-70b"), find_chip("H100")
    alone, split = (layer_chunk(shape, chip, Layout(cp=cp), 131072, moe=False) for cp in (1, 16))
    assert split.parts["attention"] == pytest.approx(alone.parts["attention"] / 16)
    sent = 131072 * 15 / 16 * 2 * 8 * 128 * 2 / (chip.net_bw * NETWORK)  # seconds, forward
    assert sent < split.parts["attention"] / 3.5  # hidden but for the part that always shows
    assert split.parts["context messages"] == pytest.approx(0.1 * 3 * sent)
    short = layer_chunk(shape, chip, Layout(cp=16), 2048, moe=False)  # too little attention to hide them behind
    assert short.parts["context messages"] > 0.5 * 3 * sent / 64 and "context messages" not in alone.parts


def test_chunk_cache_changes_nothing():
    chunks = Chunks(V3, H800, 4096)
    cluster = Cluster(H800, 2048)
    layouts = (V3_LAYOUT, V3_LAYOUT.with_(ep=32), V3_LAYOUT)
    kept = [step_time(V3, cluster, x, 4096, 15360, chunks=chunks).seconds for x in layouts]
    assert kept == [step_time(V3, cluster, x, 4096, 15360).seconds for x in layouts]


def test_search_finds_the_published_layout_or_better():
    cluster = Cluster(H800, 2048)
    found = search(V3, cluster, 4096, 15360, fixed={"precision": "fp8"}, keep=5)
    published = step_time(V3, cluster, V3_LAYOUT, 4096, 15360)
    assert found[0].step.seconds <= published.seconds
    assert all(sum(f.memory.values()) <= 80e9 for f in found)
    assert all(f.layout.chips == 2048 for f in found)


def test_search_names_what_does_not_fit():
    with pytest.raises(UserError, match="the largest term is"):
        search(V3, parse_cluster("8xH800"), 4096, 64)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("PP16 DualPipe, EP64 over 8 nodes, ZeRO-1 DP128, no TP",
         dict(pp=16, ep=64, dp=128, zero=1, tp=1, schedule="dualpipe")),
        ("TP8 PP16 DP64-128; CP16 at seq 131072", dict(tp=8, pp=16, dp=64)),
        ("TP8 PP12 interleaved DP64", dict(tp=8, pp=12, dp=64, schedule="interleaved")),
        ("FSDP, dropless", dict(zero=3, tp=1, pp=1)), ("DDP", dict(zero=0, tp=1, pp=1)), ("", {}),
        ("TP2 DP192", dict(tp=2, dp=192, pp=1)),
    ],
)  # fmt: skip
def test_published_phrases(text, wanted):
    assert parse_published(text) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [("pp=x", "whole number"), ("scedule=zbv", 'Did you mean "schedule"'), ("pp", 'has no "="'),
     ("schedule=1f2b", '"1f1b"'), ("zero=7", "0 to 3")],
)  # fmt: skip
def test_bad_layouts(text, words):
    with pytest.raises(UserError, match=words):
        parse_layout(text)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(dp=4), "4 chips, not 8"), (Layout(pp=8), None), (Layout(tp=8), None),
        (Layout(dp=8, ep=16), "ep=16"), (Layout(dp=8, ep=3), "must divide"),
    ],
)  # fmt: skip
def test_contradictory_layouts(layout, words):
    if words is None:
        check_layout(V3, layout, 8)
        return
    with pytest.raises(UserError, match=words):
        check_layout(V3, layout, 8)


def test_mends_are_named():
    layout = complete({"pp": 2}, 8)
    with pytest.raises(UserError, match="raise pp, tp, ep"):
        check_fits(memory_per_rank(V3, layout, 4096, 8), H800, layout.short())
