"""Schedules played chunk by chunk against their papers' formulas, and the drawings made of them."""

import itertools
import re
import xml.etree.ElementTree as ET

import pytest

from shoestring.core.errors import UserError
from shoestring.cost import drawings
from shoestring.cost.page import render
from shoestring.cost.pipeline import bubble, dualpipe_calls
from shoestring.cost.plan import plan
from shoestring.cost.timetable import ORDERS, idle, play

UNIT = {"F": 1.0, "B": 2.0, "W": 1.0, "FB": 3.0}
V3 = {"F": 57.9, "B": 126.7, "W": 41.7, "FB": 138.8}  # milliseconds, arXiv 2505.09343
SIZES = [(2, 4), (4, 8), (8, 24), (16, 64)]


@pytest.mark.parametrize("schedule", ORDERS)
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_idle_time_is_the_formula(schedule, p, m):
    """With the unit durations of the DualPipe paper's table every schedule idles just as long as its formula says."""
    for seconds in idle(play(schedule, p, m, **UNIT), p):
        assert seconds == pytest.approx(bubble(schedule, p, v=2, **UNIT))


@pytest.mark.parametrize("schedule", ORDERS)
def test_idle_time_with_v3_durations(schedule):
    """Uneven durations: exact one way; DualPipe's formula is then an upper bound, and not a loose one."""
    found, formula = idle(play(schedule, 16, 64, **V3), 16), bubble(schedule, 16, v=2, **V3)
    if schedule == "dualpipe":
        assert 0.6 * formula < max(found) <= formula
    else:
        assert found == pytest.approx([formula] * 16)


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
        stages = 2 if schedule == "interleaved" else 1
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


def test_what_is_not_drawn_says_so():
    with pytest.raises(UserError, match="zbv"):
        play("zbv", 4, 8, **UNIT)
    with pytest.raises(UserError, match="at least 16"):
        play("dualpipe", 8, 12, **UNIT)
    with pytest.raises(UserError, match="groups of 4"):
        play("interleaved", 4, 6, **UNIT)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"])
def test_the_page_draws_the_plan_s_schedule(schedule):
    layout = f"pp=8,schedule={schedule}" + (",virtual=2" if schedule == "interleaved" else "")
    html = render(plan("llama-3.1-70b", 1e12, "256xH100", layout=layout, frontier=True))
    for picture in re.findall(r"<svg.*?</svg>", html):
        ET.fromstring(picture.replace("&#9632;", "").replace("&#160;", ""))
    cells = re.findall(r"<title>[FBIW]\d+", html)
    assert len(cells) > 8 * 16 and f"order {'dualpipe' if 'dual' in schedule else schedule}" in html
    assert ("folds two" in html) == (schedule == "dualpipev")


def test_names_cannot_break_the_page():
    drawn = drawings.tree("<b>", [("</svg>", [("a&b", 1.0, "<i>")])], '"')
    ET.fromstring(drawn)
    assert "<b>" not in drawn and "<i>" not in drawn
