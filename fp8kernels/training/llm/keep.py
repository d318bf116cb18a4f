"""Makes whole checkpoints of what the trainer saves, and keeps the newest ones and the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ...runs import Run
from ...runs.precision import EIGHT_BIT, save_eight_bit
from . import checkpoints
from .nonfinite import NonFiniteError, nonfinite_parameters
from .ranks import rank, wait
from .record import Recorder
from .watch import Saturation


class Keeper(TrainerCallback):
    """Behind each save of the trainer: check, seal, rotate.

    folder    of the checkpoints
    keep      newest ones that stay; the one with the lowest validation loss stays besides
    adapters  whether the trainer saves adapters alone, so that the scaling state must be saved beside them
    """

    def __init__(
        self, run: Run | None, folder: Path, recorder: Recorder, saturation: Saturation, *, keep: int, adapters: bool
    ) -> None:
        self.run, self.folder, self.recorder, self.saturation = run, folder, recorder, saturation
        self.keep, self.adapters = keep, adapters
        self.last: Path | None = None

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **rest: Any) -> None:
        """The trainer has written everything into the staging folder."""
        assert model is not None
        step = state.global_step
        bad = nonfinite_parameters(model)
        if bad:
            raise NonFiniteError(step, "a weight", f"the first one is {bad[0]}; nothing was saved at this step")
        wait()
        if rank() == 0 and self.run is not None:
            staged = checkpoints.staging(self.folder) / f"{checkpoints.NAME}{step}"
            try:
                if self.adapters:
                    save_eight_bit(model.state_dict(), staged / EIGHT_BIT)
                checkpoints.write_state(staged, {"saturation": self.saturation.state()})
                self.recorder.flush()
                self.last = checkpoints.seal(self.folder, step)
            except Exception as error:
                raise checkpoints.CheckpointError(f"checkpoint {step} could not be written: {error}") from error
            self.run.append("events", {"step": step, "kind": "saved", "text": f"checkpoints/{self.last.name}"})
            checkpoints.rotate(self.folder, keep=self.keep, best=best_step(self.run, self.folder))
        wait()


def best_step(run: Run, folder: Path) -> int | None:
    """The step of the whole checkpoint with the lowest validation loss; None if none has one."""
    there = {checkpoints.step_of(path) for path in checkpoints.whole(folder)}
    losses = {
        row["step"]: row["validation_loss"]
        for row in run.rows("log")
        if row.get("validation_loss") is not None and row["step"] in there
    }
    return min(losses, key=lambda step: losses[step]) if losses else None
