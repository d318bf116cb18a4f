"""The verb copy: does nothing; read it first to see how a verb is made."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import register
from .table import choose


def copy(x: Tensor) -> Tensor:
    """A contiguous copy of x: any shape and dtype."""
    out: Tensor = torch.ops.fp8kernels.copy(x)
    return out


def _copy(x: Tensor) -> Tensor:
    out: Tensor = choose("copy", x).run(x)
    return out


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


register("copy(Tensor x) -> Tensor", _copy, _fake)
