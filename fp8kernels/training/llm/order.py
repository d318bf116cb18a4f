"""The order in which a run sees its sequences: from the seed and the length alone, so that runs can be compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Ordered(Dataset):
    """As many sequences as a run of so many steps takes, each pass over the data in an order of its own.

    source  the sequences; any object with a length and items
    count   sequences in the whole run
    seed    of the orders
    raises  ValueError if the source is empty
    """

    def __init__(self, source: Any, count: int, *, seed: int) -> None:
        if len(source) == 0:
            raise ValueError("the training data holds no sequence")
        self.source, self.order = source, order(len(source), count, seed=seed)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        return self.source[int(self.order[index])]


def order(length: int, count: int, *, seed: int) -> Tensor:
    """`count` indices below `length`, permutation after permutation: int64 [count]."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-count // length)
    return torch.cat([torch.randperm(length, generator=generator) for _ in range(passes)])[:count]
