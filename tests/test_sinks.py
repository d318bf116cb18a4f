"""log_to: the numbers of the 8-bit layers in a logger, in TensorBoard, in W&B and in a function."""

from __future__ import annotations

import gc
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fp8kernels
from fp8kernels import Alarm, convert, get_recipe, log_to
from fp8kernels.nn import step as steps
from fp8kernels.telemetry import Meter, report

WHAT = ("scale", "amax", "overshoot", "saturated", "flushed")
TOTALS = {f"fp8/total/{what}" for what in ("saturated", "flushed", "nonfinite", "worst", "high_precision")}
TENSORS = {f"fp8/{layer}/{role}/{what}" for layer in "02" for role in ("input", "weight") for what in WHAT}


class Run:
    """A small converted model and its steps."""

    def __init__(self) -> None:
        recipe = get_recipe("e4m3-delayed").replace(alarm=Alarm("ignore"))
        torch.manual_seed(0)
        self.model = convert(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)), recipe, verbose=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def step(self, size: float = 1.0) -> None:
        self.model(size * torch.randn(64, 32)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.fixture
def run() -> Run:
    return Run()


def listed() -> list[Any]:
    return [
        listener for listener in steps.after_commit if type(getattr(listener, "__self__", None)).__name__ == "LogHandle"
    ]


def test_a_function_gets_every_nth_step_until_it_is_removed(run: Run) -> None:
    got: list[tuple[dict[str, float], int]] = []
    handle = log_to(run.model, lambda numbers, step: got.append((numbers, step)), every=3)
    for _ in range(7):
        run.step()
    assert [step for _, step in got] == [3, 6]
    assert set(got[0][0]) == TENSORS | TOTALS
    assert all(isinstance(value, float) and math.isfinite(value) for value in got[1][0].values())
    handle.remove()
    handle.remove()
    for _ in range(3):
        run.step()
    assert len(got) == 2


def test_scales_and_amax_are_those_of_the_report_and_fractions_those_of_the_steps_since(run: Run) -> None:
    got: list[dict[str, float]] = []
    run.step()
    with_log = log_to(run.model, lambda numbers, _: got.append(numbers), every=2)
    before = {(row.layer, row.role): row for row in report(run.model)}
    counted = run.model[0].fp8_counters.clone()
    run.step(100.0)
    run.step(1000.0)
    with_log.remove()
    for row in report(run.model):
        for what in ("scale", "amax", "overshoot"):
            assert got[0][f"fp8/{row.layer}/{row.role}/{what}"] == getattr(row, what)
    elements, saturated, flushed, _ = (run.model[0].fp8_counters - counted)[0].tolist()
    assert saturated > 0
    assert got[0]["fp8/0/input/saturated"] == saturated / elements
    assert got[0]["fp8/0/input/flushed"] == flushed / elements
    assert got[0]["fp8/0/input/saturated"] > before["0", "input"].saturated
    assert got[0]["fp8/total/worst"] == max(got[0][name] for name in TENSORS if name.endswith("saturated"))


def test_totals_weigh_tensors_by_their_elements(run: Run) -> None:
    meter = Meter(run.model)
    before = torch.stack([layer.fp8_counters.clone() for layer in steps.layers(run.model)])
    run.step()
    run.step(1000.0)
    _, totals = meter.read(run.model)
    counts = (torch.stack([layer.fp8_counters for layer in steps.layers(run.model)]) - before).sum((0, 1)).tolist()
    assert totals["fp8/total/saturated"] == counts[1] / counts[0] > 0
    assert totals["fp8/total/flushed"] == counts[2] / counts[0]
    assert totals["fp8/total/nonfinite"] == 0
    run.model(torch.full((1, 32), torch.inf))
    run.model[0].fp8_high = True
    _, totals = meter.read(run.model)
    assert totals["fp8/total/nonfinite"] >= 32
    assert totals["fp8/total/high_precision"] == 1
    tensors, totals = meter.read(run.model)
    assert (tensors, totals["fp8/total/saturated"]) == ({}, 0.0), "nothing was seen since"


def test_steps_go_on_where_a_checkpoint_was(run: Run) -> None:
    for _ in range(5):
        run.step()
    resumed, seen = Run(), []
    resumed.model.load_state_dict(run.model.state_dict())
    log_to(resumed.model, lambda numbers, step: seen.append(step), every=1)
    resumed.step()
    assert seen == [6]


def test_only_the_commits_of_this_model_count(run: Run) -> None:
    seen: list[int] = []
    log_to(run.model, lambda numbers, step: seen.append(step), every=1)
    other = Run()
    other.step()
    assert seen == []
    run.step()
    assert seen == [1]


def test_it_ends_with_the_model() -> None:
    run = Run()
    before = len(listed())
    log_to(run.model, lambda numbers, step: None)
    assert len(listed()) == before + 1
    del run
    gc.collect()
    assert len(listed()) == before


def test_logger(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("mine")
    log_to(run.model, logger, every=2)
    with caplog.at_level(logging.INFO, logger="mine"):
        run.step()
        run.step()
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert message.startswith("step 2: ") and all(name in message for name in TOTALS)
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="mine"):
        run.step()
        run.step()
    assert len(caplog.records) == 1 + len(TENSORS)
    amax = run.model[0].fp8_history[0, 0]
    assert f"step 4: fp8/0/input/amax {amax:.4g}" in caplog.messages


def test_tensorboard(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    amax = []
    with SummaryWriter(tmp_path) as writer:
        log_to(run.model, writer, every=2)
        for _ in range(4):
            run.step()
            amax.append(float(run.model[0].fp8_history[0, 0]))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == TENSORS | TOTALS
    assert [(event.step, event.value) for event in events.Scalars("fp8/0/input/amax")] == [(2, amax[1]), (4, amax[3])]


class WandbRun:
    """Rows as W&B makes them: what is logged with commit=False joins the next row; a step cannot go back."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._open: dict[str, Any] = {}

    def log(self, data: dict[str, Any], step: int | None = None, *, commit: bool | None = None) -> None:
        assert step is None or step >= len(self.rows), "W&B drops rows of earlier steps"
        self._open |= data
        if commit or commit is None:
            self.rows.append(self._open)
            self._open = {}


def test_weights_and_biases(run: Run) -> None:
    wandb = WandbRun()
    log_to(run.model, wandb, every=2)
    for n in range(4):
        run.step()
        wandb.log({"loss": n})
    assert [row["loss"] for row in wandb.rows] == [0, 1, 2, 3]
    assert [set(row) - {"loss"} for row in wandb.rows] == [set(), TENSORS | TOTALS | {"fp8/step"}] * 2
    assert wandb.rows[3]["fp8/step"] == 4


def test_bad_arguments(run: Run) -> None:
    with pytest.raises(TypeError, match="int is no sink; give a"):
        log_to(run.model, 3)
    with pytest.raises(ValueError, match="every=0"):
        log_to(run.model, print, every=0)
    with pytest.raises(ValueError, match="no 8-bit layers"):
        log_to(nn.Linear(2, 2), print)
    assert fp8kernels.log_to is log_to
