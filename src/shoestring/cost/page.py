"""The plan as one self-contained HTML page: bill, step, memory, pipeline, frontier, sensitivity, published runs, sources.

Drawings are inline SVG, the sliders a few lines of script; nothing is loaded from anywhere.
"""

# ruff: noqa: E501 (lines of markup)
from __future__ import annotations

import json
from html import escape
from math import log10
from pathlib import Path

from shoestring.cost.bill import ledger, total, views
from shoestring.cost.plan import Plan
from shoestring.cost.residual import Interval
from shoestring.cost.show_plan import span
from shoestring.cost.table import shipped_cases
from shoestring.cost.units import show, usd

COLOURS = ("#2f6f8f", "#d08c3c", "#5b8c5a", "#a85751", "#7d6b9e", "#8a8a8a", "#4f9fa8", "#b5a642")
STYLE = """body{font:16px/1.5 Georgia,serif;color:#222;background:#fbfaf7;max-width:920px;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.9rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2.4rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse;width:100%;font:14px/1.4 system-ui,sans-serif}td,th{padding:.3rem .5rem;border-bottom:1px solid #e6e3dc;text-align:left}
td.n{text-align:right;white-space:nowrap}.big{display:flex;gap:2rem;flex-wrap:wrap}.big div{min-width:9rem}.big b{font-size:1.7rem;display:block}
.small{color:#666;font:13px/1.4 system-ui,sans-serif}svg{width:100%;height:auto;font:12px system-ui,sans-serif}label{display:block;font:14px system-ui,sans-serif}
input[type=range]{width:60%}.no{color:#777}"""
SLIDERS = """<div id="s"></div><p id="o" class="big"></p><script>
const d=DATA,f=[["tokens","training tokens, trillions",d.tokens/1e12/20,d.tokens/1e12*5,d.tokens/1e12],["chips","chips",Math.max(1,d.chips/16),d.chips*8,d.chips],["mfu","utilisation of the 16-bit peak, %",10,60,d.mfu*100],["price","dollars a chip-hour",.2,8,d.price]];
const v={};for(const[k,t,a,b,c]of f){v[k]=c;const l=document.createElement("label");l.innerHTML=t+": <b></b><br>";const i=document.createElement("input");i.type="range";i.min=a;i.max=b;i.step=(b-a)/400;i.value=c;l.append(i);document.getElementById("s").append(l);i.oninput=()=>{v[k]=+i.value;draw()};l.r=()=>l.querySelector("b").textContent=v[k].toPrecision(3);f[k]=l}
function n(x){for(const[s,u]of[[1e12,"T"],[1e9,"B"],[1e6,"M"],[1e3,"K"]])if(x>=s)return(x/s).toPrecision(3)+u;return x.toPrecision(3)}
function draw(){for(const[k]of f)f[k].r();const h=d.flops*v.tokens*1e12/(d.peak*v.mfu/100)/3600;document.getElementById("o").innerHTML="<span><b>"+n(h)+"</b> chip-hours</span><span><b>"+n(h/v.chips/24)+"</b> days</span><span><b>$"+n(h*v.price)+"</b></span>"}draw()</script>"""


def _bar(parts: list[tuple[str, float]], limit: float, unit: str) -> str:
    """One stacked bar with its legend; `limit` is drawn as a line."""
    whole = max(limit, sum(v for _, v in parts)) or 1.0
    x, marks, legend = 0.0, [], []
    for i, (name, value) in enumerate(parts):
        wide = 880 * value / whole
        colour = COLOURS[i % len(COLOURS)]
        marks.append(
            f'<rect x="{x + 10:.1f}" y="8" width="{wide:.1f}" height="34" fill="{colour}"><title>{escape(name)} {value:.3g} {unit}</title></rect>'
        )
        legend.append(f'<tspan fill="{colour}">&#9632;</tspan> {escape(name)} {value:.3g}&#160;{unit}&#160;&#160; ')
        x += wide
    edge = 10 + 880 * limit / whole
    line = (
        f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="2" y2="48" stroke="#222" stroke-dasharray="4 3"/>' if limit else ""
    )
    rows = [legend[i : i + 4] for i in range(0, len(legend), 4)]
    texts = "".join(f'<text x="10" y="{66 + 18 * i}">{"".join(r)}</text>' for i, r in enumerate(rows))
    return f'<svg viewBox="0 0 900 {62 + 18 * len(rows)}">{"".join(marks)}{line}{texts}</svg>'


def _scatter(points: list[tuple[float, float, str, bool]], x_name: str, y_name: str, *, join: bool = False) -> str:
    """Points on logarithmic axes; the last flag marks ours."""
    xs, ys = [log10(p[0]) for p in points], [log10(p[1]) for p in points]
    x0, x1, y0, y1 = min(xs) - 0.1, max(xs) + 0.1, min(ys) - 0.1, max(ys) + 0.1

    def at(x: float, y: float) -> tuple[float, float]:
        return 70 + 800 * (log10(x) - x0) / (x1 - x0), 270 - 240 * (log10(y) - y0) / (y1 - y0)

    out = [
        '<line x1="70" y1="270" x2="880" y2="270" stroke="#999"/><line x1="70" y1="20" x2="70" y2="270" stroke="#999"/>'
    ]
    for i in range(5):
        xv, yv = 10 ** (x0 + (x1 - x0) * i / 4), 10 ** (y0 + (y1 - y0) * i / 4)
        out.append(f'<text x="{at(xv, 10**y0)[0]:.0f}" y="288" text-anchor="middle" fill="#666">{show(xv, 2)}</text>')
        out.append(f'<text x="64" y="{at(10**x0, yv)[1] + 4:.0f}" text-anchor="end" fill="#666">{show(yv, 2)}</text>')
    if join:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(p[0], p[1]) for p in points))
        out.append(f'<polyline points="{path}" fill="none" stroke="#bbb"/>')
    for x, y, name, ours in points:
        a, b = at(x, y)
        out.append(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{7 if ours else 4}" fill="{COLOURS[1] if ours else COLOURS[0]}"><title>{escape(name)}</title></circle>'
        )
        if ours or join:
            out.append(f'<text x="{a + 9:.1f}" y="{b - 7:.1f}">{escape(name)}</text>')
    return f'<svg viewBox="0 0 900 312">{"".join(out)}<text x="470" y="306" text-anchor="middle">{x_name}</text><text x="12" y="14">{y_name}</text></svg>'


def _tornado(answer: Plan) -> str:
    """How far each open input moves the dollars, one at a time."""
    mid = answer.usd.mid
    hours, rent = answer.gpu_hours, answer.usd_per_hour
    moves = [
        ("what runs lose beside the step (80%)", mid * hours.low / hours.mid, mid * hours.high / hours.mid),
        ("rent of a chip-hour", mid * rent.low / rent.mid, mid * rent.high / rent.mid),
        ("tokens, a quarter less or more", 0.75 * mid, 1.25 * mid),
        ("utilisation, a tenth less or more", mid / 1.1, mid / 0.9),
    ]
    moves.sort(key=lambda m: m[1] - m[2])
    low, high = min(m[1] for m in moves), max(m[2] for m in moves)
    out = []
    for i, (name, a, b) in enumerate(moves):
        x, w = 330 + 540 * (a - low) / (high - low), 540 * (b - a) / (high - low)
        out.append(
            f'<text x="320" y="{26 + 34 * i}" text-anchor="end">{escape(name)}</text><rect x="{x:.1f}" y="{10 + 34 * i}" width="{max(w, 1):.1f}" height="22" fill="{COLOURS[0]}"><title>{usd(a)} to {usd(b)}</title></rect>'
        )
    centre = 330 + 540 * (mid - low) / (high - low)
    out.append(
        f'<line x1="{centre:.1f}" x2="{centre:.1f}" y1="4" y2="{10 + 34 * len(moves)}" stroke="#222"/><text x="{centre:.1f}" y="{28 + 34 * len(moves)}" text-anchor="middle">{usd(mid)}</text>'
    )
    return f'<svg viewBox="0 0 900 {36 + 34 * len(moves)}">{"".join(out)}</svg>'


def _pipeline(answer: Plan) -> str:
    """The first micro-batches of a one-way schedule on up to eight stages; idle cells are the bubble."""
    stages, micro = min(answer.layout.pp, 8), 6
    if stages == 1:
        return "<p>One stage: no pipeline, no bubble.</p>"
    out = []
    for s in range(stages):
        for m in range(micro):
            out.append(f'<rect x="{40 + 14 * (s + m)}" y="{6 + 20 * s}" width="13" height="17" fill="{COLOURS[0]}"/>')
            back = stages + micro + 2 * (m + stages - 1 - s)
            out.append(f'<rect x="{40 + 14 * back}" y="{6 + 20 * s}" width="27" height="17" fill="{COLOURS[1]}"/>')
        out.append(f'<text x="4" y="{19 + 20 * s}">s{s}</text>')
    share = answer.step.phases.get("bubble", 0.0) / answer.step.seconds
    note = f"{answer.layout.pp} stages, {answer.step.micro_batches} micro-batches, schedule {answer.layout.schedule}: bubble {share:.1%} of the step. Drawn: how stages fill and drain."
    return f'<svg viewBox="0 0 900 {20 * stages + 10}">{"".join(out)}</svg><p class="small">{note}</p>'


def _bill(answer: Plan) -> str:
    lines = ledger(answer.usd)
    rows = "".join(
        f'<tr class="{"" if x.counted else "no"}"><td>{"counted" if x.counted else "not counted"}</td><td>{escape(x.name)}</td><td class="n">{span(x.usd, money=True)}</td><td>{escape(x.why)}</td></tr>'
        for x in lines
    )
    every = f'<tr><td></td><td><b>everything</b></td><td class="n"><b>{span(total(lines), money=True)}</b></td><td>ends added up</td></tr>'
    three = views(answer.gpu_hours, answer.cluster.chip, answer.usd_per_hour.mid, answer.cluster.n)
    more = "".join(f'<tr><td>{escape(k)}</td><td class="n">{span(v, money=True)}</td></tr>' for k, v in three.items())
    return f"<table>{rows}{every}</table><h2>Three views of the same run</h2><table>{more}</table>"


def _sources(answer: Plan) -> str:
    chip = answer.cluster.chip
    e = chip.efficiency
    rows = [
        ("16-bit and FP8 peak", f"{chip.bf16 / 1e12:g} and {chip.fp8 / 1e12:g} TFLOP/s", chip.source),
        ("memory", f"{chip.memory_bytes / 1e9:g} GB at {chip.memory_bw / 1e12:g} TB/s", chip.source),
        ("links, one way", f"{chip.link_bw / 1e9:g} in the node, {chip.net_bw / 1e9:g} GB/s between", chip.source),
        (
            "shares of peak",
            f"products {e.gemm_bf16:g} (FP8 {e.gemm_fp8:g}, grouped {e.grouped:g}), attention {e.attn_fwd:g}/{e.attn_bwd:g}",
            e.source,
        ),
        ("rent", f"{usd(answer.usd_per_hour.low)} to {usd(answer.usd_per_hour.high)}", chip.rent_date),
    ]
    cells = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td><td>{escape(c)}</td></tr>" for a, b, c in rows)
    guesses = "".join(f"<tr><td>guessed</td><td colspan=2>{escape(g)}</td></tr>" for g in answer.guesses)
    return f"<table>{cells}{guesses}</table>"


def _published(answer: Plan) -> str:
    points = []
    for case in shipped_cases():
        run = case.run
        if run.quantity == "gpu_hours" and run.tokens and run.truth:
            points.append((run.shape.flops_per_token(run.seq_len) * run.tokens, run.truth, run.id, False))
    points.append(
        (answer.shape.flops_per_token(answer.seq_len) * answer.tokens, answer.gpu_hours.mid, "this plan", True)
    )
    return _scatter(points, "training FLOP", "chip-hours")


def _figure(label: str, value: Interval, money: bool = False) -> str:
    write = usd if money else show
    return f"<div><b>{write(value.mid)}</b>{label}<br><span class=small>{write(value.low)} to {write(value.high)}</span></div>"


def render(answer: Plan) -> str:
    """The page."""
    count = answer.shape.params()
    data = {"tokens": answer.tokens, "chips": answer.cluster.n, "mfu": answer.mfu(), "price": answer.usd_per_hour.mid,
            "flops": answer.shape.flops_per_token(answer.seq_len), "peak": answer.cluster.chip.bf16}  # fmt: skip
    memory = [(k, v / 1e9) for k, v in answer.memory.items()]
    phases = [(k, v) for k, v in answer.step.phases.items() if v > 0]
    frontier = [(p["days"], p["usd"], f"{p['chips']} chips", p["chips"] == answer.cluster.n) for p in answer.frontier]
    title = f"{escape(answer.model)} on {escape(answer.cluster.label)}"
    parts = [
        f"<h1>{title}</h1><p>{show(count.total)} parameters, {show(count.active)} active; {show(answer.tokens)} tokens in sequences of {answer.seq_len}; {escape(answer.layout.short())}.</p>",
        '<div class="big">', _figure("chip-hours", answer.gpu_hours), _figure("days", answer.days), _figure("rent", answer.usd, True),
        f"<div><b>{answer.mfu():.1%}</b>utilisation, causal<br><span class=small>{answer.mfu(causal=False):.1%} full attention</span></div></div>",
        '<p class="small">Figures in small type are 80% intervals.</p>',
        "<h2>The bill</h2>", _bill(answer), "<h2>What moves it</h2>", _tornado(answer),
        f"<h2>One step, {answer.step.seconds:.3g} seconds</h2>", _bar(phases, 0.0, "s"), "<h2>Pipeline</h2>", _pipeline(answer),
        f"<h2>Memory of the fullest chip</h2>{_bar(memory, answer.cluster.chip.memory_bytes / 1e9, 'GB')}<p class=small>The dashed line is the chip's memory.</p>",
    ]  # fmt: skip
    if len(frontier) > 1:
        parts += ["<h2>Dollars against days</h2>", _scatter(frontier, "days", "dollars", join=True)]
    parts += ["<h2>Among published runs</h2>", _published(answer), "<h2>What if</h2>", SLIDERS.replace("DATA", json.dumps(data)),
              "<h2>Every constant, with its source</h2>", _sources(answer)]  # fmt: skip
    return f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style></head><body>{"".join(parts)}</body></html>\n'


def write_report(answer: Plan, path: Path) -> None:
    """Write the page to `path`."""
    path.write_text(render(answer), encoding="utf-8")
