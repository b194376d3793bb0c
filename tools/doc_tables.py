"""Put a recipe's tables into a document: python tools/doc_tables.py study-quickstart runs docs/quickstart.md

Each table goes between its markers, `<!-- accuracy -->` and `<!-- /accuracy -->`, and so on for claims and bill. The
numbers in the docs are thus those of finished runs, never typed. A recipe with a frontier has its table too, and two
pictures, docs/img/RECIPE-usd.svg and -tokens.svg.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoestring.cli_options import readable, short
from shoestring.core.atomic import write_text
from shoestring.report import tables
from shoestring.report.frontier import AXES, frontier_svg, frontier_table
from shoestring.report.spec import read_spec
from shoestring.road import find_runs, resolve_recipe

LEFT_OUT = {"accuracy": ("missing", "control"), "claims": ("sense", "unit"), "bill": ("status",), "frontier": ()}


def told(rows: Sequence[Mapping[str, Any]], left_out: Sequence[str]) -> str:
    """Rows as a Markdown table, the way the terminal shows them."""
    shown = [{k: v for k, v in readable(row).items() if k not in left_out} for row in rows]
    columns = list(shown[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [[v if isinstance(v := row.get(c), str) and v else short(v, c) for c in columns] for row in shown]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(name: str, runs_dir: str, document: str) -> None:
    recipe, root = resolve_recipe(name, []), Path(runs_dir)
    runs = find_runs(recipe, root)
    made = {
        "accuracy": tables.result_table(recipe, runs), "claims": tables.claims(recipe, runs),
        "bill": [row for row in tables.bill_table(recipe, runs, root) if "-s" not in row["stage"][-3:]],
    }  # fmt: skip
    if frontier := frontier_table(recipe, read_spec(recipe), runs):
        made["frontier"] = [row | {"usd": f"${row['usd']:.5f}"} for row in frontier]
        for key in AXES:
            picture = Path(document).parent / "img" / f"{name}-{key}.svg"
            write_text(picture, frontier_svg(frontier, key, alone=True))
    if not made["claims"]:
        del made["claims"]
    text = Path(document).read_text(encoding="utf-8")
    for table, rows in made.items():
        parts = re.split(f"(?<=<!-- {table} -->\n).*?(?=<!-- /{table} -->)", text, flags=re.S)
        if len(parts) != 2:
            raise SystemExit(f"{document} must hold one pair of markers for {table}, not {len(parts) - 1}")
        text = f"{parts[0]}{told(rows, LEFT_OUT[table])}\n{parts[1]}"
    write_text(Path(document), text)


if __name__ == "__main__":
    main(*sys.argv[1:])
