"""Time two ways of doing the same work, taking turns, so that both see the same machine."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

SECONDS = 10.0  # of one comparison
MIN_ROUNDS, MAX_ROUNDS = 3, 200
MIN_SAMPLE = 2e-3  # seconds; shorter work is repeated inside one sample until it takes this long
COPY_ELEMENTS = 64 << 20  # of bf16: 128 MiB read and 128 MiB written, well beyond any cache

Work = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Percentiles of the samples, in milliseconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        fifths = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(*(round(1e3 * value, 5) for value in (fifths[1], statistics.median(seconds), fifths[7])))


@dataclass(frozen=True)
class Comparison:
    """ours and the baseline from the same rounds; `speedup` is the median over rounds of baseline time / our time."""

    ours: Spread
    baseline: Spread
    speedup: float
    rounds: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class Samples(NamedTuple):
    """Seconds of ours and of the baseline, of the same rounds; `how` says what the clock stood around."""

    ours: list[float]
    baseline: list[float]
    how: str = "calls"


def take_turns(ours: Work, baseline: Work, seconds: float = SECONDS) -> Samples:
    """Both in turn, round after round, for about `seconds` in all."""
    repeat_ours, once_ours = _repeats(ours)
    repeat_baseline, once_baseline = _repeats(baseline)
    per_round = repeat_ours * once_ours + repeat_baseline * once_baseline
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / per_round)))
    samples = [(sample(ours, repeat_ours), sample(baseline, repeat_baseline)) for _ in range(rounds)]
    return Samples([a for a, _ in samples], [b for _, b in samples])


def summary(ours: list[float], baseline: list[float]) -> Comparison:
    """Samples of the same rounds, in seconds."""
    ratios = [b / a for a, b in zip(ours, baseline, strict=True)]
    return Comparison(Spread.of(ours), Spread.of(baseline), round(statistics.median(ratios), 4), len(ratios))


def sample(work: Work, repeat: int = 1) -> float:
    """Seconds of one call."""
    synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    synchronize()
    return (time.perf_counter() - start) / repeat


def synchronize() -> None:
    """Wait for the GPU where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _repeats(work: Work) -> tuple[int, float]:
    work()
    once = min(sample(work) for _ in range(2))
    return max(1, int(MIN_SAMPLE / once)), once


def reuse_freed_memory(*, on: bool) -> bool:
    """Whether glibc keeps freed blocks for the next result (on), or does as it does by itself (off).

    By itself it returns a result beyond 32 MiB to the system and takes fresh pages for the next one; touching those
    first can cost more than the kernel. Returns whether the C library listened.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # names of mallopt's options, malloc.h
    if on:
        return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, -1))
    done = libc.mallopt(mmap_max, 65536) and libc.mallopt(mmap_threshold, 32 << 20)
    done = done and libc.mallopt(trim_threshold, 64 << 20)  # where glibc's own adjustment ends
    libc.malloc_trim(0)
    return bool(done)


def copy_bandwidth(seconds: float = 1.0) -> float:
    """GB/s, read + written, of torch's bf16 `copy_` on the CPU: what this machine's memory gives."""
    if seconds not in _COPY:
        x = torch.ones(COPY_ELEMENTS, dtype=torch.bfloat16)
        y = torch.empty_like(x)
        y.copy_(x)
        times = [sample(lambda: y.copy_(x)) for _ in range(max(5, int(seconds / 0.02)))]
        _COPY[seconds] = 2 * x.nbytes / statistics.median(times) / 1e9
    return _COPY[seconds]


_COPY: dict[float, float] = {}
