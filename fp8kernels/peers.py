"""Recipes of other libraries, read by their fields: TransformerEngine's recipes, torchao's Float8LinearConfig.

Neither library is imported. What has no counterpart here is refused or warned of by the name of its field.

source  transformer_engine 2.20, common/recipe/__init__.py; torchao 0.18, float8/config.py
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .recipe import HEADS, Recipe, Role

HYBRID = ("e4m3", "e5m2")  # TransformerEngine's name for: forward, backward


class PeerWarning(UserWarning):
    """A field of another library's recipe has no effect here."""


def from_peer(peer: object) -> Recipe:
    """The recipe that says the same as another library's object.

    DelayedScaling        window, algorithm, margin, formats, and interval where it has one; its scales encode, ours
                          decode, and they are the same
    Float8CurrentScaling  scales from the tensor itself
    Float8BlockScaling    x and gradients 1x128, weights 128x128
    Float8LinearConfig    tensorwise and rowwise scaling, of gradients too

    raises   ValueError where what is asked for has no counterpart, or this is no recipe
    """
    name = type(peer).__name__
    if name in REFUSED:
        raise ValueError(f"a recipe cannot be read from {name}: {REFUSED[name]}")
    if name not in READERS:
        raise ValueError(
            f"a recipe is a name, a Recipe, or TransformerEngine's or torchao's {', '.join(READERS)}; this is {peer!r}"
        )
    return READERS[name](peer)


def delayed_scaling(peer: Any) -> Recipe:
    """TransformerEngine's DelayedScaling."""
    if getattr(peer, "scaling_factor_compute_algo", None) is not None:
        raise ValueError(
            "DelayedScaling.scaling_factor_compute_algo: scales follow from amax here; give algorithm= a function of "
            "the history instead"
        )
    _attention(peer)
    if not getattr(peer, "reduce_amax", True):
        _ignored("DelayedScaling.reduce_amax=False", "ranks that hold the same layer share its scales")
    algorithm = peer.amax_compute_algo
    forward, backward = _formats(peer)
    return Recipe(
        "te-delayed",
        Role(forward),
        Role(forward),
        Role(backward),
        algorithm=_by_slot(algorithm) if callable(algorithm) else algorithm,
        window=peer.amax_history_len,
        margin=peer.margin,
        interval=max(1, getattr(peer, "interval", 1)),  # of versions before 2; -1 stood for "every step"
        overrides=HEADS,
    )


def current_scaling(peer: Any) -> Recipe:
    """TransformerEngine's Float8CurrentScaling."""
    _attention(peer)
    forward, backward = _formats(peer)
    return Recipe(
        "te-current",
        Role(forward, "current"),
        Role(forward, "current"),
        _gradient(peer, Role(backward, "current")),
        power_of_two=bool(getattr(peer, "use_power_2_scales", False)),
        overrides=HEADS,
    )


def block_scaling(peer: Any) -> Recipe:
    """TransformerEngine's Float8BlockScaling."""
    dims = tuple(getattr(peer, f"{what}_block_scaling_dim", usual) for what, usual in (("x", 1), ("w", 2), ("grad", 1)))
    if dims != (1, 2, 1):
        raise ValueError(f"Float8BlockScaling with blocks of {dims} dimensions for x, w, grad: known are (1, 2, 1)")
    forward, backward = _formats(peer)
    return Recipe(
        "te-block",
        Role(forward, "current", "1x128"),
        Role(forward, "current", "128x128"),
        _gradient(peer, Role(backward, "current", "1x128")),
        power_of_two=bool(getattr(getattr(peer, "fp8_quant_fwd_inp", None), "power_2_scale", True)),
        overrides=HEADS,
    )


def float8_linear_config(peer: Any) -> Recipe:
    """torchao's Float8LinearConfig; its scales are rounded down as reciprocals, which is up for those that decode."""
    for field in ("input_for_grad_weight", "weight_for_grad_input", "grad_output_for_grad_weight"):
        other, one = getattr(peer, f"cast_config_{field}"), getattr(peer, f"cast_config_{field.partition('_for_')[0]}")
        if other is not None and _cast(other) != _cast(one):
            _ignored(f"Float8LinearConfig.cast_config_{field}", "the codes of a tensor serve all its products")
    if getattr(peer, "enable_fsdp_float8_all_gather", False):
        _ignored("Float8LinearConfig.enable_fsdp_float8_all_gather", "call fp8kernels.all_gather_codes(model)")
    given, weight, grad = (_cast(getattr(peer, f"cast_config_{role}")) for role in ("input", "weight", "grad_output"))
    if given is None or weight is None:
        raise ValueError("Float8LinearConfig leaves the input or the weight in high precision: then nothing is 8-bit")
    return Recipe(
        "torchao-float8",
        Role(given[0] or "e4m3", "current", given[1]),
        Role(weight[0] or "e4m3", "current", weight[1]),
        None if grad is None else Role(grad[0] or "e5m2", "current", grad[1]),
        power_of_two=bool(peer.round_scales_to_power_of_2),
        overrides=HEADS,
    )


READERS: dict[str, Callable[[Any], Recipe]] = {
    "DelayedScaling": delayed_scaling,
    "Float8CurrentScaling": current_scaling,
    "Float8BlockScaling": block_scaling,
    "Float8LinearConfig": float8_linear_config,
}
MX = "scales per 32 elements or fewer are not implemented; Float8BlockScaling has 128"
REFUSED = {
    "MXFP8BlockScaling": MX,
    "NVFP4BlockScaling": "4-bit floats are not implemented",
    "CustomRecipe": "its quantizers are functions of TransformerEngine; write a Recipe of Roles",
}


def _formats(peer: Any) -> tuple[str, str]:
    """The formats of forward and backward, from TransformerEngine's Format."""
    name = str(getattr(peer.fp8_format, "name", peer.fp8_format)).rpartition(".")[2]
    if name not in ("HYBRID", "E4M3"):
        raise ValueError(f"fp8_format={peer.fp8_format}: known are Format.HYBRID and Format.E4M3")
    return HYBRID if name == "HYBRID" else ("e4m3", "e4m3")


def _attention(peer: Any) -> None:
    for field in ("fp8_dpa", "fp8_mha"):
        if getattr(peer, field, False):
            _ignored(f"{type(peer).__name__}.{field}", "attention stays in high precision")


def _gradient(peer: Any, role: Role) -> Role | None:
    """backward_override: None takes 8-bit gradients, "dequantized" the codes of the forward and gradients in BF16."""
    override = getattr(peer, "backward_override", None)
    if override == "high_precision":
        _ignored('backward_override="high_precision"', "the backward multiplies the decoded codes, as dequantized does")
    return role if override is None else None


def _by_slot(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """TransformerEngine's histories are [window, T]: the newest amax, behind it the others, oldest first.

    source  transformer_engine/pytorch/quantization.py, _update_amax_history: slot 0 rolls to the end
    """

    def amax(history: Tensor) -> Tensor:
        return function(torch.cat([history[:, :1], history[:, 1:].flip(1)], dim=1).t())

    amax.__qualname__ = getattr(function, "__qualname__", "amax_compute_algo")
    return amax


def _cast(config: Any) -> tuple[str | None, str] | None:
    """Format and block of torchao's CastConfig, None where it is disabled."""
    scaling, granularity = (getattr(x, "name", str(x)) for x in (config.scaling_type, config.scaling_granularity))
    if scaling == "DISABLED":
        return None
    blocks = {"TENSORWISE": "tensor", "AXISWISE": "row"}
    if scaling != "DYNAMIC" or granularity not in blocks:
        raise ValueError(f"CastConfig({scaling}, {granularity}): known are DYNAMIC with {' and '.join(blocks)}")
    dtype = config.target_dtype
    names = {"torch.float8_e4m3fn": "e4m3", "torch.float8_e5m2": "e5m2"}
    if dtype is not None and str(dtype) not in names:
        raise ValueError(f"CastConfig.target_dtype={dtype}: known are {', '.join(names)}")
    return None if dtype is None else names[str(dtype)], blocks[granularity]


def _ignored(field: str, instead: str) -> None:
    warnings.warn(f"{field} is not carried over: {instead}", PeerWarning, stacklevel=4)
