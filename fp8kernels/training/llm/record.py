"""The rows of a run: one each optimizer step, whole before the step's checkpoint is."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback

from ...runs import Run
from .ranks import world

LOGGED = ("learning_rate", "grad_norm")


class Recorder(TrainerCallback):
    """Makes the row of each step of what the trainer and the callbacks before this one log, and adds to their logs.

    run       where rows go; None on all processes but the first
    baseline  loss by step of the BF16 run that this one is compared with
    tokens    a function that gives the tokens of this process's step
    """

    def __init__(self, run: Run | None, baseline: dict[int, float] | None, tokens: Any) -> None:
        self.run, self.baseline, self.tokens = run, baseline or {}, tokens
        self.pending: dict[str, Any] | None = None
        self.last: dict[str, Any] = {}  # the newest row, for the progress line
        self.started = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """The clock of a step; the row of the one before is whole now."""
        self.flush()
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
        """The row of a training step; other logs are left alone."""
        if logs is None or "loss" not in logs:
            return
        seconds = time.perf_counter() - self.started
        tokens = self.tokens() * world()
        row = {"step": state.global_step, "loss": logs["loss"]}
        row |= {key: logs[key] for key in LOGGED if key in logs}
        row |= {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
        base = self.baseline.get(state.global_step)
        if base:
            row["ape"] = 100 * abs(logs["loss"] - base) / abs(base)
        row |= {key: value for key, value in logs.items() if key.startswith(("fp8/total/", "probe/"))}
        logs |= {key: row[key] for key in ("tokens_per_second", "ape") if key in row}
        self.pending = self.last = row

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **_: Any) -> None:
        """The validation loss belongs to the step's row."""
        loss = (metrics or {}).get("eval_loss")
        if self.pending is not None and loss is not None and math.isfinite(loss):
            self.pending["validation_loss"] = loss

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """The last row."""
        self.flush()

    def flush(self) -> None:
        """Write the row that waits for its validation loss."""
        if self.pending is not None and self.run is not None:
            self.run.append("log", self.pending)
        self.pending = None
