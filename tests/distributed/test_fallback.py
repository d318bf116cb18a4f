"""Ranks fall back to high precision together, and return together, whoever of them saw what."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from distributed.ranks import outcomes, run
from fp8kernels import Alarm, FallbackWarning, convert, get_recipe
from fp8kernels.nn.step import layers

FACTOR = 4.0
GROWS = 5  # steps
STEPS = 12
RECIPE = get_recipe("e4m3-delayed").replace(alarm=Alarm("fallback", steps=2, recover=3), window=4)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, *, both: bool) -> Tensor:
        x = self.first(x)
        return self.second(x.detach()) + x if both else x


def spread(rank: int, size: float) -> Tensor:
    """All ranks have the same amax; on rank 0 one element in 1024 has it, too few for the alarm; on rank 1 many."""
    x = torch.full((64, 16), size * 0.1)
    x[:: 64 if rank == 0 else 2, 0] = size
    return x


def train(rank: int, wrapper: str) -> tuple[list[list[bool]], list[list[int]], dict[str, Tensor]]:
    """The second layer runs on rank 1 only. What each step computed in high precision, and the states after it."""
    warnings.simplefilter("ignore", FallbackWarning)
    model = convert(Branches(), RECIPE, verbose=False)
    run_model = DistributedDataParallel(model, find_unused_parameters=True) if wrapper == "ddp" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    high, states = [], []
    for n in range(STEPS):
        run_model(spread(rank, FACTOR ** min(n, GROWS)), both=rank == 1).sum().backward()
        optimizer.step()
        high.append([layer.fp8_high for layer in layers(model)])
        states.append([int(x) for layer in layers(model) for x in layer.fp8_fallback])
    return high, states, dict(model.state_dict())


@pytest.mark.parametrize("wrapper", ["plain", "ddp"])
def test_all_ranks_change_in_the_same_step(wrapper: str) -> None:
    (high, states, first), (other_high, other_states, second) = run(train, 2, wrapper)
    assert high == other_high
    assert states == other_states
    for layer in range(2):
        row = [step[layer] for step in high]
        assert row[:2] == [False, False] and row[2] and not row[-1], row
    for key in first:
        if key.endswith(("fp8_history", "fp8_scale", "fp8_fallback")):
            assert torch.equal(first[key], second[key]), key


def tensor_parallel(rank: int) -> tuple[list[list[bool]], dict[str, Tensor]]:
    """A pair of layers spread over the ranks, by columns and then by rows."""
    warnings.simplefilter("ignore", FallbackWarning)
    torch.manual_seed(1)
    model = convert(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)), RECIPE.with_format(grad="e5m2"), verbose=False)
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    high = []
    for n in range(STEPS):
        model(spread(1, FACTOR ** min(n, GROWS))).sum().backward()
        optimizer.step()
        high.append([layer.fp8_high for layer in layers(model)])
    return high, {name: x for name, x in model.named_buffers() if name.endswith(("history", "scale", "fallback"))}


def test_shards_of_a_layer_change_together() -> None:
    (high, first), (other_high, second) = run(tensor_parallel, 2)
    assert high == other_high
    assert [True, True] in high and high[-1] == [False, False]
    for key in first:
        assert torch.equal(first[key], second[key]), key
    assert (first["0.fp8_history"][:, 0] > 0).all()


def disagree(rank: int) -> None:
    alarm = Alarm("fallback") if rank == 0 else Alarm("warn")
    model = convert(nn.Sequential(nn.Linear(16, 16)), RECIPE.replace(alarm=alarm), verbose=False)
    model(torch.randn(4, 16)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()


def test_ranks_with_other_policies_are_told() -> None:
    for outcome in outcomes(disagree, 2):
        assert outcome.error is not None and "alarm" in outcome.error
