"""The verb commit: pending amax enters the histories, the histories become scales. One call for a whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.commit import ScaleRule, State, cpu
from ..scaling.rules import get_algorithm
from .library import register
from .table import choose


def commit_states(states: Sequence[State], rule: ScaleRule) -> None:
    """Commit the state of many layers, in place.

    states   one per layer; see State for shapes and dtypes
    rule     the algorithm (a name of scaling/rules.py, or a function [T, window] -> [T]), margin, rounding, decay
    raises   ValueError for an unknown algorithm
    """
    get_algorithm(rule.algorithm)
    if callable(rule.algorithm):
        choose("commit", states, rule).run(states, rule)
        return
    history, pending, scale, target = (list(tensors) for tensors in zip(*states, strict=True)) if states else ([],) * 4
    torch.ops.fp8kernels.commit(
        history, pending, scale, target, rule.algorithm, rule.margin, rule.power_of_two, rule.decay
    )


def prepare(states: Sequence[State], rule: ScaleRule, steps: Sequence[Tensor]) -> Callable[[], None]:
    """`commit_states` as a call that can be made again and again, with all checks done here.

    steps    int64 [] of each layer, raised by one where one of its tensors was seen
    returns  the call; good as long as nobody gives the tensors other storage
    """
    get_algorithm(rule.algorithm)
    kernel = choose("commit", states, rule)
    if kernel.run is cpu.commit:
        return cpu.prepare(states, rule, steps)
    pending = [state.pending for state in states]

    def run() -> None:
        flat = torch.cat(pending)
        seen = ((flat > 0) & flat.isfinite()).split([len(p) for p in pending])
        torch._foreach_add_(list(steps), [of_layer.any().to(torch.int64) for of_layer in seen])
        kernel.run(states, rule)

    return run


def _commit(
    history: list[Tensor],
    pending: list[Tensor],
    scale: list[Tensor],
    target: list[Tensor],
    algorithm: str,
    margin: int,
    power_of_two: bool,
    decay: float,
) -> None:
    states = [State(*tensors) for tensors in zip(history, pending, scale, target, strict=True)]
    rule = ScaleRule(algorithm, margin, power_of_two, decay)
    choose("commit", states, rule).run(states, rule)


def _fake(*args: object) -> None:
    return None


register(
    "commit(Tensor(a!)[] history, Tensor(b!)[] pending, Tensor(c!)[] scale, Tensor[] target, str algorithm, int margin,"
    " bool power_of_two, float decay) -> ()",
    _commit,
    _fake,
)
