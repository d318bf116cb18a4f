"""A training script as users have it, for torchrun: nothing in it is ours but `convert`."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fp8kernels

WINDOW, STEPS = 4, 3


def data(step: int, rank: int) -> torch.Tensor:
    """[8, 16], larger on rank 1."""
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * step + rank)) * (1 + 3 * rank)


def model() -> nn.Module:
    torch.manual_seed(0)
    recipe = fp8kernels.get_recipe("hif8-qat").with_format(grad="hif8").replace(window=WINDOW)
    return fp8kernels.convert(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), recipe, verbose=False)


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    net = model()
    parallel = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        loss = parallel(data(step, dist.get_rank())).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    torch.save({"losses": losses, "state": net.state_dict()}, os.path.join(folder, f"{dist.get_rank()}.pt"))
    del parallel  # it holds the group, whose threads must be gone before the process is
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
