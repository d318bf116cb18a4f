"""commit on a CPU core: every layer of a model in one call of csrc/commit.

limits  CPU tensors, contiguous; the named algorithms (a user's own function runs in the reference)
equal   to the reference to the bit, with the same order of the sum
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..compiled import load
from . import ScaleRule, State

_cpu, MISSING = load("_cpu")

# Algorithm of csrc/commit/commit.h
ALGORITHMS = {"max": 0, "moving_average": 1, "most_recent": 2, "exponential_moving_average": 3}


def why_not(states: Sequence[State], rule: ScaleRule) -> str | None:
    """Why these arguments cannot run here, or None."""
    if _cpu is None:
        return MISSING
    if rule.algorithm not in ALGORITHMS:
        return f"the algorithm is {rule.algorithm!r}: this kernel knows {', '.join(map(repr, ALGORITHMS))}"
    for state in states:  # 500 layers are 2,000 tensors: every attribute here is 0.1 ms
        for x in state:
            if x.dtype is not torch.float32 or not x.is_cpu or not x.is_contiguous():
                name = State._fields[next(i for i, y in enumerate(state) if y is x)]
                return f"{name} is {x.dtype} on {x.device}: this kernel takes contiguous fp32 CPU tensors"
    return None


def commit(states: Sequence[State], rule: ScaleRule) -> None:
    """Roll every history that has something pending, make its scale, and clear what was pending; all in place."""
    prepare(states, rule)()


def prepare(states: Sequence[State], rule: ScaleRule, steps: Sequence[Tensor] | None = None) -> Callable[[], None]:
    """The same as a call that can be made again and again, as long as nobody gives the tensors other storage.

    steps  int64 [] of each layer, or None: one more where one of the layer's tensors was seen
    """
    table = array("q")  # of the standard library: making a tensor of Python numbers is an operation on a device
    for index, state in enumerate(states):
        table.extend(x.data_ptr() for x in state)
        table.extend((*state.history.shape, 0 if steps is None else steps[index].data_ptr()))
    kept = [*states], steps  # their addresses are good while they live
    arguments = ALGORITHMS[str(rule.algorithm)], 2.0**rule.margin, rule.power_of_two, rule.decay

    def run() -> None:
        _cpu.commit(table.buffer_info()[0], len(kept[0]), *arguments)

    return run
