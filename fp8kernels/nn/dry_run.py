"""Pipeline stages run their module once on memory that holds anything, to learn shapes; no trace of that may stay.

torch.distributed.pipelining does so before the first step, forward and backward, in training mode, unless a stage was
given the shapes of its inputs and outputs. What layers noted in between is taken back when it is over.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

STAGES = "torch.distributed.pipelining.stage"
BEGINS, ENDS = "_forward_metadata_inference", "_post_metadata_inference_cleanup"  # methods of a stage

_before: weakref.WeakKeyDictionary[Any, list[tuple[Tensor, Tensor]]] = weakref.WeakKeyDictionary()
_watched = False


def watch_stages(noted: tuple[str, ...]) -> None:
    """From now on, what forwards and backwards note (buffers of these names) is as before once a dry run is over.

    Does nothing where nobody has imported pipeline stages, or a torch has other ones; asked again, it costs nothing.
    """
    global _watched
    stage = None if _watched else getattr(sys.modules.get(STAGES), "PipelineStage", None)
    if stage is None:
        return
    _watched = True
    if not (hasattr(stage, BEGINS) and hasattr(stage, ENDS)):
        return
    _wrap(stage, BEGINS, functools.partial(_remember, noted), None)
    _wrap(stage, ENDS, None, _restore)
    running = _running()
    if running is not None:
        _remember(noted, running)


def _wrap(cls: Any, name: str, first: Callable[[Any], None] | None, last: Callable[[Any], None] | None) -> None:
    method = getattr(cls, name)

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if first is not None:
            first(self)
        out = method(self, *args, **kwargs)
        if last is not None:
            last(self)
        return out

    setattr(cls, name, run)


def _remember(noted: tuple[str, ...], stage: Any) -> None:
    buffers = [b for name, b in stage.submod.named_buffers() if name.rpartition(".")[2] in noted]
    _before[stage] = [(b, b.clone()) for b in buffers]


@torch.no_grad()
def _restore(stage: Any) -> None:
    for buffer, value in _before.pop(stage, ()):
        buffer.copy_(value)


def _running() -> Any:
    """The stage whose dry run we are in, where it began before we watched."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code.co_name != BEGINS:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("self")
