"""The knowledge probe on several ranks: all of them go by one rank's answers."""

from __future__ import annotations

import torch

from distributed.ranks import run
from fp8kernels.probe import Scores


def agreed(rank: int) -> Scores:
    from fp8kernels.integrations.probe import of_first_rank

    own = Scores([True, rank == 0], [0.1, 1e-7 * (1 - 2 * rank)], [-0.3, -1.0 / (3 + rank)])
    return of_first_rank(own, torch.device("cpu"))


def test_ranks_that_round_differently_go_by_the_answers_of_the_first() -> None:
    assert run(agreed, 2) == [Scores([True, True], [0.1, 1e-7], [-0.3, -1.0 / 3])] * 2
