"""The two detectors beside the loss: tensors that outgrow their scales, and knowledge that goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ...integrations.probe import ProbeCallback
from ...nn.step import layers
from ...probe.forgetting import ForgettingError
from ...probe.items import Item
from ...runs import Run
from ...telemetry.saturation import SaturationWatch
from .config import ProbeSettings, SaturationSettings
from .ending import Ending


def saturation_watch(model: nn.Module, settings: SaturationSettings) -> SaturationWatch | None:
    """The detector of a configuration; None for a model without 8-bit layers, or where it never looks.

    raises   ValueError for options that SaturationWatch does not take
    """
    if not settings.every or not layers(model):
        return None
    try:
        return SaturationWatch(model, every=settings.every, policy=settings.policy, raising=False, **settings.options)
    except TypeError as error:
        raise ValueError(f"saturation.options: {error}") from None


def fallen(model: nn.Module) -> set[str]:
    """The names of the layers that have fallen back to high precision."""
    return {layer.fp8_name for layer in layers(model) if layer.fp8_high}


class Saturation(TrainerCallback):
    """Writes what a SaturationWatch has measured, and ends the run where it says so."""

    def __init__(self, run: Run | None, detector: SaturationWatch | None, ending: Ending) -> None:
        self.run, self.detector, self.ending = run, detector, ending
        self.state_before: dict[str, Any] | None = None
        self.high: set[str] = set()  # layers that have fallen back

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """A checkpoint is in the model by now."""
        self.high = fallen(model)
        if self.detector is None:
            return
        if self.state_before is None:
            self.detector.begin_step()
        else:
            self.detector.load_state_dict(self.state_before)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, model: Any = None, **rest: Any
    ) -> None:
        """What the step's commit has measured, and which layers have changed their precision."""
        if logs is None or "loss" not in logs:
            return
        step = state.global_step
        self._tell_fallen(step, fallen(model))
        if self.detector is None:
            return
        for measured in self.detector.take():
            if self.run is not None:
                self.run.append("layers", *measured.rows())
                rows = [{"step": step, "kind": "saturation", "text": text} for text in measured.findings]
                self.run.append("events", *rows)
            if measured.stop is not None:
                self.ending.stop(f"saturation: {measured.stop}", good_until=None)

    def _tell_fallen(self, step: int, now: set[str]) -> None:
        before, self.high = self.high, now
        changes = ((now - before, "high precision from now on"), (before - now, "8 bits again"))
        for names, what in changes:
            if names and self.run is not None:
                text = f"{len(names)} layers compute in {what}: {', '.join(sorted(names))}"
                self.run.append("events", {"step": step, "kind": "fallback", "text": text})

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from, as JSON holds it."""
        return {} if self.detector is None else self.detector.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, once the model has its checkpoint."""
        self.state_before = state or None

    def close(self) -> None:
        """Take the detector off the model."""
        if self.detector is not None:
            self.detector.remove()


class Probe(ProbeCallback):
    """The knowledge probe, but the policy "stop" ends the step whole: with its row, on all processes."""

    def __init__(
        self, run: Run, settings: ProbeSettings, items: Sequence[Item], tokenizer: Any, ending: Ending
    ) -> None:
        super().__init__(
            items,
            tokenizer,
            every=settings.every,
            policy=settings.policy,
            drop=settings.drop,
            level=settings.level,
            batch=settings.batch,
            run=run,
        )
        self.ending = ending
        self.good = 0  # the step of the newest look without an alarm

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """The starting scores."""
        super().on_train_begin(args, state, control, model=model, **rest)
        self.good = self.asked

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """A look, every N steps and at the last one."""
        try:
            super().on_step_end(args, state, control, **rest)
        except ForgettingError as error:
            self.ending.stop(f"forgetting: {error}", good_until=self.good)
        else:
            self.good = self.asked

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
        """The row of a step has what was seen in that step, so that a resumed run writes the same rows."""
        if self.asked == state.global_step:
            super().on_log(args, state, control, logs=logs, **rest)
