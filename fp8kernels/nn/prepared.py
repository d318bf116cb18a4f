"""What a commit needs of a list of layers, collected once: 500 layers have 2,500 tensors, and asking each costs."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.commit import ScaleRule
from ..ops.commit import prepare
from ..scaling.delayed import INPUT
from . import state
from .dtensor import is_dtensor
from .fallback import fallbacks
from .producer import pairs
from .state import ScaledLayer

PREPARED, SHARES = "fp8_prepared", "fp8_shares"  # attributes of the first layer of a list; copies are without them


class Prepared:
    """The tensors of a list of layers, and the calls that commit them; good until a tensor is replaced."""

    def __init__(self, found: list[ScaledLayer]) -> None:
        for layer in found:
            layer.fp8_keep_plain()
        self.layers = found
        self.generation = state.generation
        self.pending = [layer.fp8_pending for layer in found]
        self.history = [layer.fp8_history for layer in found]
        self.address = self.pending[0].data_ptr()
        self.commits: list[Callable[[], None]] = [
            prepare([layer.fp8_state() for layer in members], rule, [layer.fp8_step for layer in members])
            for rule, members in _by_rule(found).items()
        ]
        self.holding = _holds(found)
        self.readers = pairs(found)
        self.sharing = _views(self.readers)
        self.fallbacks = fallbacks(found)
        places = {id(layer): index for index, layer in enumerate(found)}
        self.fractions = {
            places[id(layer)]: row for f in self.fallbacks for layer, row in zip(f.layers, f.fractions, strict=True)
        }
        self.keeps = [not any(map(is_dtensor, layer.parameters(recurse=False))) for layer in found]

    def holds(self, found: list[ScaledLayer]) -> bool:
        """Whether these are the layers, and their tensors are where they were."""
        return (
            self.generation == state.generation
            and len(self.layers) == len(found)
            and all(map(is_, self.layers, found))
            and all(map(is_, self.pending, [layer._buffers["fp8_pending"] for layer in found]))
            and all(map(is_, self.history, [layer._buffers["fp8_history"] for layer in found]))
            and self.pending[0].data_ptr() == self.address
            and self.readers == pairs(found)
        )

    def share(self) -> None:
        """Readers of codes that were made for another layer take what that one noted of their common input."""
        if not self.readers:
            return
        training = [first.training and other.training for other, first in self.readers]
        views = (
            self.sharing
            if all(training)
            else _views([p for p, both in zip(self.readers, training, strict=True) if both])
        )
        if views[0]:
            torch._foreach_maximum_(views[0], views[1])
            torch._foreach_copy_(views[2], views[3])

    def reduce(self, owner: nn.Module | None, group: Any) -> None:
        """MAX over the ranks that hold the same layers: one collective of one flat tensor for each such group."""
        for fallback in self.fallbacks:
            fallback.count()
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1):
            return
        for share in self._shares(owner, group):
            rows = [self.pending[index] for index in share.indices]
            rows += [self.fractions[index] for index in share.indices if index in self.fractions]
            flat = torch.cat(rows)
            distributed.all_reduce(flat, distributed.ReduceOp.MAX, group=share.group)
            torch._foreach_copy_(rows, list(flat.split(rows[0].numel())))

    def _shares(self, owner: nn.Module | None, group: Any) -> Any:
        """Found out once for a list of layers: ranks meet for it, and must not do so alone."""
        from .ranks import shares  # needs a torch that was built with torch.distributed

        asked = (torch.distributed.group.WORLD, group, [layer.fp8_name for layer in self.layers])
        known = self.layers[0].__dict__.get(SHARES)
        if known is None or known[0] != asked:
            agreed = shares(self.layers, owner, group)
            if agreed is None:
                return []
            known = asked, agreed
            self.layers[0].__dict__[SHARES] = known
        return known[1]

    def run(self) -> None:
        """Pending enters the histories, histories become scales; kept weight codes go; warm-up may end."""
        for fallback in self.fallbacks:
            fallback.decide()
        before = [hold.before() for hold in self.holding]
        for commit in self.commits:
            commit()
        for hold, scale in zip(self.holding, before, strict=True):
            hold.after(scale)
        for layer, keeps in zip(self.layers, self.keeps, strict=True):
            layer.fp8_kept.drop(allowed=keeps)
            if not layer.fp8_warm:
                layer.fp8_sync_step()


class Hold:
    """Layers of one device whose scales are made every `interval` steps: in between those of before the commit stay.

    Decided on the device, by each layer's own count of steps, which is saved: a run that resumes goes on in step.
    """

    def __init__(self, layers: list[ScaledLayer]) -> None:
        self.scale, self.step = [layer.fp8_scale for layer in layers], [layer.fp8_step for layer in layers]
        self.interval = torch.tensor([layer.fp8_recipe.interval for layer in layers], device=self.step[0].device)  # [L]

    def before(self) -> Tensor:
        """fp32 [L, 3], the scales in use."""
        return torch.stack(self.scale)

    def after(self, old: Tensor) -> None:
        """Put back what is not due: steps 1, 1 + interval, … make scales, and so does any step that finds none (0)."""
        due = (torch.stack(self.step) - 1) % self.interval == 0  # [L]
        made = torch.where(due[:, None] | (old == 0), self.before(), old)
        torch._foreach_copy_(self.scale, list(made))


def prepared(found: list[ScaledLayer]) -> Prepared:
    """What was prepared for these layers, or is now."""
    known = found[0].__dict__.get(PREPARED)
    if known is None or not known.holds(found):
        known = Prepared(found)
        found[0].__dict__[PREPARED] = known
    return known


def go_on(found: list[ScaledLayer]) -> None:
    """Let layers that were loaded between two steps keep codes as after the last commit: counts go on to the bit."""
    if found:
        ready = prepared(found)
        for layer, keeps in zip(ready.layers, ready.keeps, strict=True):
            layer.fp8_kept.drop(allowed=keeps)


def _holds(found: list[ScaledLayer]) -> list[Hold]:
    members: dict[torch.device, list[ScaledLayer]] = {}
    for layer in found:
        if layer.fp8_recipe.interval > 1:
            members.setdefault(layer.fp8_scale.device, []).append(layer)
    return [Hold(layers) for layers in members.values()]


def _by_rule(found: list[ScaledLayer]) -> dict[ScaleRule, list[ScaledLayer]]:
    """Layers that one fused update can serve; margin is part of each layer's target."""
    groups: dict[ScaleRule, list[ScaledLayer]] = {}
    for layer in found:
        recipe = layer.fp8_recipe
        rule = ScaleRule(recipe.algorithm, 0, recipe.power_of_two, recipe.decay)
        groups.setdefault(rule, []).append(layer)
    return groups


def _views(readers: list[tuple[ScaledLayer, ScaledLayer]]) -> tuple[list[Tensor], ...]:
    """What the readers noted of their input, and what the first readers did: pending, pending, counters, counters."""
    others, firsts = [other for other, _ in readers], [first for _, first in readers]
    return (
        *([layer.fp8_pending[INPUT] for layer in side] for side in (others, firsts)),
        *([layer.fp8_counters[INPUT] for layer in side] for side in (others, firsts)),
    )
