"""Hugging Face's Trainer: the numbers of the 8-bit layers in its logs."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..telemetry import Meter


class TelemetryCallback(TrainerCallback):
    """Adds "fp8/total/saturated" and its relatives (see telemetry.Meter) to each row of training logs.

    As one of `Trainer(callbacks=[…])` it comes after the callbacks for TensorBoard and W&B, which then do not see its
    numbers; the trainer's `state.log_history` has them either way. `TelemetryCallback.add_to(trainer)` puts it first.

    model    whose layers are read; None takes the trainer's
    tensors  also the numbers of each tensor
    raises   ValueError, when training begins, if the model has no 8-bit layers
    """

    def __init__(self, model: nn.Module | None = None, *, tensors: bool = False) -> None:
        self.model, self.tensors = model, tensors
        self.meter: Meter | None = None

    @classmethod
    def add_to(cls, trainer: Any, *, tensors: bool = False) -> TelemetryCallback:
        """Put one in front of the other callbacks of a trainer."""
        callback = cls(tensors=tensors)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **rest: Any) -> None:
        """Count from here."""
        self.model = self.model or model
        assert self.model is not None
        self.meter = Meter(self.model)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
        """Rows with a training loss get the numbers of the steps that they are about."""
        if self.meter is None or self.model is None or logs is None or "loss" not in logs:
            return
        tensors, totals = self.meter.read(self.model)
        added = totals | tensors if self.tensors else totals
        logs.update(added)
        if state.log_history:
            state.log_history[-1].update(added)
