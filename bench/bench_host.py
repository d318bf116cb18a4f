"""What is around the kernels: host time of an eager 8-bit nn.Linear, and the gaps between launches inside a graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

import fp8kernels

from .case import ANY, MICROSECONDS, Case, Shape, device_of, noted, text
from .cuda_time import captured
from .measure import Samples, Work, synchronize

SMALL = (16, 256, 256)
FULL = (64, 1024, 1024)  # small, so that the GPU is done before the host comes with the next call
CALLS = 50  # between two waits: with a few launches each, far below the 1024 that a stream queues
CHAIN = 16  # layers of a graph, one after the other
REPLAYS = 5


def eager_linear(recipe: str = "e4m3-delayed", shape: Shape = FULL, backend: str = ANY) -> Case:
    """Host microseconds of a converted nn.Linear's forward in training, gradients on; beside it the plain layer's."""
    rows, cols, _ = shape
    ours, plain, x = _layers(recipe, shape, backend)

    def check() -> None:
        assert isinstance(ours, fp8kernels.nn.Linear), "nothing was converted"
        assert ours(x).shape == (rows, cols)

    with noted() as kernels:
        ours(x)
    return Case(
        "host", f"eager nn.Linear forward, {recipe}", fp8kernels.get_recipe(recipe).weight.fmt, backend, text(shape),
        "torch nn.Linear bf16", lambda: ours(x), lambda: plain(x), check, tuple(sorted(kernels)),
        unit=MICROSECONDS, device=device_of(backend), clock=host_clock,
    )  # fmt: skip


def launch_gaps(recipe: str = "e4m3-delayed", shape: Shape = FULL, backend: str = ANY) -> Case:
    """Microseconds between the end of a kernel and the start of the next inside a captured chain of 8-bit layers."""
    if device_of(backend) != "cuda":
        raise ValueError("launch gaps are those of a CUDA graph: there is no GPU")
    ours, plain, x = _layers(recipe, shape, backend)

    def chain(layer: nn.Module) -> Work:
        def run() -> None:
            for _ in range(CHAIN):
                layer(x)

        return torch.no_grad()(run)

    def check() -> None:
        assert isinstance(ours, fp8kernels.nn.Linear), "nothing was converted"
        assert ours(x).isfinite().all()

    with noted() as kernels:
        chain(ours)()
    return Case(
        "host", f"launch gaps in a graph, {recipe}", fp8kernels.get_recipe(recipe).weight.fmt, backend, text(shape),
        "torch nn.Linear bf16", chain(ours), chain(plain), check, tuple(sorted(kernels)),
        unit=MICROSECONDS, device="cuda", clock=gap_clock,
    )  # fmt: skip


def host_clock(ours: Work, baseline: Work, seconds: float) -> Samples:
    """Seconds that the host spends in a call, without waiting for what it launched."""
    works = (ours, baseline)
    for work in works:
        for _ in range(CALLS):
            work()
    found: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found[0]) < 3:
        for work, samples in zip(works, found, strict=True):
            synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                work()
            samples.append((time.perf_counter() - start) / CALLS)
    synchronize()
    return Samples(*found, "the host's side of the calls")


def gap_clock(ours: Work, baseline: Work, seconds: float) -> Samples:
    """Mean gap of each replay, as the profiler sees the kernels."""
    return Samples(graph_gaps(ours), graph_gaps(baseline), "gaps between kernels, by torch.profiler")


def graph_gaps(work: Work) -> list[float]:
    """For each replay the mean seconds between a kernel's end and the next one's start.

    raises   AssertionError if the work cannot be captured, or the profiler sees no kernels
    """
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = captured(work, 1)
    assert graph is not None, "the layers cannot be captured in a CUDA graph"
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPLAYS):
            graph.replay()
            torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    assert len(spans) >= 2 * REPLAYS, f"the profiler saw {len(spans)} kernels"
    return mean_gaps(spans, REPLAYS)


def mean_gaps(spans: list[tuple[float, float]], replays: int) -> list[float]:
    """The mean gap in seconds of each replay, from sorted (start, end) in microseconds; overlap counts as none."""
    each = len(spans) // replays
    parts = [spans[i * each : (i + 1) * each] for i in range(replays)]
    return [statistics.mean(max(0.0, after[0] - before[1]) for before, after in pairwise(part)) / 1e6 for part in parts]


def _layers(recipe: str, shape: Shape, backend: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The 8-bit layer with its scales made, the plain layer, and an input."""
    rows, cols, depth = shape
    device = device_of(backend)
    plain = nn.Linear(depth, cols, device=device, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(depth, cols, device=device, dtype=torch.bfloat16))
    fp8kernels.convert(model, recipe, verbose=False)
    x = torch.randn(rows, depth, device=device, dtype=torch.bfloat16)
    model(x)
    fp8kernels.commit(model)
    return model[0], plain, x


def test_eager_linear(backend: str, race: Callable[[Case], None]) -> None:
    race(eager_linear(shape=SMALL, backend=backend))
