"""The goals of bench/goals.toml: measure those that this machine can, and say how far the rest is.

python -m bench.goals --run [name…]   measure, append a row for each, then print
python -m bench.goals                 print goal, newest row and gap; exit 1 where one falls short
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fp8kernels.console import console
from fp8kernels.ops.table import BACKEND_VARIABLE

from . import device, ledger
from .case import Case
from .measure import SECONDS, reuse_freed_memory, summary, take_turns

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).parent / "goals.toml"
THREADS = 2  # the goals are set for two cores
PLACEMENTS = 5  # times that the buffers of a goal are made anew


@dataclass(frozen=True)
class Goal:
    """One line of a speed table.

    measure    "bench file:function" that builds the Case, called with `arguments`
    value      what the figure must reach
    direction  "at least" or "at most"
    device     "cpu" or "gpu"
    """

    name: str
    what: str
    against: str
    value: float
    direction: str
    unit: str
    device: str
    measure: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def reached(self, figure: float) -> bool:
        return figure >= self.value if self.direction == "at least" else figure <= self.value

    def gap(self, figure: float) -> float:
        """How far beyond the goal, as a part of it; negative where it falls short."""
        return (figure / self.value - 1) * (1 if self.direction == "at least" else -1)

    def case(self) -> Case:
        module, function = self.measure.split(":")
        made: Case = getattr(importlib.import_module(f"bench.{module}"), function)(**self.arguments)
        return made


def goals() -> list[Goal]:
    with FILE.open("rb") as file:
        return [Goal(**each) for each in tomllib.load(file)["goal"]]


def named(names: Sequence[str]) -> list[Goal]:
    """The goals whose name starts with one of the names; all where none is given.

    raises   ValueError if a name fits no goal
    """
    everything = goals()
    for name in names:
        if not any(goal.name.startswith(name) for goal in everything):
            raise ValueError(f"no goal is named {name}…; there are {', '.join(goal.name for goal in everything)}")
    return [goal for goal in everything if not names or any(goal.name.startswith(name) for name in names)]


def can_measure(goal: Goal) -> bool:
    return goal.device == "cpu" or torch.cuda.is_available()


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Every verb runs on this backend or fails."""
    before = os.environ.get(BACKEND_VARIABLE)
    os.environ[BACKEND_VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[BACKEND_VARIABLE]
        else:
            os.environ[BACKEND_VARIABLE] = before


def measure(goal: Goal, seconds: float = SECONDS) -> ledger.Row:
    """Check, time, and return the row; over several placements in memory, because the pages a buffer gets matter."""
    ours: list[float] = []
    baseline: list[float] = []
    for _ in range(PLACEMENTS):
        case, more, more_baseline = place(goal, seconds / PLACEMENTS)
        ours, baseline = ours + more, baseline + more_baseline
        gc.collect()
    return ledger.row(case, summary(ours, baseline), goal.name)


def place(goal: Goal, seconds: float) -> tuple[Case, list[float], list[float]]:
    """One placement: the case without its buffers, and the samples of both sides."""
    reuse_freed_memory(on=False)
    case = goal.case()
    reuse_freed_memory(on=case.reuse)
    with forced(case.backend):
        case.check()
        ours, baseline = take_turns(case.ours, case.baseline, seconds)
    return dataclasses.replace(case, ours=idle, baseline=idle, check=idle), ours, baseline


def idle() -> None:
    """Nothing: what stands in a case whose buffers are gone."""


def table(chosen: Sequence[Goal], rows: Sequence[ledger.Row]) -> tuple[Table, bool]:
    """The goals with their newest rows, and whether all are reached."""
    out = Table("goal", "what", "against", "measured", "gap", "row", box=None, pad_edge=False)
    reached = True
    for goal in chosen:
        row = ledger.newest(goal.name, rows, device.slug())
        wanted = f"{goal.direction} {goal.value:g} {goal.unit}"
        if row is None:
            out.add_row(goal.name, goal.what, goal.against, "not measured", wanted, "")
            reached = False
            continue
        figure = float(row["figure"])  # type: ignore[arg-type]
        colour = "green" if goal.reached(figure) else "red"
        reached &= goal.reached(figure)
        stale = "" if row["kernels"] == ledger.hashes(row["kernels"]) else ", sources changed since"  # type: ignore[arg-type]
        out.add_row(
            goal.name, goal.what, goal.against, f"[{colour}]{figure:.2f}[/] ({wanted})", f"{goal.gap(figure):+.0%}",
            f"{str(row['when'])[:16]} {row['slug']}{stale}",
        )  # fmt: skip
    return out, reached


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.goals", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="goals whose names start so; all by default")
    parser.add_argument("--run", action="store_true", help="measure and append rows before printing")
    parser.add_argument("--dry", action="store_true", help="with --run: measure, but append nothing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of one comparison ({SECONDS:g})")
    given = parser.parse_args(arguments)
    out = console()
    try:
        chosen = named(given.names)
    except ValueError as error:
        parser.error(str(error))
    if given.run:
        torch.set_num_threads(THREADS)
        for goal in filter(can_measure, chosen):
            row = measure(goal, given.seconds)
            if not given.dry:
                ledger.append(row)
            out.print(
                f"{goal.name}: {row['figure']} {goal.unit} ({goal.direction} {goal.value:g}); "
                f"ours {row['ours_ms']['p50']:.3f} ms, {goal.against} {row['baseline_ms']['p50']:.3f} ms"  # type: ignore[index]
            )
        if given.dry:
            return 0
    printed, reached = table(chosen, ledger.rows())
    out.print(printed)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
