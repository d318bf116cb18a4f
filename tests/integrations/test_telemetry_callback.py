"""The numbers of the 8-bit layers in the logs of transformers.Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from integrations.common import ACCUMULATED, STEPS, arguments, rows
from setups.runs import converted
from torch import nn

from fp8kernels.nn.step import layers

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
TOTALS = {f"fp8/total/{what}" for what in ("saturated", "flushed", "nonfinite", "worst", "high_precision")}


def trainer(net: nn.Module, folder: Path, callbacks: list[Any], **changes: Any) -> Any:
    return transformers.Trainer(
        model=net,
        args=arguments(folder, **changes),
        train_dataset=rows("llama", STEPS * ACCUMULATED),
        callbacks=callbacks,
    )


def test_each_row_of_the_log_has_totals(tmp_path: Path) -> None:
    from fp8kernels.integrations.transformers import TelemetryCallback

    net = converted("llama")
    run = trainer(net, tmp_path, [TelemetryCallback(tensors=True)], logging_steps=2)
    run.train()
    found = [row for row in run.state.log_history if "loss" in row]
    assert len(found) == STEPS // 2
    assert all(set(row) >= TOTALS for row in found)
    name = next(name for name, module in net.named_modules() if module is layers(net)[0])
    assert found[-1][f"fp8/{name}/input/amax"] == layers(net)[0].fp8_history[0, 0]
    assert not TOTALS & set(run.state.log_history[-1]), "the row at the end is about no steps"


def test_tensorboard_gets_them_from_a_callback_in_front(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from fp8kernels.integrations.transformers import TelemetryCallback

    run = trainer(converted("llama"), tmp_path, [], report_to=["tensorboard"])
    TelemetryCallback.add_to(run)
    run.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent)).Reload()
    assert {f"train/{name}" for name in TOTALS} <= set(events.Tags()["scalars"])
    got = [event.value for event in events.Scalars("train/fp8/total/flushed")]
    assert got == pytest.approx([row["fp8/total/flushed"] for row in run.state.log_history if "loss" in row])
    assert len(got) == STEPS


def test_a_model_without_8_bit_layers_is_told(tmp_path: Path) -> None:
    from setups.models import build

    from fp8kernels.integrations.transformers import TelemetryCallback

    with pytest.raises(ValueError, match="no 8-bit layers"):
        trainer(build("llama"), tmp_path, [TelemetryCallback()]).train()
