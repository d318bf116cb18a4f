"""A case: our way and another way of doing the same work, and a check that must pass before either is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fp8kernels.ops.table import TABLE, Kernel, choose

from . import cuda_time, measure
from .measure import Comparison, Samples, Work
from .shapes import Shape

SPEED, BANDWIDTH, TIME, MEMORY = "times as fast", "of its GB/s", "of its time", "of its memory"
MICROSECONDS, TERAFLOPS, PERCENT = "µs", "TFLOP/s", "% of its loss"
ANY = "table"  # in place of a backend: the kernel that the table of ops/table.py chooses


@dataclass(frozen=True)
class Case:
    """Two ways of doing the same work.

    verb            which bench file, and which file of rows
    check           raises AssertionError where ours is wrong; compares with the reference kernels
    unit            what the figure means: SPEED (baseline time / ours), BANDWIDTH (our GB/s / its GB/s), TIME (our
                    time / its), MEMORY (our bytes / its: samples are GB in place of seconds, so that a row has MB in
                    place of milliseconds), MICROSECONDS or TERAFLOPS of ours alone, PERCENT (samples are the errors of
                    steps divided by 1000, so that a row has percent in place of milliseconds)
    moved           bytes that ours has to read and write; 0 where that does not describe it
    baseline_moved  the same of the baseline
    flop            operations of a product
    kernels         "verb/backend" of every kernel that is timed
    reuse           the baseline writes into a tensor that exists already, so our results reuse freed memory too
    device          where the tensors are, "cpu" or "cuda"
    calls           how many calls, on different buffers, one call of `ours` or `baseline` makes; times are those of one
    clock           what takes the samples, where a stopwatch around the calls would measure something else
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
    device: str = "cpu"
    calls: int = 1
    clock: Callable[[Work, Work, float], Samples] | None = None

    def samples(self, seconds: float) -> Samples:
        """Seconds of one call, of ours and of the baseline in turns, for about `seconds` in all."""
        clock = self.clock or (cuda_time.take_turns if self.device == "cuda" else measure.take_turns)
        found = clock(self.ours, self.baseline, seconds)
        return Samples(
            [each / self.calls for each in found.ours], [each / self.calls for each in found.baseline], found.how
        )

    def figure(self, timing: Comparison) -> float:
        """The number that a goal is set for."""
        if self.unit in (TIME, MEMORY):
            return 1 / timing.speedup
        if self.unit == MICROSECONDS:
            return 1e3 * timing.ours.p50
        if self.unit == PERCENT:
            return timing.ours.p50
        if self.unit == TERAFLOPS:
            return self.flop / (timing.ours.p50 / 1e3) / 1e12
        if self.unit == BANDWIDTH:
            return timing.speedup * self.moved / self.baseline_moved
        return timing.speedup


def kernel(verb: str, backend: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The function of one backend of a verb.

    raises   ValueError if there is no such backend, or if it cannot run on these arguments
    """
    return pick(verb, backend, *args, **kwargs).run


def pick(verb: str, backend: str, *args: Any, **kwargs: Any) -> Kernel:
    """The line of the table: that of a backend, or with ANY the one that the table chooses; raises as `kernel` does."""
    if backend == ANY:
        return choose(verb, *args, **kwargs)
    table = {each.name: each for each in TABLE[verb]}
    if backend not in table:
        raise ValueError(f"{verb} has no backend {backend!r}; it has {', '.join(table)}")
    reason = table[backend].why_not(*args, **kwargs)
    if reason is not None:
        raise ValueError(f"{verb}/{backend} cannot run: {reason}")
    return table[backend]


def device_of(backend: str) -> str:
    """Where the tensors of a bench of this backend belong: on the GPU where there is one, but for backend "cpu"."""
    return "cuda" if backend != "cpu" and torch.cuda.is_available() else "cpu"


def generator(seed: int, device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def sets(device: str, size: int) -> int:
    """How many sets of buffers of `size` bytes calls take in turn, so that none finds its own in the GPU's L2."""
    return cuda_time.sets_beyond_cache(size) if device == "cuda" else 1


def in_turn(calls: Sequence[Work]) -> Work:
    """One call after the other. All results stay alive until the end, so that each has memory of its own."""
    return calls[0] if len(calls) == 1 else lambda: [call() for call in calls]


@contextmanager
def noted() -> Iterator[set[str]]:
    """The set of the "verb/backend" that run inside the with-block."""
    found: set[str] = set()
    before = dict(TABLE)

    def watched(verb: str, kernel: Kernel) -> Kernel:
        def run(*args: Any, **kwargs: Any) -> Any:
            found.add(f"{verb}/{kernel.name}")
            return kernel.run(*args, **kwargs)

        return kernel._replace(run=run)

    try:
        for verb, kernels in before.items():
            TABLE[verb] = tuple(watched(verb, each) for each in kernels)
        yield found
    finally:
        TABLE.update(before)


def reference(verb: str) -> Callable[..., Any]:
    """The function that says what the verb means."""
    return next(each.run for each in TABLE[verb] if each.name == "reference")


def text(shape: Shape) -> str:
    return "x".join(map(str, shape))
