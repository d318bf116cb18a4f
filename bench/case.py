"""A case: our way and another way of doing the same work, and a check that must pass before either is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fp8kernels.ops.table import TABLE

from .measure import Comparison, Work

SPEED, BANDWIDTH, TIME = "times as fast", "of its GB/s", "of its time"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """Two ways of doing the same work.

    verb            which bench file, and which file of rows
    check           raises AssertionError where ours is wrong; compares with the reference kernels
    unit            what the figure means: SPEED (baseline time / ours), BANDWIDTH (our GB/s / its GB/s) or TIME
    moved           bytes that ours has to read and write; 0 where that does not describe it
    baseline_moved  the same of the baseline
    flop            operations of a product
    kernels         "verb/backend" of every kernel that is timed
    reuse           the baseline writes into a tensor that exists already, so our results reuse freed memory too
    """

    verb: str
    name: str
    fmt: str
    backend: str
    shape: str
    against: str
    ours: Work
    baseline: Work
    check: Callable[[], None]
    kernels: tuple[str, ...]
    unit: str = SPEED
    moved: int = 0
    baseline_moved: int = 0
    flop: int = 0
    reuse: bool = False
    extra: dict[str, object] = field(default_factory=dict)

    def figure(self, timing: Comparison) -> float:
        """The number that a goal is set for."""
        if self.unit == TIME:
            return 1 / timing.speedup
        if self.unit == BANDWIDTH:
            return timing.speedup * self.moved / self.baseline_moved
        return timing.speedup


def kernel(verb: str, backend: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The function of one backend of a verb.

    raises   ValueError if there is no such backend, or if it cannot run on these arguments
    """
    table = {each.name: each for each in TABLE[verb]}
    if backend not in table:
        raise ValueError(f"{verb} has no backend {backend!r}; it has {', '.join(table)}")
    reason = table[backend].why_not(*args, **kwargs)
    if reason is not None:
        raise ValueError(f"{verb}/{backend} cannot run: {reason}")
    return table[backend].run


def reference(verb: str) -> Callable[..., Any]:
    """The function that says what the verb means."""
    return next(each.run for each in TABLE[verb] if each.name == "reference")


def text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def assert_same(ours: Tensor, expected: Tensor, what: str) -> None:
    """Equal bits, NaN included."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype, f"{what}: another shape or dtype"
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    different = int((ours.contiguous().view(bits) != expected.contiguous().view(bits)).sum())
    assert different == 0, f"{what}: {different} of {ours.numel()} elements differ from the reference"


def assert_product(out: Tensor, x: Tensor, w: Tensor, what: str) -> None:
    """out against x @ w.T of float64 operands, within (K + 2) 2^-24 |x| |w|^T + u |out| (Higham 2002, section 3.1)."""
    exact = x @ w.T  # [M, N] fp64
    unit = 2**-8 if out.dtype == torch.bfloat16 else 2**-24
    bound = (x.shape[1] + 2) * 2**-24 * (x.abs() @ w.abs().T) + unit * exact.abs()
    worst = float(((out.double() - exact).abs() / bound.clamp_min(1e-300)).max())
    assert worst <= 1, f"{what}: the error is {worst:.2f} times its bound"
