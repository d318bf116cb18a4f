"""DistributedDataParallel around a converted model, or around a module that holds one."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from setups.models import batch
from setups.runs import converted, sgd
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distributed.plain import STEPS, Run, every_time, held, locally_first, plain, seed
from distributed.ranks import run
from fp8kernels import Recipe
from fp8kernels.nn import state
from fp8kernels.nn.prepared import Prepared


class Lightning(nn.Module):
    """A module that holds the model and has a training_step, as trainers have it; it is not what was converted."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **inputs: Any) -> Tensor:
        return self.training_step(inputs)

    def training_step(self, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = self.net(**inputs).loss
        return loss


def neighbours_first(bucket: Any) -> Any:
    """The mean of all ranks in an order that can be repeated: four ranks on gloo add up in one of their own."""
    own = bucket.buffer()
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(((every[0] + every[1]) + (every[2] + every[3])) / 4)
    return future


def parallel(rank: int, micro: int, order: str, how: dict[str, Any], dtype: torch.dtype = torch.float32) -> Run:
    net, out = converted("llama").to(dtype), Run()
    wrapped = DistributedDataParallel(Lightning(net), **how)
    if dist.get_world_size() == 4:
        wrapped.register_comm_hook(None, lambda _, bucket: neighbours_first(bucket))
    optimizer = sgd(wrapped)
    for n in range(STEPS):
        for m in range(micro):
            waits = order == "no_sync" and m < micro - 1
            with wrapped.no_sync() if waits else contextlib.nullcontext():
                loss = wrapped(**batch("llama", seed(n, rank, m)))
                loss.backward()
            out.losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    out.state = net.state_dict()
    return out


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("order", ["no_sync", "every time"])
def test_accumulation(order: str, *, broadcast: bool) -> None:
    """The buffers of rank 0 go to all ranks before a forward, in the middle of a step too: no maximum is lost by it."""
    got = run(parallel, 2, 2, order, {"broadcast_buffers": broadcast})
    held(got, plain(2, 2, order=locally_first if order == "no_sync" else every_time))


def without_reduction(rank: int) -> Run:
    """A fault: each rank makes scales of what it alone has seen."""
    Prepared.reduce = lambda *_: None  # type: ignore[method-assign]
    return parallel(rank, 1, "every time", {"broadcast_buffers": False})


def without_protection(rank: int) -> Run:
    """A fault: what rank 0 has noted is sent to the others in the middle of a step."""
    state.tell_running = lambda: None
    vars(sys.modules["fp8kernels.convert.convert"])["ignore"] = lambda _: None
    return parallel(rank, 2, "every time", {})


@pytest.mark.parametrize("fault, micro", [(without_reduction, 1), (without_protection, 2)])
def test_these_tests_see_faults(fault: Any, micro: int) -> None:
    got, want = run(fault, 2), plain(2, micro, order=every_time)
    lost = [
        key for key in want[0].state if key.endswith("fp8_history") and (got[0].state[key] < want[0].state[key]).any()
    ]
    assert lost
    with pytest.raises(AssertionError):
        held(got, want)


def test_four_ranks() -> None:
    held(run(parallel, 4, 1, "every time", {}), plain(4))


@pytest.mark.parametrize("how", [{"static_graph": True}, {"gradient_as_bucket_view": True}], ids=str)
def test_other_ways_of_ddp(how: dict[str, Any]) -> None:
    held(run(parallel, 2, 1, "every time", how), plain(2))


def bf16(recipe: Recipe) -> nn.Module:
    return converted("llama", recipe).bfloat16()


def test_bf16() -> None:
    held(run(parallel, 2, 2, "no_sync", {}, torch.bfloat16), plain(2, 2, make=bf16))
