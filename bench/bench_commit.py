"""commit: the histories of a whole model rolled and turned into scales, once per optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp8kernels.kernels.commit import ScaleRule, State
from fp8kernels.ops.commit import prepare

from .case import Case, Shape, device_of, generator, pick, reference, text
from .check import assert_same

FULL, SMALL = (224, 3, 64), (16, 3, 64)  # layers (7 in each of 32 blocks), tensors of a layer, window
TENSORS = (250, 2, 64)  # 500 tensors


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

    return Case(
        "commit", "commit max", "-", chosen.name, text(shape), "the reference, in torch",
        step([state.pending for state in ours], lambda: chosen.run(ours, rule)),
        step([state.pending for state in theirs], lambda: reference("commit")(theirs, rule)), check,
        (f"commit/{chosen.name}",), device=device,
    )  # fmt: skip


def versus_loop(shape: Shape = TENSORS, backend: str = "cpu") -> Case:
    """Against a loop of torch calls over tensors, as one writes it: roll, newest in front, maximum, scale, clear."""
    rule = ScaleRule()
    chosen = pick("commit", backend, states(shape, "cpu"), rule)

    def ours(given: list[State]) -> Callable[[], None]:
        return prepare(given, rule, [torch.zeros((), dtype=torch.int64) for _ in given])

    def check() -> None:
        mine, looped = states(shape, "cpu"), states(shape, "cpu")
        ours(mine)()
        loop(looped)
        for a, b in zip(mine, looped, strict=True):
            for name in ("history", "pending", "scale"):
                assert_same(getattr(a, name), getattr(b, name), f"commit {name}")

    (mine, seen), (theirs, also_seen) = together(states(shape, "cpu")), together(states(shape, "cpu"))
    commit = ours(mine)
    return Case(
        "commit", "commit max, against a loop", "-", chosen.name, text(shape), "a loop of torch calls over the tensors",
        step([seen], commit), step([also_seen], lambda: loop(theirs)), check, (f"commit/{chosen.name}",),
    )  # fmt: skip


def loop(given: list[State]) -> None:
    """Delayed scaling as a training loop would do it for each tensor by itself."""
    for state in given:
        for history, pending, scale, target in zip(*state, strict=True):
            history.copy_(history.roll(1))
            history[0] = pending
            scale.copy_(history.max() / target)
            pending.zero_()


def together(given: list[State]) -> tuple[list[State], Tensor]:
    """The same states with what is pending in one tensor, so that noting something of all takes no time to speak of."""
    pending = torch.stack([state.pending for state in given])
    return [state._replace(pending=row) for state, row in zip(given, pending, strict=True)], pending


def step(pending: list[Tensor], commit: Callable[[], None]) -> Callable[[], None]:
    """Something is seen of every tensor, and committed."""

    def work() -> None:
        torch._foreach_add_(pending, 1.0)
        commit()

    return work


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
