"""Ranks that share a batch: gloo processes on one machine, whose gradients are averaged by hand."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

PATIENCE = timedelta(minutes=10)  # for a rank that does not come


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a run; alone: the group of this rank only."""

    rank: int = 0
    count: int = 1
    alone: Any = None

    def part(self, tokens: Tensor) -> Tensor:
        """This rank's sequences of a batch [batch, sequence]."""
        return tokens.chunk(self.count)[self.rank]

    def average_gradients(self, model: nn.Module) -> None:
        """The mean of the ranks' gradients, in place."""
        if self.count == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(flat)
        for gradient, mean in zip(gradients, (flat / self.count).split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def average(self, value: float) -> float:
        """The mean of the ranks' numbers."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(shared)
        return float(shared / self.count)


def on_ranks(count: int, work: Callable[[Any, Ranks], dict[str, Any]], task: Any) -> dict[str, Any]:
    """`work(task, ranks)` in so many processes; what rank 0 returned.

    raises   what a rank raised
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (count, folder, work, task)
        torch.multiprocessing.spawn(_one, arguments, nprocs=count)  # type: ignore[no-untyped-call, attr-defined]
        row: dict[str, Any] = torch.load(Path(folder) / "row.pt")
    return row


def _one(rank: int, count: int, folder: str, work: Callable[[Any, Ranks], dict[str, Any]], task: Any) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count, timeout=PATIENCE
    )
    try:
        groups = [distributed.new_group([other]) for other in range(count)]  # every rank makes every group
        row = work(task, Ranks(rank, count, groups[rank]))
        if rank == 0:
            torch.save(row, Path(folder) / "row.pt")
    finally:
        distributed.destroy_process_group()
