"""The table that users look for first: when is 8-bit faster than BF16? Over (M, N, K), from the rows of the surveys.

python -m bench.when   prints it; `python -m bench.readme` draws it into docs/RESULTS.md
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import ledger, shapes
from .case import text
from .goals import Survey, surveys

PREFIX = "when-"  # of the surveys whose rows the table is made of
SET = "products/when"
HOW = "`make gpu`, or `python -m bench.goals --run when`, on a machine with a GPU makes the rows"


def section(among: Sequence[ledger.Row]) -> str:
    """A table for each format and device, or how to make one."""
    tables = [made for survey in surveys() if survey.name.startswith(PREFIX) for made in _tables(survey, among)]
    return "\n\n".join(tables) if tables else f"No rows yet: {HOW}."


def _tables(survey: Survey, among: Sequence[ledger.Row]) -> list[str]:
    slugs = sorted({str(row["slug"]) for row in among if row["goal"] == survey.name and row["passed"]})
    return [f"**{survey.what}** ({slug})\n\n{grid(survey.name, among, slug)}" for slug in slugs]


def grid(name: str, among: Sequence[ledger.Row], slug: str) -> str:
    """Layers down, rows of the input across; a cell is the BF16 layer's time over ours, bold where ours is faster."""
    wanted = shapes.named(SET)
    rows = sorted({m for m, _, _ in wanted})
    layers = sorted({(n, k) for _, n, k in wanted}, key=lambda layer: (layer[0] * layer[1], layer))
    newest = {
        str(row["shape"]): float(row["figure"])  # type: ignore[arg-type]
        for row in among
        if row["goal"] == name and row["passed"] and row["slug"] == slug
    }
    lines = ["| N x K | " + " | ".join(f"M {m}" for m in rows) + " |", "|---|" + "--:|" * len(rows)]
    for n, k in layers:
        cells = [cell(newest.get(text((m, n, k)))) for m in rows]
        lines.append(f"| {n} x {k} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(speedup: float | None) -> str:
    if speedup is None:
        return ""
    return f"**{speedup:.2f}**" if speedup > 1 else f"{speedup:.2f}"


def main() -> int:
    print(section(ledger.rows()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
