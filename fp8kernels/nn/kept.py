"""Weight codes that are kept between the forwards of one optimizer step, and the warning where no commit ends a step.

A scale stands still from one commit to the next, and so does a weight, so micro-batches and recomputed forwards
multiply the same codes: they are made once. Whatever could change a weight behind our back turns this off rather than
being guessed at; then the codes are made again, and are the same.
"""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

if TYPE_CHECKING:
    from .state import Coded

PLAIN = (Tensor, nn.Parameter)  # not DTensor or another subclass: what those hold depends on who asks
UNSEEN_STEPS = 2  # changes of a weight without a commit; then the user is told


class MissingCommitWarning(UserWarning):
    """Weights change and nothing commits: histories do not grow and scales stay where they are."""


class Mark(NamedTuple):
    """What a weight was when its codes were made."""

    address: int
    version: int
    shape: torch.Size
    dtype: torch.dtype

    @staticmethod
    def of(weight: Tensor) -> Mark:
        return Mark(weight.data_ptr(), weight._version, weight.shape, weight.dtype)


class Kept:
    """The codes of one layer's weight, and how often it changed since the last commit."""

    def __init__(self) -> None:
        self.allowed = False  # by commits: without one there is nothing that would drop the codes
        self.mark: Mark | None = None
        self.coded: Coded | None = None
        self.version: int | None = None
        self.changes = 0

    def find(self, weight: Tensor, *, transpose: bool) -> Coded | None:
        """The codes that were made of this weight since the last commit, or None."""
        if self.coded is None or self.mark != Mark.of(weight) or (transpose and self.coded.codes_t is None):
            return None
        # a gradient that is there says that this is not the first forward of a step, before which an optimizer may have
        # written past the version counter (p.data), nor a frozen weight, into which adapters are merged in that way
        return self.coded if weight.grad is not None else None

    def keep(self, weight: Tensor, coded: Coded) -> None:
        """Keep the codes until the next commit."""
        if self.allowed:
            self.mark, self.coded = Mark.of(weight), coded

    def drop(self, *, allowed: bool) -> None:
        """A commit: scales have moved, and a weight was updated."""
        self.mark = self.coded = self.version = None
        self.changes, self.allowed = 0, allowed

    def watch(self, weight: Tensor, name: str) -> None:
        """Count the changes of a weight since the last commit, and warn at the second."""
        version = weight._version
        if self.version is not None and version != self.version and not stepping:
            self.changes += 1
            if self.changes == UNSEEN_STEPS:
                _warn(name)
        self.version = version


stepping: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # optimizers within step(), whose closure may run forwards
_warned = False


def _warn(name: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"the weight of {name!r} changed {UNSEEN_STEPS} times and nothing was committed: delayed scales stay where "
            f"they are. A torch.optim.Optimizer that holds the model's parameters commits by itself; after the step of "
            f"any other one call fp8kernels.commit(model)",
            MissingCommitWarning,
            stacklevel=2,
        )


def may_keep(weight: Tensor) -> bool:
    """Whether the codes of this tensor could be found again: a plain leaf, outside of traces and captured graphs."""
    if type(weight) not in PLAIN or not weight.is_leaf or torch.compiler.is_compiling():
        return False
    if torch.is_inference_mode_enabled():  # what is made there cannot be kept for a backward
        return False
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
