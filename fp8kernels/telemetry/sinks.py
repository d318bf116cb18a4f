"""log_to: the numbers of the 8-bit layers go where the other curves of a training run are."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from ..nn.state import ScaledLayer
from ..nn.step import after_commit, layers
from .meter import PREFIX, Meter, steps_of

Send = Callable[[dict[str, float], dict[str, float], int], None]  # numbers by tensor, totals, step


def log_to(model: nn.Module, sink: Any, *, every: int = 50) -> LogHandle:
    """Send numbers of the model's 8-bit layers to a sink, after every so many commits (optimizer steps).

    sink     a logging.Logger (totals at INFO, numbers by tensor at DEBUG), a TensorBoard SummaryWriter, a run of
             Weights & Biases (with the next row that is logged there, and the step as "fp8/step"), or a function of
             (dict of floats, step)
    every    a commit whose numbers are read waits for a GPU, so not each
    returns  a handle; `.remove()` ends it
    raises   ValueError if the model has no 8-bit layers or every < 1; TypeError for another sink

    The names are "fp8/<layer>/<role>/" with scale, amax, overshoot, saturated and flushed, and "fp8/total/" with
    saturated, flushed, nonfinite, worst and high_precision; see Meter.read. With several ranks each has its own counts:
    log on one.
    """
    if every < 1:
        raise ValueError(f"log_to: every={every} must be at least 1")
    return LogHandle(model, sender(sink), every)


def sender(sink: Any) -> Send:
    """How numbers get into a sink."""
    if isinstance(sink, logging.Logger):
        return lambda tensors, totals, step: _to_logger(sink, tensors, totals, step)
    if hasattr(sink, "add_scalar"):
        return lambda tensors, totals, step: _to_writer(sink, tensors | totals, step)
    if callable(getattr(sink, "log", None)):
        # without commit=False a row of its own would begin, and a step below that of the run's last row be dropped
        return lambda tensors, totals, step: sink.log({**tensors, **totals, f"{PREFIX}/step": step}, commit=False)
    if callable(sink):
        return lambda tensors, totals, step: sink(tensors | totals, step)
    raise TypeError(
        f"log_to: {type(sink).__name__} is no sink; give a logging.Logger, a TensorBoard SummaryWriter, a W&B run, or "
        f"a function of (dict, step)"
    )


def _to_logger(logger: logging.Logger, tensors: dict[str, float], totals: dict[str, float], step: int) -> None:
    logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in totals.items()))
    if logger.isEnabledFor(logging.DEBUG):
        for name, value in tensors.items():
            logger.debug("step %d: %s %.4g", step, name, value)


def _to_writer(writer: Any, scalars: dict[str, float], step: int) -> None:
    for name, value in scalars.items():
        writer.add_scalar(name, value, step)


class LogHandle:
    """What `log_to` returns; `remove()` ends it. It ends by itself with the model."""

    def __init__(self, model: nn.Module, send: Send, every: int) -> None:
        self._model, self._send, self._every = weakref.ref(model), send, every
        self._meter = Meter(model)
        self._mine = weakref.WeakSet(layers(model))
        self._commits = 0
        after_commit.append(self._after_commit)
        weakref.finalize(model, self.remove).atexit = False

    def remove(self) -> None:
        """Send nothing any more."""
        if self._after_commit in after_commit:
            after_commit.remove(self._after_commit)

    def _after_commit(self, found: list[ScaledLayer]) -> None:
        model = self._model()
        if model is None or not self._has(model, found[0]):
            return
        self._commits += 1
        if self._commits % self._every == 0:
            self._send(*self._meter.read(model), steps_of(model))

    def _has(self, model: nn.Module, layer: ScaledLayer) -> bool:
        """Whether a layer is the model's; its layers may be others than at first."""
        if layer not in self._mine:
            self._mine = weakref.WeakSet(layers(model))
        return layer in self._mine
