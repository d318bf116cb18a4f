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

import fp8kernels
from bench import device, goals, ledger, measure, readme, shapes, when
from bench.case import BANDWIDTH, MEMORY, MICROSECONDS, PERCENT, SPEED, TERAFLOPS, TIME, Case, noted, text
from bench.measure import Comparison, Spread

TIMING = Comparison(Spread(1.0, 2.0, 3.0), Spread(3.0, 4.0, 5.0), speedup=2.0, rounds=7)


def case(**changes: object) -> Case:
    x = torch.ones(1000)
    made = Case(
        "copy", "copy", "-", "cpu", "1000", "clone", x.clone, x.clone, lambda: None, ("copy/cpu",),
        moved=300, baseline_moved=400, flop=2_000_000,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("unit", "figure"),
    [(SPEED, 2.0), (BANDWIDTH, 1.5), (TIME, 0.5), (MEMORY, 0.5), (MICROSECONDS, 2000.0), (TERAFLOPS, 0.001)],
)
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


def test_rows_of_a_gpu_keep_what_it_was_like(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ledger, "RESULTS", tmp_path)
    monkeypatch.setattr(ledger.cuda_time, "copy_bandwidth", lambda: 4300.0)
    card = {"gpu": "NVIDIA H200", "driver": "580.1"}
    monkeypatch.setattr(device, "device", lambda kind="cpu": {"cpu": "x"} | (card if kind == "cuda" else {}))
    new = ledger.row(case(device="cuda"), TIMING, how="graph replays", sensors={"clocks.sm": 1980.0})
    assert ledger.append(new, "cuda").parent.name == "nvidia-h200"
    assert new["device"] == {"cpu": "x"} | card
    assert (new["timed"], new["copy_gb_per_s"]) == ("graph replays", 4300)
    assert new["sensors"] == {"clocks.sm": 1980.0}
    assert "sensors" not in ledger.row(case(moved=0), TIMING)


def test_calls_in_turn_are_timed_as_one() -> None:
    done: list[int] = []
    timed = case(calls=4, clock=lambda ours, baseline, seconds: measure.Samples([8.0], [4.0], "a clock"))
    assert timed.samples(1.0) == measure.Samples([2.0], [1.0], "a clock")
    case(ours=lambda: done.append(1)).samples(0.001)
    assert done


def test_the_kernels_that_ran_are_noted() -> None:
    with noted() as found:
        fp8kernels.quantize(torch.randn(4, 16), "e4m3")
    assert len(found) == 1
    assert found.pop().startswith("quantize/")
    with noted() as found:
        pass
    assert not found


def test_debts_name_a_kernel_whose_sources_changed() -> None:
    assert set(ledger.debts([])) == {(verb, backend, "never measured") for verb, backend in ledger.kernels()}
    rows = [
        {"passed": True, "when": "then", "kernels": {f"{verb}/{backend}": ledger.source_hash(verb, backend)}}
        for verb, backend in ledger.kernels()
    ]
    assert ledger.debts(rows) == []
    rows[0]["kernels"] = dict.fromkeys(rows[0]["kernels"], "another")  # type: ignore[call-overload]
    assert [why for _, _, why in ledger.debts(rows)] == ["changed since the row of then"]


def test_gpu_debts_are_those_of_kernels_for_a_gpu() -> None:
    assert {backend for _, backend, _ in ledger.gpu_debts([])} <= {"cuda", "triton", "stream", "vendor", "decoded"}
    assert ("copy", "cuda", "never measured") in ledger.gpu_debts([])
    row = {"passed": True, "when": "2026-01-02T03:04", "kernels": {"copy/cuda": "another"}}
    assert ("copy", "cuda", "changed since the row of 2026-01-02T03:04") in ledger.gpu_debts([row])
    page = readme.gpu_debt([row])
    assert "| copy | cuda | 2026-01-02 |" in page, "the page does not change with the sources"
    assert "| copy | triton | never measured |" in page


@pytest.mark.parametrize(("verb", "backend"), sorted(ledger.kernels()))
def test_every_kernel_has_a_file_that_its_hash_covers(verb: str, backend: str) -> None:
    names = {path.relative_to(device.ROOT).as_posix() for path in ledger.sources(verb, backend)}
    own = f"fp8kernels/kernels/{verb}/{ledger.PYTHON_FILE.get(backend, f'{backend}.py')}"
    assert own in names, f"bench/ledger.py looks for {own}"
    if backend == "cuda":
        assert "fp8kernels/kernels/cuda.py" in names
        assert any(name.endswith(".cu") for name in names)
        assert any(name.startswith("python/bind_") for name in names)
    if verb == "norm_quantize" and backend in ("cpu", "triton"):
        assert f"fp8kernels/kernels/quantize/{Path(own).name}" in names, "imports are followed"
    if verb == "norm_quantize" and backend == "cpu":
        assert "csrc/quantize/quantize.cpp" in names, "a composed kernel is made of the compiled one that it calls"


def test_sources_of_a_kernel_hold_both_languages() -> None:
    names = {path.relative_to(device.ROOT).as_posix() for path in ledger.sources("quantize", "cpu")}
    assert {"fp8kernels/kernels/quantize/cpu.py", "fp8kernels/formats/hif8.py"} <= names
    assert any(name.startswith("csrc/quantize/") for name in names)
    assert not any(name.endswith(".cu") for name in names)


@pytest.mark.parametrize("goal", [*goals.goals(), *goals.surveys()], ids=lambda goal: goal.name)
def test_goal_names_a_measurement_that_exists(goal: goals.Goal | goals.Survey) -> None:
    for job in goal.jobs():
        module, function = job.measure.split(":")
        build = getattr(importlib.import_module(f"bench.{module}"), function)
        inspect.signature(build).bind(**job.arguments)
        assert job.device in ("cpu", "cuda")
    assert goal.unit in (SPEED, BANDWIDTH, TIME, MEMORY, MICROSECONDS, TERAFLOPS, PERCENT)
    if isinstance(goal, goals.Goal):
        assert goal.value > 0
        assert goal.reduce in goals.REDUCTIONS
        assert goal.direction == ("at most" if goal.unit in (TIME, MEMORY, MICROSECONDS, PERCENT) else "at least")


def test_goal_names_are_different() -> None:
    names = [goal.name for goal in (*goals.goals(), *goals.surveys())]
    assert len(names) == len(set(names))


def test_a_goal_over_shapes_reduces_the_newest_rows_of_each() -> None:
    worst = next(goal for goal in goals.goals() if goal.name == "gpu-gemm-llm-worst")
    wanted = shapes.named(worst.shapes)
    assert worst.rows == "gpu-gemm-llm" and len(wanted) > 10
    assert all(job.goal != worst.name for job in goals.jobs_of([worst])), "its rows are those of another goal"

    def row(shape: shapes.Shape, figure: float, when: str) -> ledger.Row:
        return row_of(worst, figure) | {"goal": worst.rows, "shape": text(shape), "when": when}

    rows = [row(wanted[0], 0.1, "1")] + [row(shape, 1.5, "2") for shape in wanted[:-1]]
    standing = worst.standing(rows)
    assert standing is not None and not standing.complete
    assert standing.figure == 1.5, "the older row of the first shape counts no more"
    standing = worst.standing([*rows, row(wanted[-1], 0.98, "3")])
    assert standing is not None and standing.complete and standing.figure == 0.98
    geomean = dataclasses.replace(worst, reduce="geomean").standing(
        [row(wanted[0], 2.0, "1"), row(wanted[1], 8.0, "1")]
    )
    assert geomean is not None and geomean.figure == pytest.approx(4.0)


def test_short_table_has_a_line_a_goal() -> None:
    chosen = goals.goals()[:2]
    rows = [row_of(chosen[0], chosen[0].value * 2)]
    ok, missing = goals.short(chosen, rows)
    assert " ok " in ok and f"{chosen[0].value * 2:.3f}" in ok
    assert "not measured" in missing
    assert "MISS" in goals.short(chosen[:1], [row_of(chosen[0], chosen[0].value / 2)])[0]


def test_what_needs_a_gpu_is_named_and_fails_nothing() -> None:
    chosen = [goal for goal in goals.goals() if goal.device == "cuda"]
    printed, reached = goals.table(chosen, [])
    assert reached == (not torch.cuda.is_available())
    if not torch.cuda.is_available():
        assert set(printed.columns[3].cells) == {"not measured: needs a GPU"}
        assert not any(map(goals.can_measure, chosen))


def test_goals_say_what_falls_short() -> None:
    chosen = goals.goals()[:2]
    rows = [row_of(goal, goal.value) for goal in chosen]
    assert goals.table(chosen, rows)[1]
    assert not goals.table(chosen, [rows[0], row_of(chosen[1], chosen[1].value * 0.9)])[1]
    assert not goals.table(chosen, rows[:1])[1], "a goal that was never measured is not reached"


def row_of(goal: goals.Goal, figure: float) -> ledger.Row:
    return {
        "shape": "",
        "goal": goal.name,
        "passed": True,
        "when": "then",
        "slug": "here",
        "figure": figure,
        "kernels": {},
    }


def test_an_unknown_goal_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="quantize-e4m3"):
        goals.named(["nonsense"])


def test_shapes_are_named_and_whole() -> None:
    for name, found in shapes.SETS.items():
        assert found and len(found) == len(set(found)), name
        assert all(len(shape) == (3 if name.startswith("products/") else 2) for shape in found), name
        assert all(size >= 1 for shape in found for size in shape), name
    assert all(m <= 64 and n >= shapes.WIDE for m, n, _ in shapes.named("products/decode"))
    assert all(2 * rows * cols >= 64 << 20 for rows, cols in (*shapes.named("tensors/memory"),))
    assert any(m % 16 for m, _, _ in shapes.named("products/vit"))
    with pytest.raises(ValueError, match="products/llm"):
        shapes.named("products/none")


def test_when_shows_each_layer_and_how_to_make_it() -> None:
    assert "make gpu" in when.section([])
    (m, n, k), *_ = shapes.named(when.SET)
    row = {"goal": "when-e4m3", "passed": True, "slug": "nvidia-h200", "shape": text((m, n, k)), "figure": 1.25}
    drawn = when.section([row, row | {"shape": "1x2x3"}])
    assert f"| {n} x {k} | **1.25** |" in drawn
    assert "(nvidia-h200)" in drawn


def test_both_sides_take_turns() -> None:
    order: list[str] = []
    ours, baseline, _ = measure.take_turns(lambda: order.append("ours"), lambda: order.append("baseline"), seconds=0.01)
    assert len(ours) == len(baseline) >= measure.MIN_ROUNDS
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes >= 2 * len(ours) - 1


def test_readme_and_results_show_the_newest_rows() -> None:
    rows = ledger.rows()
    text = readme.README.read_text(encoding="utf-8")
    assert text == readme.with_table(text, readme.readme_table(rows)), "run: python -m bench.readme"
    assert readme.RESULTS.read_text(encoding="utf-8") == readme.results_page(rows), "run: python -m bench.readme"
