"""Measure cases: build, check, time, and keep a row of each."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fp8kernels.ops.table import BACKEND_VARIABLE

from . import ledger
from .case import ANY, Case
from .cuda_time import Sensors
from .measure import SECONDS, Samples, reuse_freed_memory, summary

THREADS = 2  # the goals of the CPU are set for two cores
PLACEMENTS = 5  # times that the buffers of a CPU's case are made anew, because the pages a buffer gets matter
CPU_SECONDS = SECONDS  # of one comparison
GPU_SECONDS = 0.25


@dataclass(frozen=True)
class Job:
    """One case to measure: "bench file:function" and its arguments; `goal` is the name that its row carries."""

    goal: str | None
    device: str
    measure: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def case(self) -> Case:
        module, function = self.measure.split(":")
        made: Case = getattr(importlib.import_module(f"bench.{module}"), function)(**self.arguments)
        return made

    def __str__(self) -> str:
        given = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.goal or self.measure.split(':')[0]}({given})"


class Fault(RuntimeError):
    """A kernel failed on the device: the process can use it no more."""


def measure_all(
    jobs: Sequence[Job],
    say: Callable[[str], object],
    *,
    seconds: float | None = None,
    keep: bool = True,
    deadline: float = math.inf,
    begin: Callable[[Job], object] = str,
) -> bool:
    """Measure one after the other; False where a check failed.

    deadline   of time.monotonic(): no job is begun after it, and how many were not is said
    begin      is called with each job before it is begun
    raises     Fault after one on the GPU, when nothing more can run in this process
    """
    passed = True
    sensors = Sensors() if any(job.device == "cuda" for job in jobs) else None
    try:
        for number, job in enumerate(jobs):
            if time.monotonic() > deadline:
                say(f"out of time: {len(jobs) - number} of {len(jobs)} not measured, from {job} on")
                break
            begin(job)
            passed &= _measure_one(job, say, seconds, sensors, keep=keep)
    finally:
        if sensors is not None:
            sensors.close()
    return passed


def _measure_one(
    job: Job, say: Callable[[str], object], seconds: float | None, sensors: Sensors | None, *, keep: bool
) -> bool:
    """False where a check failed; a case that this machine cannot run is said and passed over."""
    try:
        row = measure(job, seconds, sensors)
    except AssertionError as error:
        say(f"WRONG {job}: {error}")
        return False
    except (ValueError, RuntimeError) as error:
        passes_over = isinstance(error, ValueError | NotImplementedError | torch.cuda.OutOfMemoryError)
        if not passes_over and not str(error).startswith("no kernel can run"):
            raise Fault(f"{job}: {error}") from error
        say(f"not measured: {job}: {str(error).strip().splitlines()[0]}")
        return True
    finally:
        release(job.device)
    if keep:
        ledger.append(row, job.device)
    say(line(job, row))
    return True


def line(job: Job, row: ledger.Row) -> str:
    ours, baseline = (row[name]["p50"] for name in ("ours_ms", "baseline_ms"))  # type: ignore[index]
    return (
        f"{job.goal or row['case']} {row['fmt']} {row['shape']} {row['backend']}: {row['figure']} ({row['unit']}); "
        f"ours {ours:.4f} ms, {row['baseline']} {baseline:.4f} ms"
    )


def measure(job: Job, seconds: float | None = None, sensors: Sensors | None = None) -> ledger.Row:
    """Check, time, and return the row; on a CPU over several placements of the buffers in memory.

    raises   AssertionError where ours is wrong, ValueError or RuntimeError where it cannot run here
    """
    on_gpu = job.device == "cuda"
    seconds = seconds or (GPU_SECONDS if on_gpu else CPU_SECONDS)
    placements = 1 if on_gpu else PLACEMENTS
    ours: list[float] = []
    baseline: list[float] = []
    for _ in range(placements):
        case, samples, read = place(job, seconds / placements, sensors)
        ours, baseline = ours + samples.ours, baseline + samples.baseline
        gc.collect()
    return ledger.row(case, summary(ours, baseline), job.goal, samples.how, read)


def place(job: Job, seconds: float, sensors: Sensors | None) -> tuple[Case, Samples, dict[str, float] | None]:
    """One placement: the case without its buffers, the samples of both sides, and what the sensors read meanwhile."""
    reuse_freed_memory(on=False)
    case = job.case()
    reuse_freed_memory(on=case.reuse)
    with forced(case.backend):
        case.check()
        begun = len(sensors.readings) if sensors else 0
        samples = case.samples(seconds)
        read = sensors.since(begun) if sensors else None
    return dataclasses.replace(case, ours=idle, baseline=idle, check=idle), samples, read


def idle() -> None:
    """Nothing: what stands in a case whose buffers are gone."""


def release(device: str) -> None:
    """Give the memory of the last case back."""
    gc.collect()
    if device == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Every verb runs on this backend or fails; with ANY the table chooses as ever."""
    if backend == ANY:
        yield
        return
    before = os.environ.get(BACKEND_VARIABLE)
    os.environ[BACKEND_VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[BACKEND_VARIABLE]
        else:
            os.environ[BACKEND_VARIABLE] = before
