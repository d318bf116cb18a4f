"""DistributedDataParallel around a converted model, or around a module that holds one."""

from __future__ import annotations

import contextlib
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


def parallel(rank: int, micro: int, order: str, how: dict[str, Any]) -> Run:
    net, out = converted("llama"), Run()
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


def test_four_ranks() -> None:
    held(run(parallel, 4, 1, "every time", {}), plain(4))


@pytest.mark.parametrize("how", [{"static_graph": True}, {"gradient_as_bucket_view": True}], ids=str)
def test_other_ways_of_ddp(how: dict[str, Any]) -> None:
    held(run(parallel, 2, 1, "every time", how), plain(2))
