"""Reading the counters of many layers at once, without making a GPU wait.

What lies on a CPU is read at once. From a GPU the counters are copied to pinned memory on its stream, and looked at
when a later commit finds them there: nothing waits, and a reading covers the one or few steps since the last one. While
a CUDA graph is captured nothing is read, and a replay runs no Python: there the alarm and the choice of route rest.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..nn.state import ScaledLayer


class Reading(NamedTuple):
    """What layers had counted, and their scales, on the CPU: counters int64 [L, 3, 4], scale fp32 [L, 3]."""

    layers: list[ScaledLayer]
    counters: Tensor
    scale: Tensor


@dataclass
class Transfer:
    """A reading on its way from a GPU: tensors in pinned memory, and the event after which they are filled."""

    layers: list[weakref.ref[ScaledLayer]]
    counters: Tensor  # int64 [L, 3, 4]
    scale: Tensor  # fp32 [L, 3]
    event: torch.cuda.Event

    @staticmethod
    def start(members: list[ScaledLayer]) -> Transfer:
        """Begin to copy; all members are on one GPU."""
        with torch.cuda.device(members[0].fp8_counters.device):
            stacked = stack(members)
            host = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in stacked]
            for to, x in zip(host, stacked, strict=True):
                to.copy_(x, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return Transfer([weakref.ref(layer) for layer in members], host[0], host[1], event)

    def arrived(self) -> bool:
        """Whether the numbers are there; asks, and does not wait."""
        return self.event.query()

    def reading(self) -> Reading | None:
        """What arrived; None if one of the layers is gone."""
        layers = [layer for layer in (ref() for ref in self.layers) if layer is not None]
        if len(layers) < len(self.layers):
            return None
        return Reading(layers, self.counters, self.scale)


_on_the_way: weakref.WeakKeyDictionary[ScaledLayer, Transfer] = weakref.WeakKeyDictionary()  # by the first layer


def readings(found: list[ScaledLayer]) -> list[Reading]:
    """What can be read of these layers now, one Reading for each device that has something."""
    out = []
    groups: dict[torch.device, list[ScaledLayer]] = {}
    for layer in found:
        groups.setdefault(layer.fp8_counters.device, []).append(layer)
    for device, members in groups.items():
        if device.type == "cpu":
            out.append(Reading(members, *stack(members)))
        elif device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            reading = arrival(members)
            out += [] if reading is None else [reading]
    return out


def arrival(members: list[ScaledLayer]) -> Reading | None:
    """The reading that was begun at an earlier commit, if it is there, and then the next one begins."""
    before = _on_the_way.get(members[0])
    if before is not None and not before.arrived():
        return None
    _on_the_way[members[0]] = Transfer.start(members)
    return None if before is None else before.reading()


def stack(members: list[ScaledLayer]) -> tuple[Tensor, Tensor]:
    """counters int64 [L, 3, 4] and scales fp32 [L, 3]."""
    return torch.stack([layer.fp8_counters for layer in members]), torch.stack([layer.fp8_scale for layer in members])
