"""The plan as one self-contained HTML page: bill, time, step, memory, pipeline, frontier, sensitivity, published runs.

Drawings are inline SVG (drawings.py), the sliders a few lines of script; nothing is loaded from anywhere.
"""

# ruff: noqa: E501 (lines of markup)
from __future__ import annotations

import json
from html import escape
from pathlib import Path

from shoestring.core.atomic import write_text
from shoestring.cost import drawings
from shoestring.cost.bill import MTBF_CHIP_HOURS, checkpoint_every, ledger, total, views
from shoestring.cost.chips import all_chips
from shoestring.cost.models import model_names, named_shape
from shoestring.cost.orders import FOLDED, ORDERS, fewest
from shoestring.cost.plan import Plan
from shoestring.cost.residual import Interval
from shoestring.cost.show_plan import SAVE_SECONDS, span
from shoestring.cost.table import shipped_cases
from shoestring.cost.timetable import idle, play
from shoestring.cost.units import show, usd

STYLE = """:root{color-scheme:light dark;--ink:#222;--paper:#fbfaf7;--dim:#666;--rule:#ddd8cd}
@media(prefers-color-scheme:dark){:root{--ink:#e8e4da;--paper:#1b1c1e;--dim:#a5a199;--rule:#3a3a3a}}
body{font:16px/1.5 Georgia,serif;color:var(--ink);background:var(--paper);max-width:920px;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.9rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2.4rem;border-bottom:1px solid var(--rule)}
table{border-collapse:collapse;width:100%;font:14px/1.4 system-ui,sans-serif}td,th{padding:.3rem .5rem;border-bottom:1px solid var(--rule);text-align:left}
td.n{text-align:right;white-space:nowrap}.big{display:flex;gap:2rem;flex-wrap:wrap}.big div{min-width:9rem}.big b{font-size:1.7rem;display:block}
.small,.dim{color:var(--dim);font:13px/1.4 system-ui,sans-serif}svg{width:100%;height:auto;font:12px system-ui,sans-serif}
svg text{fill:var(--ink)}svg text[fill]{fill:#fff}svg .dim{fill:var(--dim)}svg .line{stroke:var(--ink)}
label{display:block;font:14px system-ui,sans-serif;margin:.4rem 0}input[type=range]{width:60%;vertical-align:middle}select{font:inherit}.no{color:var(--dim)}
.wide{overflow-x:auto}
@media(max-width:640px){.wide svg{width:640px}td.n{white-space:normal}.big{gap:1rem}body{margin-top:1.2rem}table{font-size:13px}td,th{padding:.3rem .25rem}td:last-child{overflow-wrap:anywhere}td.n:last-child{overflow-wrap:normal}}"""
SLIDERS = """<form id="s" aria-label="what if"></form><p id="o" class="big" aria-live="polite"></p><p class="small">Chip-hours = tokens x FLOPs a token / (16-bit peak x utilisation). Choosing a model or a chip keeps the utilisation: compare models of like kind, or plan them anew.</p><script>
const d=DATA,form=document.getElementById("s"),v={model:d.model,chip:d.chip,tokens:d.tokens/1e12,chips:d.chips,mfu:d.mfu*100,price:d.price};
function n(x){for(const[s,u]of[[1e12,"T"],[1e9,"B"],[1e6,"M"],[1e3,"K"]])if(x>=s)return(x/s).toPrecision(3)+u;return x.toPrecision(3)}
function row(words,control){const l=document.createElement("label");l.append(words+" ",control);form.append(l);return l}
for(const[k,words,list]of[["model","model",d.models],["chip","chip",d.kinds]]){const s=document.createElement("select");for(const name of Object.keys(list)){const o=document.createElement("option");o.textContent=name;o.selected=name===v[k];s.append(o)}s.onchange=()=>{v[k]=s.value;if(k==="chip"&&list[s.value][1])set("price",list[s.value][1]);draw()};row(words,s)}
const inputs={};function set(k,x){v[k]=x;inputs[k].value=Math.log(x)}
for(const[k,words,a,b]of[["tokens","training tokens, trillions",v.tokens/50,v.tokens*10],["chips","chips",Math.max(1,v.chips/64),v.chips*16],["mfu","utilisation of the 16-bit peak, %",5,70],["price","dollars a chip-hour",.1,20]]){const i=document.createElement("input");i.type="range";i.min=Math.log(a);i.max=Math.log(b);i.step="any";inputs[k]=i;const out=document.createElement("b"),l=row(words,i);l.append(" ",out);i.show=()=>out.textContent=k==="chips"?Math.round(v[k]):v[k].toPrecision(3);i.oninput=()=>{v[k]=Math.exp(+i.value);draw()};set(k,v[k])}
function draw(){for(const i of Object.values(inputs))i.show();const h=d.models[v.model]*v.tokens*1e12/(d.kinds[v.chip][0]*v.mfu/100)/3600,out=document.getElementById("o");out.replaceChildren();for(const[big,words]of[[n(h),"chip-hours"],[n(h/Math.round(v.chips)/24),"days"],["$"+n(h*v.price),"rent"]]){const box=document.createElement("div"),b=document.createElement("b");b.textContent=big;box.append(b,words);out.append(box)}}draw()</script>"""


def _sensitivity(answer: Plan) -> str:
    """How far each open input moves the dollars, one at a time."""
    mid, hours, rent = answer.usd.mid, answer.gpu_hours, answer.usd_per_hour
    moves = [
        ("what runs lose beside the step (80%)", mid * hours.low / hours.mid, mid * hours.high / hours.mid),
        ("rent of a chip-hour", mid * rent.low / rent.mid, mid * rent.high / rent.mid),
        ("tokens, a quarter less or more", 0.75 * mid, 1.25 * mid),
        ("utilisation, a tenth less or more", mid / 1.1, mid / 0.9),
    ]
    rows = [(name, low, high, f"{usd(low)} to {usd(high)}") for name, low, high in moves]
    return drawings.spans(sorted(rows, key=lambda r: r[1] - r[2]), mid, usd(mid), "what moves the dollars")


def _pipeline(answer: Plan) -> str:
    """One step's timetable on at most eight ranks, with the plan's own durations, and every schedule's idle time."""
    layout, step = answer.layout, answer.step
    if layout.pp == 1:
        return "<p>One stage: no pipeline, no bubble.</p>"
    ranks = min(layout.pp, 4 if layout.schedule in FOLDED else 8)
    micro = fewest(layout.schedule, ranks) + (4 if layout.schedule.startswith("dual") else ranks)
    cells = play(layout.schedule, ranks, micro, **step.chunk)
    here = sum(idle(cells, ranks)) / ranks / max(cell.end for cell in cells)
    words = f"Drawn: {ranks} ranks, {micro} micro-batches, order {layout.schedule}, with the slowest stage's durations; {here:.0%} idle."
    share = step.phases.get("bubble", 0.0) / step.seconds
    words += f" The plan: {layout.pp} ranks, {step.micro_batches} micro-batches, {layout.schedule}, each stage with its own durations: {share:.1%} of the step idle."
    rows = [(name, _idle(name, layout.pp, step.chunk)) for name in ORDERS if name != "dualpipe" or layout.pp % 2 == 0]
    table = "".join(f'<tr><td>{name}</td><td class="n">{seconds:.3g} s</td></tr>' for name, seconds in rows)
    head = f"<tr><th>schedule</th><th>idle time of a rank, {layout.pp} ranks with even stages</th></tr>"
    return f'{drawings.timetable(cells, ranks)}<p class="small">{words}</p><table>{head}{table}</table>'


def _idle(schedule: str, p: int, chunk: dict[str, float]) -> float:
    """Mean idle seconds of a rank when every stage takes what the slowest one does."""
    return sum(idle(play(schedule, p, fewest(schedule, p), **chunk), p)) / p


def _time(answer: Plan) -> str:
    """The calendar: how long, how often it breaks, how often to save."""
    days, n = answer.days, answer.cluster.n
    every, lost = checkpoint_every(SAVE_SECONDS, n)
    breaks = days.scaled(24 * n / MTBF_CHIP_HOURS)
    rows = [("days of this run (80%)", days.low, days.high, f"{days.low:.3g} to {days.high:.3g} days")]
    rows += [(f"on {p['chips']:,} chips", 0.0, p["days"], f"{p['days']:.3g} days") for p in answer.frontier]
    words = (
        f"At one unexpected interruption in {MTBF_CHIP_HOURS:,} chip-hours (Llama 3, arXiv 2407.21783) it stops about "
        f"{show(breaks.mid)} times. Saving for {SAVE_SECONDS:g} s (a guess) every {every / 60:.0f} minutes (Young) loses {lost:.1%}."
    )
    return drawings.spans(rows, days.mid, f"{show(days.mid)} days", "days") + f'<p class="small">{words}</p>'


def _bill(answer: Plan) -> str:
    lines = ledger(answer.usd)
    rows = "".join(
        f'<tr class="{"" if x.counted else "no"}"><td>{"counted" if x.counted else "not counted"}</td><td>{escape(x.name)}</td><td class="n">{span(x.usd, money=True)}</td><td>{escape(x.why)}</td></tr>'
        for x in lines
    )
    branches = [
        (name, [(x.name, x.usd.mid, span(x.usd, money=True)) for x in lines if x.counted is counted])
        for name, counted in (("counted", True), ("not counted", False))
    ]
    whole = total(lines)
    every = f'<tr><td></td><td><b>everything</b></td><td class="n"><b>{span(whole, money=True)}</b></td><td>ends added up</td></tr>'
    three = views(answer.gpu_hours, answer.cluster.chip, answer.usd_per_hour.mid, answer.cluster.n)
    more = "".join(f'<tr><td>{escape(k)}</td><td class="n">{span(v, money=True)}</td></tr>' for k, v in three.items())
    drawn = drawings.tree("everything", branches, usd(whole.mid))
    return f"{drawn}<table>{rows}{every}</table><h2>Three views of the same run</h2><table>{more}</table>"


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
    return drawings.scatter(points, "training FLOP", "chip-hours")


def _figure(label: str, value: Interval, money: bool = False) -> str:
    write = usd if money else show
    return f"<div><b>{write(value.mid)}</b>{label}<br><span class=small>{write(value.low)} to {write(value.high)}</span></div>"


def _what_if(answer: Plan) -> str:
    """Sliders over tokens, chips, utilisation and price; the model and the chip can be changed too."""
    chip = answer.cluster.chip
    models = {answer.model: answer.shape.flops_per_token(answer.seq_len)}
    models |= {name: named_shape(name).flops_per_token(answer.seq_len) for name in model_names()}
    kinds: dict[str, list[float | None]] = {chip.name: [chip.bf16, answer.usd_per_hour.mid]}
    kinds |= {c.name: [c.bf16, c.rent_mid] for c in all_chips().values() if c.datacenter and c.name != chip.name}
    data = {"tokens": answer.tokens, "chips": answer.cluster.n, "mfu": answer.mfu(), "price": answer.usd_per_hour.mid,
            "model": answer.model, "chip": chip.name, "models": models, "kinds": kinds}  # fmt: skip
    return SLIDERS.replace("DATA", json.dumps(data).replace("<", "\\u003c"))


def render(answer: Plan) -> str:
    """The page."""
    count, chip = answer.shape.params(), answer.cluster.chip
    memory = [(k, v / 1e9) for k, v in answer.memory.items()]
    phases = [(k, v) for k, v in answer.step.phases.items() if v > 0]
    frontier = [(p["days"], p["usd"], f"{p['chips']} chips", p["chips"] == answer.cluster.n) for p in answer.frontier]
    title = f"{escape(answer.model)} on {escape(answer.cluster.label)}"
    head = f"{show(count.total)} parameters, {show(count.active)} active; {show(answer.tokens)} tokens in sequences of {answer.seq_len}; {escape(answer.layout.short())}."
    use = f"<div><b>{answer.mfu():.1%}</b>utilisation, causal<br><span class=small>{answer.mfu(causal=False):.1%} full attention</span></div>"
    figures = [
        _figure("chip-hours", answer.gpu_hours),
        _figure("days", answer.days),
        _figure("rent", answer.usd, True),
        use,
    ]
    sections = [
        ("The bill", _bill(answer)), ("What moves it", _sensitivity(answer)), ("How long it takes", _time(answer)),
        (f"One step, {answer.step.seconds:.3g} seconds", drawings.bar(phases, 0.0, "s", "phases of one step")),
        ("Pipeline", _pipeline(answer)),
        ("Memory of the fullest chip", drawings.bar(memory, chip.memory_bytes / 1e9, "GB", "memory by use")
         + "<p class=small>The dashed line is the chip's memory.</p>"),
        ("Dollars against days", drawings.scatter(frontier, "days", "dollars", join=True) if len(frontier) > 1 else ""),
        ("Among published runs", _published(answer)), ("What if", _what_if(answer)),
        ("Every constant, with its source", _sources(answer)),
    ]  # fmt: skip
    body = "".join(f"<h2>{name}</h2>{_scrolled(html)}" for name, html in sections if html)
    top = f'<h1>{title}</h1><p>{head}</p><div class="big">{"".join(figures)}</div><p class="small">Figures in small type are 80% intervals.</p>'
    return f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style></head><body>{top}{body}</body></html>\n'


def _scrolled(html: str) -> str:
    """Drawings in boxes of their own, which scroll on a narrow screen: shrunk to it their words cannot be read."""
    return html.replace("<svg", '<div class="wide"><svg').replace("</svg>", "</svg></div>")


def write_report(answer: Plan, path: Path) -> None:
    """Write the page to `path`."""
    write_text(path, render(answer))
