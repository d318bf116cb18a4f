"""The watch on several ranks: what one of them sees makes all fall back in the same step, or all stop in it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from distributed.ranks import run
from fp8kernels import Alarm, FallbackWarning, convert, get_recipe
from fp8kernels.nn.step import layers
from fp8kernels.telemetry.saturation import SaturationStop, SaturationWatch

RECIPE = get_recipe("hif8-qat").replace(alarm=Alarm("ignore", recover=3), algorithm="most_recent")
STEPS, SPIKE = 8, 3


def batch(rank: int, step: int) -> Tensor:
    """From one step on the inputs of rank 1 are 16 times as large, in all steps but few elements on rank 0."""
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step)).clamp(-1, 1)
    x[0, 0] = 1.0
    return x * (16.0 if rank == 1 and step >= SPIKE else 1.0)


def train(rank: int, policy: str) -> tuple[list[bool], int | None, list[int]]:
    """Whether the layer was in high precision after each step, when a stop came, and which steps had findings here."""
    warnings.simplefilter("ignore", FallbackWarning)
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(16, 16)), RECIPE, verbose=False)
    watch = SaturationWatch(model, every=1, policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    high: list[bool] = []
    stopped, findings = None, []
    for step in range(STEPS):
        model(batch(rank, step)).sum().backward()
        try:
            optimizer.step()
        except SaturationStop:
            stopped = step
        findings += [step for measured in watch.take() if measured.findings]
        if stopped is not None:
            break
        high.append(layers(model)[0].fp8_high)
    return high, stopped, findings


def test_all_ranks_fall_back_in_the_same_step_and_return_together() -> None:
    (first, _, seen_first), (second, _, seen_second) = run(train, 2, "fallback")
    assert first == second
    assert (seen_first, seen_second) == ([], [SPIKE])
    # asked at the commit of the spike, high from the next one on, and back after three quiet commits
    assert first == [False] * (SPIKE + 1) + [True] * 3 + [False]


def test_all_ranks_stop_in_the_same_step() -> None:
    (_, first, seen_first), (_, second, seen_second) = run(train, 2, "stop")
    assert first == second == SPIKE
    assert (seen_first, seen_second) == ([], [SPIKE])
