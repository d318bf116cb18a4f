"""Draw the tables of README.md and docs/RESULTS.md from the rows; a test checks that both are up to date.

python -m bench.readme
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import ledger
from .device import ROOT
from .goals import Goal, goals

README, RESULTS = ROOT / "README.md", ROOT / "docs" / "RESULTS.md"
BEGIN, END = "<!-- bench:begin (python -m bench.readme) -->", "<!-- bench:end -->"
COMMAND = "python -m bench.goals --run"


def readme_table(rows: Sequence[ledger.Row]) -> str:
    """Every goal with the newest row of the device that measured last."""
    measured = [(goal, ledger.newest(goal.name, rows)) for goal in goals()]
    newest = max((row for _, row in measured if row), key=lambda row: str(row["when"]), default=None)
    if newest is None:
        return "No rows yet."
    slug = str(newest["slug"])
    lines = ["| what | against | measured | goal | ours | baseline |", "|---|---|--:|--:|--:|--:|"]
    lines += [goal_line(goal, ledger.newest(goal.name, rows, slug)) for goal in goals()]
    return "\n".join(
        [*lines, "", f"{machine(newest)}. Drawn from the rows in `bench/results/{slug}/`, made by `{COMMAND}`."]
    )


def goal_line(goal: Goal, row: ledger.Row | None) -> str:
    wanted = f"{'≥' if goal.direction == 'at least' else '≤'} {goal.value:g}"
    if row is None:
        return f"| {goal.what} | {goal.against} | not measured | {wanted} | | |"
    figure = float(row["figure"])  # type: ignore[arg-type]
    shown = f"**{figure:.2f}**" if goal.reached(figure) else f"{figure:.2f}"
    ours, baseline = (float(row[name]["p50"]) for name in ("ours_ms", "baseline_ms"))  # type: ignore[index]
    return f"| {goal.what} | {goal.against} | {shown} {goal.unit} | {wanted} | {ours:.2f} ms | {baseline:.2f} ms |"


def machine(row: ledger.Row) -> str:
    here, versions = row["device"], row["versions"]
    return (
        f"{here['cpu']}, {here['threads']} threads, {here['isa']}; torch {versions['torch']}, "  # type: ignore[index]
        f"Python {versions['python']}"  # type: ignore[index]
    )


def results_page(rows: Sequence[ledger.Row]) -> str:
    """The newest row of every case, device by device."""
    newest: dict[tuple[object, ...], ledger.Row] = {}
    for row in rows:
        key = tuple(row[name] for name in ("slug", "verb", "case", "fmt", "backend", "shape", "baseline"))
        newest[key] = row
    parts = [
        "# Results",
        "The newest row of every case in `bench/results`, times as p20 / p50 / p80 in milliseconds. "
        "Ours and the baseline take turns in one run; `figure` is the median over the rounds. "
        "Drawn by `python -m bench.readme`.",
    ]
    for slug in sorted({str(key[0]) for key in newest}):
        mine = [row for key, row in sorted(newest.items(), key=lambda item: item[0][1:]) if key[0] == slug]
        lines = [
            "| case | format | shape | ours | GB/s | % of copy | GFLOP/s | baseline | its time | figure | commit |",
            "|---|---|---|--:|--:|--:|--:|---|--:|--:|---|",
        ]
        lines += [results_line(row) for row in mine]
        parts += [f"## {slug}", machine(max(mine, key=lambda row: str(row["when"]))) + ".", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def results_line(row: ledger.Row) -> str:
    def spread(name: str) -> str:
        return " / ".join(f"{row[name][p]:.3f}" for p in ("p20", "p50", "p80"))  # type: ignore[index]

    cells = [
        row["case"], row["fmt"], row["shape"], spread("ours_ms"), row["gb_per_s"], row["percent_of_copy"],
        row["gflop_per_s"], row["baseline"], spread("baseline_ms"), row["figure"], row["commit"],
    ]  # fmt: skip
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def with_table(readme: str, table: str) -> str:
    """README.md with the part between the markers replaced.

    raises   ValueError if a marker is missing
    """
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}")
    head, rest = readme.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}"


def main() -> int:
    rows = ledger.rows()
    README.write_text(with_table(README.read_text(encoding="utf-8"), readme_table(rows)), encoding="utf-8")
    RESULTS.write_text(results_page(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
