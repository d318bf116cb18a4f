"""Draw the tables of README.md and docs/RESULTS.md from the rows; a test checks that both are up to date.

python -m bench.readme
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import ledger, when
from .device import ROOT
from .goals import Goal, Standing, goals

README, RESULTS = ROOT / "README.md", ROOT / "docs" / "RESULTS.md"
BEGIN, END = "<!-- bench:begin (python -m bench.readme) -->", "<!-- bench:end -->"
COMMANDS = {"cpu": "python -m bench.goals --run", "cuda": "make gpu"}


def readme_table(rows: Sequence[ledger.Row]) -> str:
    """For each kind of device that has rows, its goals with the newest rows of the device that measured last."""
    parts = [part for kind in ("cuda", "cpu") if (part := device_table(kind, rows))]
    return "\n\n".join(parts) or "No rows yet."


def device_table(kind: str, rows: Sequence[ledger.Row]) -> str | None:
    """The goals of "cpu" or "cuda", by the device of that kind that measured last; None without rows."""
    chosen = [goal for goal in goals() if goal.device == kind]
    standings = [standing for goal in chosen if (standing := goal.standing(rows))]
    if not standings:
        return None
    newest = max((standing.newest for standing in standings), key=lambda row: str(row["when"]))
    slug = str(newest["slug"])
    lines = ["| what | against | measured | goal | ours | baseline |", "|---|---|--:|--:|--:|--:|"]
    lines += [goal_line(goal, goal.standing([row for row in rows if row["slug"] == slug])) for goal in chosen]
    return "\n".join(
        [*lines, "", f"{machine(newest)}. Drawn from the rows in `bench/results/{slug}/`, made by `{COMMANDS[kind]}`."]
    )


def goal_line(goal: Goal, standing: Standing | None) -> str:
    wanted = f"{'≥' if goal.direction == 'at least' else '≤'} {goal.value:g}"
    if standing is None:
        return f"| {goal.what} | {goal.against} | not measured | {wanted} | | |"
    shown = f"{standing.figure:.2f}"
    if goal.reached(standing.figure) and standing.complete:
        shown = f"**{shown}**"
    if goal.shapes:
        over = f"{goal.reduce} of {len(standing.rows)}" + ("" if standing.complete else f" of {standing.wanted}")
        return f"| {goal.what} | {goal.against} | {shown} {goal.unit} | {wanted} | {over} shapes | |"
    ours, baseline = (float(standing.rows[0][name]["p50"]) for name in ("ours_ms", "baseline_ms"))  # type: ignore[index]
    return f"| {goal.what} | {goal.against} | {shown} {goal.unit} | {wanted} | {ours:.2f} ms | {baseline:.2f} ms |"


def machine(row: ledger.Row) -> str:
    here, versions = row["device"], row["versions"]
    words = f"{here['cpu']}, {here['threads']} threads, {here['isa']}"  # type: ignore[index]
    if "gpu" in here:  # type: ignore[operator]
        words = f"{here['gpu']}, driver {here.get('driver_version', 'unknown')}"  # type: ignore[index, attr-defined]
    return f"{words}; torch {versions['torch']}, Python {versions['python']}"  # type: ignore[index]


def results_page(rows: Sequence[ledger.Row]) -> str:
    """The GPU's goals, what is owed to a GPU, when 8 bits are faster, and the newest row of every case and device."""
    newest: dict[tuple[object, ...], ledger.Row] = {}
    for row in rows:
        key = tuple(row[name] for name in ("slug", "verb", "case", "fmt", "backend", "shape", "baseline"))
        newest[key] = row
    parts = [
        "# Results",
        "The newest row of every case in `bench/results`, times as p20 / p50 / p80 in milliseconds. "
        "Ours and the baseline take turns in one run; `figure` is the median over the rounds. "
        "Drawn by `python -m bench.readme`.",
        "## Goals on a GPU",
        gpu_goals(rows),
        "## GPU debt",
        gpu_debt(rows),
        "## When is 8-bit faster than BF16?",
        "A linear layer with the quantizing of its input, against torch's BF16 layer: its time over ours.",
        when.section(rows),
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


def gpu_goals(rows: Sequence[ledger.Row]) -> str:
    """Every goal that a GPU is to measure, measured or not."""
    lines = ["| goal | what | against | wanted | measured |", "|---|---|---|--:|--:|"]
    for goal in goals():
        if goal.device == "cuda":
            standing = goal.standing(rows)
            measured = "not measured: needs a GPU" if standing is None else f"{standing.figure:.2f}"
            sign = "≥" if goal.direction == "at least" else "≤"
            lines.append(
                f"| `{goal.name}` | {goal.what} | {goal.against} | {sign} {goal.value:g} {goal.unit} | {measured} |"
            )
    return "\n".join(lines)


def gpu_debt(rows: Sequence[ledger.Row]) -> str:
    """The kernels for a GPU and the newest row of each.

    Whether its sources have changed since then is not said here, so that the page stays as it is while they do:
    `python -m bench.ledger` says it, and so does a run of the tests.
    """
    lines = ["| verb | kernel | newest passing row |", "|---|---|---|"]
    lines += [
        f"| {verb} | {backend} | {ledger.newest_row(verb, backend, rows) or 'never measured'} |"
        for verb, backend in ledger.kernels()
        if backend not in ledger.ON_CPU
    ]
    return (
        "Every kernel that runs on a GPU only, and when it was last measured and right. `python -m bench.ledger` names "
        "those whose sources have changed since; `make gpu`, on a machine with a GPU, measures them.\n\n"
        + "\n".join(lines)
    )


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
