"""copy: the do-nothing verb; what is left of memory speed after a call through every layer of the library."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from .case import BANDWIDTH, Case, Shape, device_of, generator, in_turn, pick, sets, text
from .check import assert_same

FULL, SMALL = (8192, 8192), (512, 1024)


def versus_torch(shape: Shape = FULL, backend: str = "cpu") -> Case:
    """Against torch's clone."""
    device = device_of(backend)
    x = torch.randn(shape, generator=generator(7, device), device=device).bfloat16()
    chosen = pick("copy", backend, x)
    buffers = [x, *(x.clone() for _ in range(1, sets(device, 2 * x.nbytes)))]
    return Case(
        "copy", "copy bf16", "-", chosen.name, text(shape), "torch clone",
        in_turn([partial(chosen.run, each) for each in buffers]), in_turn([each.clone for each in buffers]),
        lambda: assert_same(chosen.run(x), x, "copy"), (f"copy/{chosen.name}",),
        unit=BANDWIDTH, moved=2 * x.nbytes, baseline_moved=2 * x.nbytes, device=device, calls=len(buffers),
    )  # fmt: skip


def test_copy(shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_torch(shape, backend))
