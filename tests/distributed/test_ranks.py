"""The harness itself: what ranks return and raise, and that a rank which waits in vain does not wait forever."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from distributed.ranks import outcomes, run


def total(rank: int, start: int) -> torch.Tensor:
    x = torch.tensor(start + rank)
    dist.all_reduce(x)
    return x


def one_fails(rank: int) -> int:
    if rank == 1:
        raise LookupError("it is not here")
    return rank


def one_is_killed(rank: int) -> None:
    dist.barrier()  # until all are connected a rank that goes breaks the start of the others
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def one_waits(rank: int) -> None:
    if rank == 1:
        signal.pause()


def test_what_ranks_return() -> None:
    assert [int(x) for x in run(total, 4, 10)] == [46] * 4


def test_what_ranks_raise() -> None:
    first, second = outcomes(one_fails, 2)
    assert first.value == 0 and first.error is None
    assert second.error == "LookupError: it is not here" and "one_fails" in second.trace
    with pytest.raises(AssertionError, match="rank 1: LookupError"):
        run(one_fails, 2)


def test_a_killed_rank_ends_the_others() -> None:
    first, second = outcomes(one_is_killed, 2)
    assert second.error == "ended by SIGKILL"
    assert first.error is not None and first.error.startswith("RuntimeError")


def test_a_hang_is_an_error_that_says_where() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[1\] did not end within 8 s(.|\n)*one_waits"):
        run(one_waits, 2, limit=8)  # the other one waits for it before it ends
