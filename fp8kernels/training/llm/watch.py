"""The two detectors beside the loss: tensors that outgrow their scales, and knowledge that goes."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from ...nn.step import layers
from ...runs import Run
from .config import Config
from .ending import Ending


class Watch(TrainerCallback):
    """Asks the detectors at their steps, writes what they saw, and ends the run where their policy says so."""

    def __init__(self, run: Run | None, config: Config, model: nn.Module, tokenizer: Any, ending: Ending) -> None:
        self.run, self.ending = run, ending
        self.accuracy: float | None = None
        self.saturation: Any = None
        if config.saturation.every and layers(model):
            from ...telemetry.saturation import SaturationWatch

            settings = config.saturation
            try:
                self.saturation = SaturationWatch(
                    model, every=settings.every, policy=settings.policy, raising=False, **settings.options
                )
            except TypeError as error:
                raise ValueError(f"saturation.options: {error}") from None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
        """What the step's commit has measured."""
        if self.saturation is None or logs is None or "loss" not in logs:
            return
        for measured in self.saturation.take():
            if self.run is not None:
                self.run.append("layers", *measured.rows())
            for text in measured.findings:
                self.event(state.global_step, "saturation", text)
            if measured.stop is not None:
                self.ending.stop(f"saturation at step {state.global_step}: {measured.stop}")

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from, as JSON holds it."""
        return {} if self.saturation is None else {"saturation": self.saturation.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        if self.saturation is not None and "saturation" in state:
            self.saturation.load_state_dict(state["saturation"])

    def event(self, step: int, kind: str, text: str) -> None:
        """Note what happened."""
        if self.run is not None:
            self.run.append("events", {"step": step, "kind": kind, "text": text})

    def close(self) -> None:
        """Take the detectors off the model."""
        if self.saturation is not None:
            self.saturation.remove()
