"""The goals of bench/goals.toml: measure those that this machine can, and say how far the rest is.

python -m bench.goals --run [name…]   measure, append a row for each, then print
python -m bench.goals                 print goal, newest rows and gap; exit 1 where one falls short
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fp8kernels.console import console

from . import device, ledger, shapes
from .case import text
from .run import CPU_SECONDS, THREADS, Job, measure_all

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).parent / "goals.toml"
REDUCTIONS = {
    "geomean": lambda figures: math.exp(math.fsum(map(math.log, figures)) / len(figures)),
    "min": min,
    "max": max,
}


@dataclass(frozen=True)
class Survey:
    """What is measured and kept as rows.

    device     "cpu", or "cuda" for what needs a GPU
    measure    "bench file:function" that builds the Case, called with `arguments`
    shapes     a set of bench/shapes.py, each of which becomes the argument `shape` of one case; or nothing
    """

    name: str
    what: str
    against: str
    unit: str
    device: str
    measure: str
    arguments: dict[str, Any] = field(default_factory=dict)
    shapes: str = ""

    def jobs(self) -> list[Job]:
        """What there is to measure: one case, or one for each shape."""
        if not self.shapes:
            return [Job(self.name, self.device, self.measure, self.arguments)]
        given = shapes.named(self.shapes)
        return [Job(self.name, self.device, self.measure, {**self.arguments, "shape": each}) for each in given]


@dataclass(frozen=True)
class Goal(Survey):
    """One line of a speed table.

    value      what the figure must reach
    direction  "at least" or "at most"
    reduce     how the figures of the shapes become one: "geomean", "min" or "max"
    rows       the name of a goal whose measurement this one judges too, in place of one of its own
    """

    value: float = math.nan
    direction: str = "at least"
    reduce: str = "geomean"
    rows: str = ""

    def reached(self, figure: float) -> bool:
        return figure >= self.value if self.direction == "at least" else figure <= self.value

    def gap(self, figure: float) -> float:
        """How far beyond the goal, as a part of it; negative where it falls short."""
        return (figure / self.value - 1) * (1 if self.direction == "at least" else -1)

    def standing(self, among: Sequence[ledger.Row], slug: str | None = None) -> Standing | None:
        """The newest rows of this goal, of this device where it has any; None where there is none."""
        name = self.rows or self.name
        if not self.shapes:
            row = ledger.newest(name, among, slug)
            return None if row is None else Standing(figure_of(row), [row], 1)
        newest = ledger.newest(name, among, slug)
        if newest is None:
            return None
        mine = [row for row in among if row["slug"] == newest["slug"]]
        wanted = [text(shape) for shape in shapes.named(self.shapes)]
        found = [ledger.newest(name, [row for row in mine if row["shape"] == shape]) for shape in wanted]
        rows = [row for row in found if row is not None]
        return Standing(REDUCTIONS[self.reduce]([figure_of(row) for row in rows]), rows, len(wanted)) if rows else None


@dataclass(frozen=True)
class Standing:
    """A goal's figure over the newest rows of its shapes; not complete where some of the `wanted` shapes have none."""

    figure: float
    rows: list[ledger.Row]
    wanted: int

    @property
    def complete(self) -> bool:
        return len(self.rows) == self.wanted

    @property
    def stale(self) -> bool:
        """Whether the sources of a kernel have changed since its row."""
        return any(row["kernels"] != ledger.hashes(row["kernels"]) for row in self.rows)  # type: ignore[arg-type]

    @property
    def newest(self) -> ledger.Row:
        return max(self.rows, key=lambda row: str(row["when"]))


def figure_of(row: ledger.Row) -> float:
    return float(row["figure"])  # type: ignore[arg-type]


def goals() -> list[Goal]:
    made: dict[str, Goal] = {}
    for each in _read().get("goal", []):
        source = made.get(each.get("rows", ""))
        same = {} if source is None else {key: getattr(source, key) for key in ("measure", "arguments", "shapes")}
        made[each["name"]] = Goal(**(same | each))
    return list(made.values())


def surveys() -> list[Survey]:
    """What is measured without a goal: for the tables that users look for, and for shapes that no goal names."""
    return [Survey(**each) for each in _read().get("survey", [])]


def _read() -> dict[str, Any]:
    with FILE.open("rb") as file:
        return tomllib.load(file)


def named(names: Sequence[str]) -> list[Goal | Survey]:
    """The goals and surveys whose name starts with one of the names; all where none is given.

    raises   ValueError if a name fits no goal
    """
    everything = [*goals(), *surveys()]
    for name in names:
        if not any(goal.name.startswith(name) for goal in everything):
            raise ValueError(f"no goal is named {name}…; there are {', '.join(goal.name for goal in everything)}")
    return [goal for goal in everything if not names or any(goal.name.startswith(name) for name in names)]


def can_measure(goal: Survey) -> bool:
    return goal.device == "cpu" or torch.cuda.is_available()


def jobs_of(chosen: Sequence[Goal | Survey]) -> list[Job]:
    """The measurements of goals, each once, though several goals may judge it."""
    return [job for goal in chosen if not getattr(goal, "rows", "") for job in goal.jobs()]


def table(chosen: Sequence[Goal], rows: Sequence[ledger.Row]) -> tuple[Table, bool]:
    """The goals with their newest rows, and whether all that this machine can measure are reached."""
    out = Table("goal", "what", "against", "measured", "gap", "row", box=None, pad_edge=False)
    reached = True
    for goal in chosen:
        standing = goal.standing(rows, device.slug(goal.device) if can_measure(goal) else None)
        wanted = f"{goal.direction} {goal.value:g} {goal.unit}"
        if standing is None:
            why = "not measured" if can_measure(goal) else "not measured: needs a GPU"
            out.add_row(goal.name, goal.what, goal.against, why, wanted, "")
            reached &= not can_measure(goal)
            continue
        good = goal.reached(standing.figure) and standing.complete
        reached &= good
        over = f" {goal.reduce} of {len(standing.rows)} of {standing.wanted} shapes," if goal.shapes else ""
        measured = f"[{'green' if good else 'red'}]{standing.figure:.2f}[/]{over} ({wanted})"
        where = f"{str(standing.newest['when'])[:16]} {standing.newest['slug']}"
        stale = ", sources changed since" if standing.stale else ""
        out.add_row(goal.name, goal.what, goal.against, measured, f"{goal.gap(standing.figure):+.0%}", where + stale)
    return out, reached


def short(chosen: Sequence[Goal], rows: Sequence[ledger.Row]) -> list[str]:
    """The same in one line a goal, for an output of which only the end may be kept."""
    lines = []
    for goal in chosen:
        standing = goal.standing(rows, device.slug(goal.device) if can_measure(goal) else None)
        wanted = f"{'≥' if goal.direction == 'at least' else '≤'} {goal.value:g} {goal.unit}"
        if standing is None:
            lines.append(f"{goal.name:<28} not measured   {wanted}")
            continue
        mark = "ok  " if goal.reached(standing.figure) and standing.complete else "MISS"
        over = f" ({goal.reduce} of {len(standing.rows)}/{standing.wanted} shapes)" if goal.shapes else ""
        stale = ", sources changed since" if standing.stale else ""
        lines.append(f"{goal.name:<28} {mark} {standing.figure:8.3f}  {wanted}{over}{stale}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.goals", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="goals and surveys whose names start so; all by default")
    parser.add_argument("--run", action="store_true", help="measure and append rows before printing")
    parser.add_argument("--short", action="store_true", help="one line a goal")
    parser.add_argument("--dry", action="store_true", help="with --run: measure, but append nothing")
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"of one comparison ({CPU_SECONDS:g} on a CPU, less on a GPU, where all is steadier)",
    )
    given = parser.parse_args(arguments)
    out = console()
    try:
        chosen = named(given.names)
    except ValueError as error:
        parser.error(str(error))
    passed = True
    if given.run:
        torch.set_num_threads(THREADS)
        passed = measure_all(
            jobs_of(list(filter(can_measure, chosen))), out.print, seconds=given.seconds, keep=not given.dry
        )
        if given.dry:
            return 0 if passed else 1
    judged = [goal for goal in chosen if isinstance(goal, Goal)]
    printed, reached = table(judged, ledger.rows())
    if given.short:
        print("\n".join(short(judged, ledger.rows())))
    else:
        out.print(printed)
    return 0 if reached and passed else 1


if __name__ == "__main__":
    sys.exit(main())
