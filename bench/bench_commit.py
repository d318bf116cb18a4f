"""commit: the histories of a whole model rolled and turned into scales, once per optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fp8kernels.kernels.commit import ScaleRule, State

from .case import Case, Shape, device_of, generator, pick, reference, text
from .check import assert_same

FULL, SMALL = (224, 3, 64), (16, 3, 64)  # layers (7 in each of 32 blocks), tensors of a layer, window


def versus_reference(shape: Shape = FULL, backend: str = "cpu") -> Case:
    """Against the reference, a loop of torch calls over the layers."""
    rule, device = ScaleRule(), device_of(backend)
    ours, theirs = states(shape, device), states(shape, device)
    chosen = pick("commit", backend, ours, rule)

    def check() -> None:
        mine, expected = states(shape, device), states(shape, device)
        chosen.run(mine, rule)
        reference("commit")(expected, rule)
        for a, b in zip(mine, expected, strict=True):
            for name in ("history", "pending", "scale"):
                assert_same(getattr(a, name), getattr(b, name), f"commit {name}")

    def step(given: list[State], commit: Callable[..., None]) -> Callable[[], None]:
        pending = [state.pending for state in given]

        def work() -> None:
            torch._foreach_add_(pending, 1.0)
            commit(given, rule)

        return work

    return Case(
        "commit", "commit max", "-", chosen.name, text(shape), "the reference, in torch",
        step(ours, chosen.run), step(theirs, reference("commit")), check, (f"commit/{chosen.name}",), device=device,
    )  # fmt: skip


def states(shape: Shape, device: str) -> list[State]:
    layers, tensors, window = shape
    random = generator(8, device)
    return [
        State(
            torch.rand(tensors, window, generator=random, device=device),
            torch.rand(tensors, generator=random, device=device),
            torch.rand(tensors, generator=random, device=device),
            torch.full((tensors,), 15.0, device=device),
        )
        for _ in range(layers)
    ]


def test_commit(shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_reference(shape, backend))
