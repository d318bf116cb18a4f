"""What may be compared: lists of finite numbers, of one length where they are paired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Numbers = Sequence[float] | Sequence[bool] | np.ndarray
Array = np.ndarray[Any, np.dtype[Any]]


def numbers(values: Numbers, name: str) -> Array:
    """fp64 [n] of the values.

    raises   ValueError if there are none, more than one dimension, or NaN or Inf among them; it names the first
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; a list of at least one number is needed")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"{name}[{bad[0]}] is {array[bad[0]]}, and so are {bad.size} of {array.size} numbers not finite"
        )
    return array


def pairs(first: Numbers, second: Numbers, names: tuple[str, str] = ("first", "second")) -> tuple[Array, Array]:
    """Two lists of numbers, of which those at one place belong together.

    raises   ValueError as `numbers`, and if the lengths differ
    """
    a, b = numbers(first, names[0]), numbers(second, names[1])
    if a.size != b.size:
        raise ValueError(
            f"{names[0]} has {a.size} values and {names[1]} has {b.size}; they are compared one by one, so both must "
            f"be of the same items or steps, in one order"
        )
    return a, b


def answers(first: Numbers, second: Numbers) -> tuple[Array, Array]:
    """Two lists of right (1, True) and wrong (0, False), as bool [n].

    raises   ValueError as `pairs`, and if a number is neither 0 nor 1
    """
    a, b = pairs(first, second)
    for name, array in (("first", a), ("second", b)):
        bad = np.flatnonzero((array != 0) & (array != 1))
        if bad.size:
            raise ValueError(f"{name}[{bad[0]}] is {array[bad[0]]:g}; an answer is right (1) or wrong (0)")
    return a == 1, b == 1


def fraction(value: float, name: str) -> float:
    """The value, strictly between 0 and 1.

    raises   ValueError if it is not
    """
    if not 0 < value < 1:
        raise ValueError(f"{name}={value} must lie between 0 and 1")
    return float(value)
