"""The verb commit: pending amax enters the histories, the histories become scales. One call for a whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.commit import ScaleRule, State
from ..scaling.rules import get_algorithm
from .library import register
from .table import choose


def commit_states(states: Sequence[State], rule: ScaleRule) -> None:
    """Commit the state of many layers, in place.

    states   one per layer; see State for shapes and dtypes
    rule     the algorithm ("max", "moving_average", "most_recent", or a function [T, window] -> [T]), margin, rounding
    raises   ValueError for an unknown algorithm
    """
    get_algorithm(rule.algorithm)
    if callable(rule.algorithm):
        choose("commit", states, rule).run(states, rule)
        return
    history, pending, scale, target = (list(tensors) for tensors in zip(*states, strict=True)) if states else ([],) * 4
    torch.ops.fp8kernels.commit(history, pending, scale, target, rule.algorithm, rule.margin, rule.power_of_two)


def _commit(
    history: list[Tensor],
    pending: list[Tensor],
    scale: list[Tensor],
    target: list[Tensor],
    algorithm: str,
    margin: int,
    power_of_two: bool,
) -> None:
    states = [State(*tensors) for tensors in zip(history, pending, scale, target, strict=True)]
    rule = ScaleRule(algorithm, margin, power_of_two)
    choose("commit", states, rule).run(states, rule)


def _fake(*args: object) -> None:
    return None


register(
    "commit(Tensor(a!)[] history, Tensor(b!)[] pending, Tensor(c!)[] scale, Tensor[] target, str algorithm, int margin,"
    " bool power_of_two) -> ()",
    _commit,
    _fake,
)
