"""The benches measure what they say, the goals can all be built, and README.md shows the newest rows."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import json
from pathlib import Path

import pytest
import torch

from bench import device, goals, ledger, measure, readme
from bench.case import BANDWIDTH, SPEED, TIME, Case
from bench.measure import Comparison, Spread

TIMING = Comparison(Spread(1.0, 2.0, 3.0), Spread(3.0, 4.0, 5.0), speedup=2.0, rounds=7)


def case(**changes: object) -> Case:
    x = torch.ones(1000)
    made = Case(
        "copy", "copy", "-", "cpu", "1000", "clone", x.clone, x.clone, lambda: None, ("copy/cpu",),
        moved=300, baseline_moved=400, flop=2_000_000,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("unit", "figure"), [(SPEED, 2.0), (BANDWIDTH, 1.5), (TIME, 0.5)])
def test_figure(unit: str, figure: float) -> None:
    assert case(unit=unit).figure(TIMING) == figure


def test_row_is_read_back_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "RESULTS", tmp_path)
    monkeypatch.setattr(ledger, "copy_bandwidth", lambda: 10.0)
    new = ledger.row(case(), TIMING, "a-goal")
    path = ledger.append(new)
    ledger.append(new | {"when": "2000-01-01T00:00:00+00:00", "figure": 7.0})
    assert json.loads(path.read_text().splitlines()[0]) == new
    assert new["gflop_per_s"] == 1.0
    assert new["kernels"] == {"copy/cpu": ledger.source_hash("copy", "cpu")}
    newest = ledger.newest("a-goal", ledger.rows())
    assert newest is not None and newest["figure"] == 2.0, "rows are ordered by time, not by place"


def test_debts_name_a_kernel_whose_sources_changed() -> None:
    assert set(ledger.debts([])) == {(verb, backend, "never measured") for verb, backend in ledger.kernels()}
    rows = [
        {"passed": True, "when": "then", "kernels": {f"{verb}/{backend}": ledger.source_hash(verb, backend)}}
        for verb, backend in ledger.kernels()
    ]
    assert ledger.debts(rows) == []
    rows[0]["kernels"] = dict.fromkeys(rows[0]["kernels"], "another")  # type: ignore[call-overload]
    assert [why for _, _, why in ledger.debts(rows)] == ["changed since the row of then"]


def test_sources_of_a_kernel_hold_both_languages() -> None:
    names = {path.relative_to(device.ROOT).as_posix() for path in ledger.sources("quantize", "cpu")}
    assert {"fp8kernels/kernels/quantize/cpu.py", "fp8kernels/formats/hif8.py"} <= names
    assert any(name.startswith("csrc/quantize/") for name in names)
    assert not any(name.endswith(".cu") for name in names)


@pytest.mark.parametrize("goal", goals.goals(), ids=lambda goal: goal.name)
def test_goal_names_a_measurement_that_exists(goal: goals.Goal) -> None:
    module, function = goal.measure.split(":")
    build = getattr(importlib.import_module(f"bench.{module}"), function)
    inspect.signature(build).bind(**goal.arguments)
    assert goal.direction in ("at least", "at most")
    assert goal.unit in (SPEED, BANDWIDTH, TIME)
    assert (goal.unit == TIME) == (goal.direction == "at most")


def test_goal_names_are_different() -> None:
    names = [goal.name for goal in goals.goals()]
    assert len(names) == len(set(names))


def test_goals_say_what_falls_short() -> None:
    chosen = goals.goals()[:2]
    rows = [row_of(goal, goal.value) for goal in chosen]
    assert goals.table(chosen, rows)[1]
    assert not goals.table(chosen, [rows[0], row_of(chosen[1], chosen[1].value * 0.9)])[1]
    assert not goals.table(chosen, rows[:1])[1], "a goal that was never measured is not reached"


def row_of(goal: goals.Goal, figure: float) -> ledger.Row:
    return {"goal": goal.name, "passed": True, "when": "then", "slug": "here", "figure": figure, "kernels": {}}


def test_an_unknown_goal_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="quantize-e4m3"):
        goals.named(["nonsense"])


def test_both_sides_take_turns() -> None:
    order: list[str] = []
    ours, baseline = measure.take_turns(lambda: order.append("ours"), lambda: order.append("baseline"), seconds=0.01)
    assert len(ours) == len(baseline) >= measure.MIN_ROUNDS
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes >= 2 * len(ours) - 1


def test_readme_and_results_show_the_newest_rows() -> None:
    rows = ledger.rows()
    text = readme.README.read_text(encoding="utf-8")
    assert text == readme.with_table(text, readme.readme_table(rows)), "run: python -m bench.readme"
    assert readme.RESULTS.read_text(encoding="utf-8") == readme.results_page(rows), "run: python -m bench.readme"
