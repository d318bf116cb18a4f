"""How an amax becomes a scale, and how a history becomes an amax."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-126  # the smallest normal fp32, so that dividing by a scale cannot overflow through a subnormal
DECAY = 0.9  # of an exponential moving average, from a step to the one before
LARGEST_SCALE = float(torch.finfo(torch.float32).max)

Algorithm = Callable[[Tensor], Tensor]


def scale_from_amax(amax: Tensor, target: float | Tensor, *, margin: int = 0, power_of_two: bool = False) -> Tensor:
    """The scale that puts `amax` at `target`: amax / target * 2**margin.

    amax     fp32, any shape, finite, >= 0
    target   the magnitude that amax is to have after division by the scale
    margin   binades of head-room above amax
    returns  fp32 of the same shape, in [SMALLEST_SCALE, LARGEST_SCALE]; 1 where amax is 0. With `power_of_two` it is
             rounded up to a power of two, so that dividing by it is exact
    """
    if not isinstance(target, Tensor):
        target = amax.new_full((), target)  # by a plain number torch multiplies with 1 / number on a GPU: two roundings
    scale = (amax / target * 2.0**margin).clamp(SMALLEST_SCALE, LARGEST_SCALE)  # frexp reads no exponent off 0 and Inf
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2**exponent, mantissa in [0.5, 1)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        scale = torch.ldexp(torch.ones_like(scale), exponent)
    return torch.where(amax == 0, 1.0, scale.clamp(SMALLEST_SCALE, LARGEST_SCALE))


def history_max(history: Tensor) -> Tensor:
    """[T, window] -> [T]: the largest amax of the window."""
    return history.amax(dim=1)


def history_most_recent(history: Tensor) -> Tensor:
    """[T, window] -> [T]: the newest amax; slot 0 is the newest."""
    return history[:, 0]


def history_moving_average(history: Tensor) -> Tensor:
    """[T, window] -> [T]: the mean of the filled slots; an empty slot holds 0, which no amax is."""
    filled = (history > 0).sum(dim=1).clamp(min=1)
    total = torch.zeros_like(history[:, 0])
    for slot in range(history.shape[1]):  # in this order on every backend: the sum is the same to the bit
        total = total + history[:, slot]
    return total / filled


def history_exponential_moving_average(history: Tensor, decay: float) -> Tensor:
    """[T, window] -> [T]: the mean of the filled slots, each weighing `decay` times the next newer one.

    A function of the window alone: what an endless average would still hold of older steps weighs less than
    decay**window
    """
    total, weights = torch.zeros_like(history[:, 0]), torch.zeros_like(history[:, 0])
    weight = torch.ones((), dtype=history.dtype, device=history.device)
    for slot in range(history.shape[1]):  # in this order on every backend, each step rounded to fp32
        amax = history[:, slot]
        total = total + weight * amax
        weights = torch.where(amax > 0, weights + weight, weights)
        weight = weight * decay
    return torch.where(weights > 0, total / weights, 0.0)


ALGORITHMS: dict[str, Callable[..., Tensor]] = {
    "max": history_max,
    "moving_average": history_moving_average,
    "most_recent": history_most_recent,
    "exponential_moving_average": history_exponential_moving_average,
}


def get_algorithm(algorithm: str | Algorithm, decay: float = DECAY) -> Algorithm:
    """The rule of that name, with the decay of an exponential average; a function [T, window] -> [T] stays as it is.

    raises   ValueError naming the known rules
    """
    if callable(algorithm):
        return algorithm
    if algorithm == "exponential_moving_average":
        return functools.partial(history_exponential_moving_average, decay=decay)
    if algorithm in ALGORITHMS:
        return ALGORITHMS[algorithm]
    raise ValueError(
        f"unknown amax algorithm {algorithm!r}: known are {', '.join(map(repr, ALGORITHMS))}, or a function"
    )
