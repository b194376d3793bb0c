"""Schedules played chunk by chunk against their papers' formulas, and the drawings made of them."""

import itertools
import re
import xml.etree.ElementTree as ET

import pytest

from shoestring.core.errors import UserError
from shoestring.cost import drawings
from shoestring.cost.orders import ORDERS, place, programs_of, stages_of
from shoestring.cost.page import render
from shoestring.cost.pipeline import bubble, dualpipe_calls
from shoestring.cost.plan import plan
from shoestring.cost.timetable import StageSeconds, idle, play, play_stages, span

UNIT = {"F": 1.0, "B": 2.0, "W": 1.0, "FB": 3.0}
V3 = {"F": 57.9, "B": 126.7, "W": 41.7, "FB": 138.8}  # milliseconds, arXiv 2505.09343
SIZES = [(2, 4), (4, 8), (8, 24), (16, 64)]


def formula(schedule, p, **seconds):
    """`bubble`; DualPipeV is DualPipe over twice the stages, each half as long."""
    if schedule == "dualpipev":
        return bubble("dualpipe", 2 * p, **{k: x / 2 for k, x in seconds.items()})
    return bubble(schedule, p, v=2, **seconds)


@pytest.mark.parametrize("schedule", ORDERS)
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_idle_time_is_the_formula(schedule, p, m):
    """With the unit durations of the DualPipe paper's table every schedule idles just as long as its formula says."""
    for seconds in idle(play(schedule, p, m, **UNIT), p):
        assert seconds == pytest.approx(formula(schedule, p, **UNIT))


@pytest.mark.parametrize("schedule", ORDERS)
def test_idle_time_with_v3_durations(schedule):
    """Uneven durations: exact one way; DualPipe's formula is then an upper bound, and not a loose one."""
    found, wanted = idle(play(schedule, 16, 64, **V3), 16), formula(schedule, 16, **V3)
    if schedule.startswith("dual"):
        assert 0.6 * wanted < max(found) <= wanted
    else:
        assert found == pytest.approx([wanted] * 16)


def test_the_formula_of_zbv_is_near_the_played_one():
    for F, B, W in itertools.product((0.7, 1.0, 1.6), (1.6, 2.4, 3.2), (0.7, 1.0, 1.6)):
        if W > B - W:
            continue  # not so in any layer; the formula is then too low by up to a third
        played = max(idle(play("zbv", 8, 64, F=F, B=B, W=W), 8))
        assert played == pytest.approx(bubble("zbv", 8, F, B, W), rel=0.11), (F, B, W)


TWO_RANKS_FOUR_MICRO_BATCHES = {  # stage, kind, micro-batch: as torch 2.13 makes them
    "zbv": ["0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 0I1 0W1 3F3 3I3 3W3 0I2 0W2 0I3 0W3",
            "1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 2W2 1I2 2I3 1I3 1W2 2W3 1W3"],
    "dualpipev": ["0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3+3B1 3F2+0B0 3B2 3F3+0B1 3B3 0I2 0W2 0I3 0W3",
                  "1F0 2F0 1F1 2F1 1F2 2B0 2F2+1B0 1F3+2B1 2F3+1B1 2B2 1B2 2I3 1I3 2W3 1W3"],
}  # fmt: skip


@pytest.mark.parametrize("schedule", TWO_RANKS_FOUR_MICRO_BATCHES)
def test_folded_orders(schedule):
    def spelled(rank, cell):
        return "+".join(f"{place(schedule, 2, rank, c.way)[1]}{c.kind}{c.micro}" for c in cell)

    programs = programs_of(schedule, 2, 4)
    assert [
        " ".join(spelled(r, cell) for cell in cells) for r, cells in enumerate(programs)
    ] == TWO_RANKS_FOUR_MICRO_BATCHES[schedule]


def torch_order(name, p, m):
    """What torch.distributed.pipelining makes each rank do: (stage, kind, micro-batch) by cell."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    kind = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "B"}
    maker = object.__new__(getattr(schedules, name))
    maker.pp_group_size, maker._n_microbatches, maker.num_stages = p, m, 2 * p
    maker.n_local_stages, maker.microbatches_per_round, maker.number_of_rounds = 2, p, m // p
    made = []
    for rank in range(p):
        actions = [a for a in maker._calculate_single_rank_operations(rank) if a is not None]
        cells = [a.sub_actions or (a,) for a in actions]
        made.append(
            [tuple((a.stage_index, kind[a.computation_type.name], a.microbatch_index) for a in c) for c in cells]
        )
    return made


@pytest.mark.slow  # importing torch's schedules takes longer than all the rest
@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [("zbv", "ScheduleZBVZeroBubble"), ("dualpipev", "ScheduleDualPipeV"), ("interleaved", "ScheduleInterleaved1F1B")],
)
@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 12), (8, 24)])
def test_orders_are_torch_s(schedule, theirs, p, m):
    ours = [[tuple((place(schedule, p, rank, c.way)[1], c.kind, c.micro) for c in cell) for cell in program]
            for rank, program in enumerate(programs_of(schedule, p, m, 2))]  # fmt: skip
    assert ours == torch_order(theirs, p, m)


def uneven(schedule, p, v=1):
    """Stages that get longer, a light first and a heavy last one."""
    n = stages_of(schedule, p, v)
    times = [0.7, *(1 + 0.3 * i / n for i in range(n - 2)), 1.5]
    return [StageSeconds(t, 2.1 * t, 0.9 * t) for t in times]


@pytest.mark.parametrize("schedule", ORDERS)
@pytest.mark.parametrize("p", [2, 4, 8])
def test_a_step_is_extrapolated_as_it_is_played(schedule, p):
    v = 2 if schedule == "interleaved" else 1
    stages, m = uneven(schedule, p, v), 8 * p
    pair = lambda a, b: 0.9 * (stages[a].forward + stages[b].backward)  # noqa: E731
    whole = span(schedule, p, m, stages, pair, v)
    cells = play_stages(schedule, p, m, stages, pair, v)
    assert whole.seconds == pytest.approx(max(c.end for c in cells), rel=5e-3)
    assert sum(whole.busy.values()) == pytest.approx(sum(c.end - c.start for c in cells) / p)
    assert whole.idle > -1e-9


def test_1f1b_waits_for_its_slowest_stage_alone():
    """By hand: a slow last stage does every micro-batch without a gap; the others show once, as it fills and drains."""
    even, slow, m = StageSeconds(1.0, 2.0, 1.0), StageSeconds(1.5, 3.0, 1.5), 20
    assert span("1f1b", 6, m, [even] * 5 + [slow]).seconds == pytest.approx(m * 4.5 + 5 * 3.0)
    for at in range(5):  # anywhere else it works ahead while the others are filled, so less is seen of them
        stages = [slow if i == at else even for i in range(6)]
        assert m * 4.5 < span("1f1b", 6, m, stages).seconds < m * 4.5 + 5 * 3.0
    assert bubble("1f1b", 6, 1.5, 3.0, 1.5) == pytest.approx(5 * 4.5)  # the formula takes every stage for as slow


@pytest.mark.parametrize("schedule", ORDERS)
def test_every_chunk_once_and_after_what_it_needs(schedule):
    p, m = 8, 24
    cells = play(schedule, p, m, **V3)
    for rank, mine in itertools.groupby(sorted(cells, key=lambda c: (c.rank, c.start)), key=lambda c: c.rank):
        own = list(mine)
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(own))  # one thing at a time
        did = [
            (c.way, c.micro, kind) for cell in own for c in cell.chunks for kind in ("IW" if c.kind == "B" else c.kind)
        ]
        stages = stages_of(schedule, p, 2) // p
        assert len(did) == len(set(did)) == 3 * m * stages, rank
    if schedule in ("gpipe", "1f1b", "zb1p"):
        ends = {(c.kind, cell.rank, c.micro): cell for cell in cells for c in cell.chunks}
        for rank, micro in itertools.product(range(1, p), range(m)):
            assert ends["F", rank - 1, micro].end <= ends["F", rank, micro].start + 1e-9


def test_dualpipe_makes_the_calls_that_the_planner_counts():
    p, m = 16, 64
    calls, cells = dualpipe_calls(p, m), play("dualpipe", p, m, **UNIT)
    alone = [cell.chunks[0].kind for cell in cells if len(cell.chunks) == 1]
    pairs = sum(len(cell.chunks) == 2 for cell in cells)
    # the middle ranks run their first pair apart: a forward and a backward more each, a pair less
    assert pairs / p == pytest.approx(calls.pairs - 2 / p)
    assert alone.count("F") / p == pytest.approx(calls.forward + 2 / p)
    assert alone.count("W") / p == pytest.approx(calls.weight) == alone.count("I") / p


def test_what_cannot_be_played_says_so():
    with pytest.raises(UserError, match="known are gpipe"):
        play("zbw", 4, 8, **UNIT)
    with pytest.raises(UserError, match="at least 7"):
        play("zbv", 4, 6, **UNIT)
    with pytest.raises(UserError, match="at least 8"):
        play("dualpipev", 4, 7, **UNIT)
    with pytest.raises(UserError, match="at least 16"):
        play("dualpipe", 8, 12, **UNIT)
    with pytest.raises(UserError, match="groups of 4"):
        play("interleaved", 4, 6, **UNIT)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev"])
def test_the_page_draws_the_plan_s_schedule(schedule):
    layout = f"pp=8,schedule={schedule}" + (",virtual=2" if schedule == "interleaved" else "")
    html = render(plan("llama-3.1-70b", 1e12, "256xH100", layout=layout, frontier=True))
    for picture in re.findall(r"<svg.*?</svg>", html):
        ET.fromstring(picture.replace("&#9632;", "").replace("&#160;", ""))
    cells = re.findall(r"<title>[FBIW]\d+", html)
    assert len(cells) > 8 * 14 and f"order {schedule}" in html


def test_names_cannot_break_the_page():
    drawn = drawings.tree("<b>", [("</svg>", [("a&b", 1.0, "<i>")])], '"')
    ET.fromstring(drawn)
    assert "<b>" not in drawn and "<i>" not in drawn
