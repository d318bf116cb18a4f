"""What runs leave behind, and a study read back from it: a JSON file a run, or all of them as lines of one file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.atomic import write_file
from .settings import Settings

Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """The rows of a study.

    grid   its grid, as plain values; with "made", where and with what it ran
    base   the base's row: parameters, losses, exam (base.py)
    runs   by settings, then by seed (run.py)
    """

    grid: Row
    base: Row
    runs: dict[Settings, dict[int, Row]]

    def both(self, first: Settings, second: Settings) -> list[tuple[Row, Row]]:
        """The rows of two settings, seed by seed, as far as both ran."""
        one, two = self.runs.get(first, {}), self.runs.get(second, {})
        return [(one[seed], two[seed]) for seed in sorted(one.keys() & two.keys())]

    def seeds(self) -> int:
        """How many seeds the settings with most of them ran with."""
        return max((len(rows) for rows in self.runs.values()), default=0)


def run_path(out: Path, settings: Settings, seed: int) -> Path:
    """Where the row of a run lies."""
    return out / "runs" / settings.name().replace(" ", "_") / f"{seed}.json"


def write_json(path: Path, value: Any) -> None:
    """The value as JSON, whole or not at all."""
    write_file(path, lambda staged: staged.write_text(json.dumps(value) + "\n", encoding="utf-8"))


def read_row(path: Path) -> Row | None:
    """The row of a file; None where there is none.

    raises   ValueError naming a file that is no JSON
    """
    if not path.is_file():
        return None
    try:
        row: Row = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}); delete it, and the run is done again") from None
    return row


def study(grid: Row, base: Row, rows: Iterable[Row]) -> Study:
    """The rows, by settings and seed."""
    runs: dict[Settings, dict[int, Row]] = {}
    for row in rows:
        runs.setdefault(Settings(**row["settings"]), {})[row["seed"]] = row
    return Study(grid, base, runs)


def write_study(path: Path, made: Study) -> None:
    """The study as lines: the grid, the base, then a run a line."""
    runs = [row for _, rows in sorted(made.runs.items(), key=lambda item: item[0].name()) for row in rows.values()]
    lines = [json.dumps(row) for row in (made.grid, made.base, *runs)]
    write_file(path, lambda staged: staged.write_text("\n".join(lines) + "\n", encoding="utf-8"))


def read_study(path: Path) -> Study:
    """The study of a file of `write_study`.

    raises   FileNotFoundError, or ValueError naming the file
    """
    if not path.is_file():
        raise FileNotFoundError(f"no rows of a study at {path}; fp8kernels study writes them")
    try:
        grid, base, *runs = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return study(grid, base, runs)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no rows of a study: {error}") from None
