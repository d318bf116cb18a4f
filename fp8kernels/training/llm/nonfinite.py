"""A loss or gradient that is not finite: noticed before the optimizer steps, and traced to where it began."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...nn.dtensor import local

MOST = 3  # names in a message; what follows them is their echo


class NonFiniteError(RuntimeError):
    """Training cannot go on: a number is not finite. The weights are those before this step."""

    def __init__(self, step: int, what: str, where: str) -> None:
        super().__init__(f"step {step}: {what} is not finite; {where}")
        self.step = step


def gradients_are_finite(model: nn.Module) -> bool:
    """Whether all gradients of this process are finite; one transfer from the device."""
    norms = torch._foreach_norm([local(p.grad) for p in model.parameters() if p.grad is not None])
    return bool(torch.stack([norm.float() for norm in norms]).isfinite().all()) if norms else True


def nonfinite_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters that hold a number which is not finite."""
    return [name for name, p in model.named_parameters() if not bool(local(p).isfinite().all())]


def trace(model: nn.Module, batches: list[dict[str, Any]]) -> str:
    """Where the first numbers that are not finite come from, in words; computes the step's batches again.

    The order is that of a forward and a backward: weights, then outputs of layers, then gradients.
    """
    weights = nonfinite_parameters(model)
    if weights:
        return f"the weights of {_some(weights)} are not finite before the step"
    with torch.enable_grad():
        for number, batch in enumerate(batches):
            bad: list[str] = []
            model.zero_grad(set_to_none=True)
            with _watched(model, bad):
                loss = model(**batch).loss
            if bad:
                return f"micro-batch {number}: the first outputs that are not finite are those of {_some(bad)}"
            if not bool(loss.isfinite()):
                return f"micro-batch {number}: all layers are finite, their loss is not"
            loss.backward()
            names = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
            if names:  # a backward goes from the last layer to the first
                return (
                    f"micro-batch {number}: the first gradients that are not finite are those of {_some(names[::-1])}"
                )
    return "it does not come back when the step is computed again"


@contextlib.contextmanager
def _watched(model: nn.Module, bad: list[str]) -> Iterator[None]:
    """Note the modules without children whose output is not finite, in the order of the forward."""

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not _finite(tensor):
                bad.append(name)

        return look

    leaves = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    handles: list[RemovableHandle] = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(x: Tensor) -> bool:
    return bool(local(x).isfinite().all())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more
