"""A function in several processes that meet on gloo, with a limit of time, so that ranks that wait for each other fail.

    def worker(rank: int, steps: int) -> Any: ...     a function of a module, as other processes import it
    first, second = run(worker, 2, steps)             what each rank returned; an error where one failed
    outcomes(worker, 2, steps)[1].error               where ranks are to fail: the words of the exception, or None

Processes come from a server that has imported torch and transformers once, so that each starts in no time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 55.0  # seconds for all ranks; a rank that waits for another one gives up, and says where, before that
PATIENCE = 40.0  # seconds that a collective waits
IMPORTED = [
    "fp8kernels",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
]


@dataclass
class Outcome:
    """What became of a rank."""

    value: Any = None
    error: str | None = None  # the words of its exception, "Type: message"
    trace: str = ""


def run(worker: Callable[..., Any], count: int, *args: Any, limit: float = LIMIT) -> list[Any]:
    """worker(rank, *args) on `count` ranks; what each returned."""
    got = outcomes(worker, count, *args, limit=limit)
    failed = [f"rank {rank}: {each.error}\n{each.trace}" for rank, each in enumerate(got) if each.error is not None]
    assert not failed, "\n".join(failed)
    return [each.value for each in got]


def outcomes(worker: Callable[..., Any], count: int, *args: Any, limit: float = LIMIT) -> list[Outcome]:
    """worker(rank, *args) on `count` ranks; what each returned, or why it did not."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(worker, rank, count, args, folder, limit)) for rank in range(count)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + limit
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        if stuck:
            where = "\n".join(f"rank {rank}:\n{Path(folder, f'{rank}.stack').read_text()}" for rank in stuck)
            raise AssertionError(f"ranks {stuck} did not end within {limit:.0f} s\n{where}")
        return [_outcome(Path(folder), rank, process.exitcode) for rank, process in enumerate(processes)]


def _outcome(folder: Path, rank: int, code: int) -> Outcome:
    if (folder / f"{rank}.pt").exists():
        outcome: Outcome = torch.load(folder / f"{rank}.pt", weights_only=False)
        return outcome
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return Outcome(error=how, trace=(folder / f"{rank}.stack").read_text())


def _rank(worker: Callable[..., Any], rank: int, count: int, args: tuple[Any, ...], folder: str, limit: float) -> None:
    """One process, from its start to its end."""
    with Path(folder, f"{rank}.stack").open("w") as stack:
        faulthandler.enable(file=stack)
        faulthandler.dump_traceback_later(limit - 2, file=stack)
        torch.set_num_threads(1)  # the same sums whatever the machine, and ranks that do not fight for cores
        torch.manual_seed(0)
        meet = f"file://{folder}/meet"
        dist.init_process_group(
            "gloo", init_method=meet, rank=rank, world_size=count, timeout=timedelta(seconds=min(PATIENCE, limit - 5))
        )
        outcome = Outcome()
        try:
            outcome.value = worker(rank, *args)
        except BaseException as error:
            outcome.error, outcome.trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        torch.save(outcome, f"{folder}/{rank}.part")
        Path(folder, f"{rank}.part").rename(Path(folder, f"{rank}.pt"))
        if outcome.error is None:
            gc.collect()  # DistributedDataParallel holds the group, whose threads must be gone before the process is
            with contextlib.suppress(RuntimeError):  # another rank has failed, and says so
                dist.barrier()
                dist.destroy_process_group()
    os._exit(0)  # without waiting for threads of a group that has failed
