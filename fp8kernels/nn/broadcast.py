"""DistributedDataParallel sends the buffers of rank 0 to all ranks before a forward; not what a rank has noted.

It asks the module that it wraps which buffers to leave alone. A model says so when it is converted; where it stands in
another module, which is then wrapped, its first forward says so to the DistributedDataParallel that runs.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

RANKS_OWN = ("fp8_pending", "fp8_counters", "fp8_counted")  # buffers that differ from rank to rank until a commit
IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DistributedDataParallel looks

_parallel: Any = torch.nn.parallel.DistributedDataParallel if torch.distributed.is_available() else None
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # instances of it that know


def ignore(model: nn.Module) -> None:
    """Say it for a DistributedDataParallel that will wrap this model."""
    before = getattr(model, IGNORED, ())
    model.__dict__[IGNORED] = sorted(ranks_own(model).union(before))


def ignore_no_more(model: nn.Module) -> None:
    """Take back what `ignore` said."""
    others = [name for name in model.__dict__.pop(IGNORED, ()) if name.rpartition(".")[2] not in RANKS_OWN]
    if others:
        model.__dict__[IGNORED] = others


def tell_running() -> None:
    """Say it to the DistributedDataParallel whose forward runs, if there is one."""
    parallel = None if _parallel is None else _parallel._active_ddp_module
    if parallel is not None and parallel not in _told:
        _told.add(parallel)
        parallel.parameters_to_ignore.update(ranks_own(parallel.module))


def ranks_own(module: nn.Module) -> set[str]:
    """The names of the buffers in a module that differ from rank to rank."""
    return {name for name, _ in module.named_buffers() if name.rpartition(".")[2] in RANKS_OWN}
