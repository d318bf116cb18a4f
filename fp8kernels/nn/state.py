"""What every 8-bit layer shares: its recipe, its scaling state, and how a tensor of a role is quantized."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import get_format
from ..kernels.commit import State
from ..recipe import Recipe, Role
from ..scaling.block import get_block
from ..scaling.delayed import INPUT, PREFIX, ROLES, WEIGHT, new_state


class Family:
    """What the layers of one model have in common; a deep copy of the model is a family of its own."""


copies: weakref.WeakSet[ScaledLayer] = weakref.WeakSet()  # layers that came to be by deepcopy or unpickling


class ScaledLayer(nn.Module):
    """Mixin for layers with 8-bit tensors. The state is plain buffers named `fp8_*`; see scaling/delayed.py."""

    fp8_recipe: Recipe
    fp8_name: str
    fp8_family: Family
    fp8_warm: bool  # whether the recipe's warm-up steps are over
    fp8_history: Tensor
    fp8_pending: Tensor
    fp8_scale: Tensor
    fp8_counters: Tensor
    fp8_step: Tensor
    fp8_target: Tensor  # fp32 [3], where the amax of each role lands; follows from the recipe, not saved

    def attach(self, recipe: Recipe, name: str = "", family: Family | None = None) -> None:
        """Give the layer a recipe and an empty state, on the device of its weight."""
        self.fp8_family = family or Family()
        device = next(self.parameters()).device
        self.fp8_recipe, self.fp8_name = recipe, name
        self.fp8_warm = recipe.warmup_steps == 0
        for key, value in new_state(recipe.window, device).items():
            self.register_buffer(key, value)
        targets = [recipe.target(index) for index in range(len(ROLES))]
        self.register_buffer("fp8_target", torch.tensor(targets, device=device), persistent=False)

    def detach_state(self) -> None:
        """Take recipe and state away again."""
        for key in [key for key in self._buffers if key.startswith(PREFIX)]:
            del self._buffers[key]
            self._non_persistent_buffers_set.discard(key)
        for key in ("fp8_recipe", "fp8_name", "fp8_warm", "fp8_family"):
            self.__dict__.pop(key, None)

    def fp8_state(self) -> State:
        """The tensors that a commit updates."""
        return State(self.fp8_history, self.fp8_pending, self.fp8_scale, self.fp8_target)

    def fp8_hold_static(self) -> None:
        """Static scales do not move: what was seen of their tensors does not reach the history."""
        for index, role in enumerate(self.fp8_recipe.roles()):
            if role is not None and role.scaling == "static":
                self.fp8_pending[index].zero_()

    def fp8_sync_step(self) -> None:
        """Read from the state whether warm-up is over."""
        self.fp8_warm = self.fp8_recipe.warmup_steps == 0 or int(self.fp8_step) >= self.fp8_recipe.warmup_steps

    def fp8_quantize(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Codes and scales of the input or the weight, by the recipe; what was seen is noted in training mode."""
        recipe = self.fp8_recipe
        return quantize_role(
            x.detach(),
            (recipe.input, recipe.weight)[index],
            recipe.target(index),
            recipe.power_of_two,
            self.fp8_scale[index : index + 1],
            (self.fp8_pending[index : index + 1], self.fp8_counters[index]) if self.training else None,
        )

    def fp8_watch(self, x: Tensor, w: Tensor) -> None:
        """Warm-up: note what is seen, so that histories fill, and compute nothing with it."""
        if self.training:
            self.fp8_quantize(x, INPUT)
            self.fp8_quantize(w, WEIGHT)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.to()`, `.half()`, `.cuda()`: the state moves between devices and keeps its dtypes."""
        before = {key: value for key, value in self._buffers.items() if key.startswith(PREFIX)}
        super()._apply(fn, recurse)
        keep_dtypes(self, before)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        """A checkpoint of the unconverted model loads too: missing state is no missing key."""
        own: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, own, *rest)
        missing_keys.extend(key for key in own if not key[len(prefix) :].startswith(PREFIX))
        if self.fp8_step.device.type != "meta":
            self.fp8_sync_step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        copies.add(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fp8={self.fp8_recipe.name!r}"


def keep_dtypes(module: nn.Module, before: dict[str, Tensor | None]) -> None:
    """After `_apply`: the buffers keep the dtypes and values that they had before, on the device they are on now."""
    for key, value in before.items():
        after = module._buffers[key]
        if value is not None and after is not None and after.dtype != value.dtype:
            module._buffers[key] = value.to(after.device)


def quantize_role(
    x: Tensor,
    role: Role,
    target: float,
    power_of_two: bool,
    scale: Tensor,
    observer: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Codes uint8 of x's shape, and the scales [R, C] that decode them.

    scale     fp32 [1], the delayed or static scale; 0 takes x's own amax
    observer  (pending fp32 [1], counters int64 [4]) to note x in, or None
    """
    fmt, block = get_format(role.fmt), get_block(role.block)
    if role.scaling == "current":
        rows = x.numel() // x.shape[-1] if x.numel() else 0
        given = torch.zeros(block.grid(rows, x.shape[-1]), device=x.device)
    else:
        given = scale.reshape(1, 1)
    if observer is None:
        codes, _, used, _, _ = torch.ops.fp8kernels.quantize(
            x, given, fmt.name, block.name, target, 0, power_of_two, True, False
        )
    else:
        codes, used = torch.ops.fp8kernels.quantize_observed(
            x, given, *observer, fmt.name, block.name, target, 0, power_of_two, True
        )
    return codes, used
