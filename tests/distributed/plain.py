"""The plain set-up that the others are held to: one process does in turn what the ranks do, and commits once.

A rank's batch is a micro-batch here, so activations, losses and gradients are those of the rank to the bit; gradients
are added up in the order that the set-up has, and divided by the number of ranks, a power of two, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from setups.runs import FULL, converted, loss_of, same, sgd
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fp8kernels import Recipe
from fp8kernels.nn.step import layers
from fp8kernels.scaling.delayed import GRAD, INPUT

STEPS = 5  # more than the window of 3, so that amax leaves it too
RANKS_OWN = ("fp8_counters", "fp8_pending")

Grads = list[Tensor]
Order = Callable[[list[list[Grads]]], Grads]  # of [rank][micro-batch] to what the optimizer steps with


@dataclass
class Run:
    """What a set-up gave."""

    losses: list[float] = field(default_factory=list)  # of a rank: a step after another, the micro-batches of each
    state: dict[str, Tensor] = field(default_factory=dict)


def seed(n: int, rank: int, micro: int) -> int:
    """Which batch a rank has: different ones everywhere."""
    return 100 * n + 10 * rank + micro


def plain(
    ranks: int,
    micro: int = 1,
    *,
    order: Order | None = None,
    recipe: Recipe = FULL,
    steps: int = STEPS,
    make: Callable[[Recipe], nn.Module] | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
) -> list[Run]:
    """What each rank has to have got after `steps` steps of `micro` micro-batches on each of `ranks` ranks."""
    with one_thread():
        net = converted("llama", recipe) if make is None else make(recipe)
        stepper, runs = optimizer(net), [Run() for _ in range(ranks)]
        params = [p for p in net.parameters() if p.requires_grad]
        for n in range(steps):
            grads: list[list[Grads]] = []
            for rank, each in enumerate(runs):
                grads.append([])
                for m in range(micro):
                    loss = loss_of(net, "llama", seed(n, rank, m))
                    loss.backward()
                    each.losses.append(float(loss.detach()))
                    grads[-1].append([p.grad for p in params])
                    for p in params:
                        p.grad = None
            for p, g in zip(params, (order or locally_first)(grads), strict=True):
                p.grad = g
            stepper.step()
            stepper.zero_grad()
    for each in runs:
        each.state = net.state_dict()
    return runs


@contextmanager
def one_thread() -> Any:
    """Sums in the order that a rank has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def locally_first(grads: list[list[Grads]]) -> Grads:
    """Each rank adds up its micro-batches, then ranks are averaged once: no_sync."""
    return mean([added(of_rank) for of_rank in grads])


def every_time(grads: list[list[Grads]]) -> Grads:
    """DistributedDataParallel without no_sync averages what has been added up so far after each micro-batch."""
    so_far: Grads | None = None
    for of_micro in zip(*grads, strict=True):
        so_far = mean([g if so_far is None else added([so_far, g]) for g in of_micro])
    assert so_far is not None
    return so_far


def ranks_first(grads: list[list[Grads]]) -> Grads:
    """FSDP without no_sync averages each micro-batch, and adds up shards of averages."""
    return added([mean(list(of_micro)) for of_micro in zip(*grads, strict=True)])


def added(terms: Sequence[Grads]) -> Grads:
    """One after another."""
    out = terms[0]
    for more in terms[1:]:
        out = [a + b for a, b in zip(out, more, strict=True)]
    return out


def mean(terms: Sequence[Grads]) -> Grads:
    """Neighbours first: (0 + 1) + (2 + 3), which two steps of reduction over a 2x2 mesh give too."""
    half = len(terms) // 2
    return [x / len(terms) for x in added([added(terms[:half]), added(terms[half:])])]


def held(got: list[Run], want: list[Run], *, counters: bool = True) -> None:
    """Losses of each rank, weights, histories, scales and steps have the same bits; counters add up to the same."""
    for rank, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.losses == b.losses, f"rank {rank}: {a.losses} against {b.losses}"
        same(a.state, b.state, but=RANKS_OWN)
        assert all(not a.state[key].any() for key in a.state if key.endswith("fp8_pending"))
    for key in want[0].state:
        if counters and key.endswith("fp8_counters"):
            total = sum(run.state[key][[INPUT, GRAD]] for run in got)
            assert torch.equal(total, want[0].state[key][[INPUT, GRAD]]), key


def same_models(found: nn.Module, other: nn.Module) -> None:
    """Bit-equal histories, scales and weights; sharded weights as the whole tensors that they are shards of."""
    for mine, theirs in zip(layers(found), layers(other), strict=True):
        assert torch.equal(mine.fp8_history, theirs.fp8_history), mine.fp8_name
        assert torch.equal(mine.fp8_scale, theirs.fp8_scale), mine.fp8_name
    for mine, theirs in zip(found.parameters(), other.parameters(), strict=True):
        assert torch.equal(full(mine), full(theirs))


def full(x: Tensor) -> Tensor:
    """The whole tensor of a shard, any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x
