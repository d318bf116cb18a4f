"""The few words that the processes of one run exchange beside their gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if world() > 1 else 0


def any_rank(flag: bool, device: torch.device) -> bool:  # noqa: FBT001
    """Whether the flag is set on any process; all of them must ask."""
    if world() == 1:
        return flag
    told = torch.tensor(int(flag), device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        dist.barrier()
