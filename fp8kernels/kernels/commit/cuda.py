"""commit on an NVIDIA GPU: every layer of a model in one launch of csrc/commit/commit.cu.

method  the addresses of all layers are the kernel's parameter (800 layers a launch), so nothing is copied to the GPU
        and a CUDA graph can hold the step
limits  sm_80 and newer; CUDA tensors of one GPU, contiguous; the named algorithms (a user's own function runs in the
        reference)
equal   to the reference to the bit, with the same order of the sum
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import cuda
from ..compiled import load
from . import ScaleRule, State
from .cpu import ALGORITHMS

_cuda, _ = load("_cuda")


def why_not(states: Sequence[State], rule: ScaleRule) -> str | None:
    """Why these arguments cannot run here, or None."""
    if not states:
        return "there is no state to commit, and no GPU named by one"
    return cuda.why_not(states[0]._asdict()) or unfit(states, rule)


def unfit(states: Sequence[State], rule: ScaleRule) -> str | None:
    """What of the arguments, wherever they are, the kernel does not take; or None."""
    if rule.algorithm not in ALGORITHMS:
        return f"the algorithm is {rule.algorithm!r}: this kernel knows {', '.join(map(repr, ALGORITHMS))}"
    device = states[0].history.device
    for state in states:  # 500 layers are 2,000 tensors: every attribute here is 0.1 ms
        for x in state:
            if x.dtype is not torch.float32 or x.device != device or not x.is_contiguous():
                name = State._fields[next(i for i, y in enumerate(state) if y is x)]
                return f"{name} is {x.dtype} on {x.device}: this kernel takes contiguous fp32 tensors on one GPU"
    return None


def commit(states: Sequence[State], rule: ScaleRule) -> None:
    """Roll every history that has something pending, make its scale, and clear what was pending; all in place.

    raises   RuntimeError if the kernel did not start
    """
    device = states[0].history.device
    # Layers run at the same time here: a state that is given twice is committed once, which is the same.
    numbers: dict[int, tuple[int, ...]] = {}
    for history, pending, scale, target in states:
        address = pending.data_ptr()
        numbers[address] = (history.data_ptr(), address, scale.data_ptr(), target.data_ptr(), *history.shape)
    flat = [number for state in numbers.values() for number in state]
    with cuda.on(device):
        algorithm = ALGORITHMS[str(rule.algorithm)]
        error = _cuda.commit(flat, algorithm, 2.0**rule.margin, rule.power_of_two, rule.decay, cuda.stream(device))
    cuda.check(error, "commit")
