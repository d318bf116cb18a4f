"""One line about a running training: it moves on a terminal, and is written now and then into a log or a pipe."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from ...console import console
from .ranks import rank
from .record import Recorder

LOG = logging.getLogger("fp8kernels")
WRITTEN = 20  # lines of a run where nobody looks at a terminal


def tell(text: str) -> None:
    """A line for whoever looks at a terminal, and for the log."""
    LOG.info(text)
    shown = console()
    if rank() == 0 and shown.is_terminal:
        shown.print(text, highlight=False)


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """transformers shows a bar for each file that it writes, also where nobody looks."""
    from transformers.utils import logging as shown

    bars = shown.is_progress_bar_enabled()
    shown.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            shown.enable_progress_bar()


class ProgressLine(TrainerCallback):
    """Step, loss, tokens a second, the share of elements that saturated, APE, and the probe's accuracy."""

    def __init__(self, recorder: Recorder, *, every: int) -> None:
        self.recorder, self.every = recorder, every
        self.accuracy: float | None = None
        self.progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """A bar where somebody looks."""
        shown = console()
        if rank() or not shown.is_terminal:
            return
        columns = (TextColumn("{task.completed:>6}/{task.total}"), BarColumn(20), TextColumn("{task.description}"))
        self.progress = Progress(*columns, TimeRemainingColumn(), console=shown)
        self.progress.add_task("", total=args.max_steps, completed=state.global_step)
        self.progress.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
        """The row of this step stands; the probe's accuracy stays on the line until it is asked again."""
        if logs is None or "loss" not in logs:
            return
        self.accuracy = logs.get("probe/accuracy", self.accuracy)
        step, steps = state.global_step, state.max_steps
        text = line(self.recorder.last, self.accuracy)
        if self.progress is not None and step % self.every == 0:
            self.progress.update(self.progress.task_ids[0], completed=step, description=text)
        elif self.progress is None and not rank() and step * WRITTEN // steps > (step - 1) * WRITTEN // steps:
            console().print(f"{step:>6}/{steps}  {text}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """The line stays as it is."""
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def line(row: dict[str, Any], accuracy: float | None) -> str:
    """A row of the log in one line."""
    parts = []
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if "fp8/total/saturated" in row:
        parts.append(f"saturated {row['fp8/total/saturated']:.2%}")
    if "ape" in row:
        parts.append(f"APE {row['ape']:.2f} %")
    if accuracy is not None:
        parts.append(f"probe {accuracy:.1%}")
    return "  ".join(parts)
