"""How a run ends before its last step: a detector's word, or a signal."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from .ranks import any_rank

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Ending(TrainerCallback):
    """Ends training at the end of a step, on all processes at the same one.

    reason       why the run was stopped by a detector; None if it was not
    good_until   the step up to which a detector had nothing to say; None: up to the one before its word
    interrupted  whether a signal asked for the end; the step is then saved first
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.good_until: int | None = None
        self.interrupted = False
        self.asked = False

    def stop(self, reason: str, *, good_until: int | None) -> None:
        """End at this step, without another checkpoint."""
        if self.reason is None:
            self.reason, self.good_until = reason, good_until

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        """A signal is acted on between two steps, when everything can be saved."""
        if any_rank(self.asked, args.device):
            self.interrupted = control.should_save = control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> Any:
        """What the detectors, which come before this callback, have said of the step."""
        if logs is not None and "loss" in logs and any_rank(self.reason is not None, args.device):
            self.reason = self.reason or "a detector on another process"
            control.should_save, control.should_training_stop = False, True
        return control

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Take the first Ctrl-C or SIGTERM as the wish to save and end; a second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handler(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = {number: signal.signal(number, handler) for number in SIGNALS}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)
