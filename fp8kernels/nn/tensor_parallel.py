"""Tensor parallel: a layer whose weight and input are DTensors multiplies its own shards.

    x             w           out                    what the backward sends on
    Replicate     Shard(0)    Shard(last)            x.grad Partial                         colwise
    Shard(last)   Shard(1)    Partial, bias once     nothing: the gradient comes Replicate  rowwise
    Shard(other)  Replicate   as x                   w.grad, bias.grad Partial              sequence, batch
    Replicate     Replicate   Replicate              nothing

for each dimension of the mesh. Collectives are DTensor's own, made when a result is redistributed. A delayed scale is
one number for the whole tensor, as commits reduce over all ranks, so each shard is rounded to the codes that it would
have in a single process. Where a scale is made of the tensor itself (no history yet, or scaling="current" with
block="tensor"), the amax of the whole tensor is reduced over the mesh first. Blocks smaller than the tensor are a
shard's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..recipe import Recipe
from ..scaling.delayed import GRAD, INPUT, ROLES, WEIGHT
from ..scaling.rules import scale_from_amax
from . import state
from .dtensor import is_dtensor
from .gathered import GatheredWeight
from .state import ScaledLayer

Run = Callable[[ScaledLayer, Tensor, Tensor, "Tensor | None"], Tensor]


class Split(NamedTuple):
    """Placements along one dimension of the mesh: of the result, and of the gradients of what went in."""

    out: Any
    x_grad: Any
    w_grad: Any
    bias: Any  # that the bias must have
    bias_grad: Any


def over_shards(run: Run, layer: ScaledLayer, x: Any, weight: Any, bias: Any) -> Tensor:
    """`run` (scaled_linear) on this rank's shards.

    x        DTensor [..., K] on the mesh of the weight
    weight   DTensor [N, K]
    bias     DTensor [N] or None
    returns  DTensor [..., N], of the placements in the table above
    raises   TypeError where some are DTensors and some are not; ValueError for other placements or different meshes
    """
    from torch.distributed.tensor import DTensor

    layer.fp8_keep_plain()
    splits = _splits(layer, x, weight, bias)
    mesh = weight.device_mesh
    x_local = x.to_local(grad_placements=[s.x_grad for s in splits])
    w_local = weight.to_local(grad_placements=[s.w_grad for s in splits])
    b_local = None
    if bias is not None:
        b_local = bias.to_local(grad_placements=[s.bias_grad for s in splits])
        if any(s.out.is_partial() and mesh.get_local_rank(d) > 0 for d, s in enumerate(splits)):
            b_local = _Elsewhere.apply(b_local)
    groups = [mesh.get_group(d) for d in range(mesh.ndim) if mesh.size(d) > 1]
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    spread = [any(p.is_shard() for p in t.placements) for t in (x, weight)]
    spread[WEIGHT] &= not isinstance(w_local, GatheredWeight)  # codes that were made with the whole tensor's scale
    spread.append(needs_grad and any(s.out.is_shard() for s in splits))
    lacking = own_scaled(layer, [index for index in range(len(ROLES)) if spread[index] and groups])
    if not lacking:
        out = run(layer, x_local, w_local, b_local)
    else:
        known = [t.detach() for index, t in ((INPUT, x_local), (WEIGHT, w_local)) if index in lacking]
        roles = [index for index in (INPUT, WEIGHT) if index in lacking]
        scale = own_scales(layer)
        if known:
            fill(layer, scale, roles, whole_amax(known, groups))
        out = run(with_scale(layer, scale, lacking), x_local, w_local, b_local)
        if GRAD in lacking:
            out = _WholeGradient.apply(out, layer, scale, groups)
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    placements = [s.out for s in splits]
    stride = torch.empty(shape, device="meta").stride()
    spread_out: Tensor = DTensor.from_local(out, mesh, placements, run_check=False, shape=shape, stride=stride)
    return spread_out


def _splits(layer: ScaledLayer, x: Any, weight: Any, bias: Any) -> list[Split]:
    given = {"input": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    plain = [name for name, t in given.items() if not is_dtensor(t)]
    if plain:
        raise TypeError(
            f"layer {layer.fp8_name!r}: {', '.join(plain)} is no DTensor and the rest is: parallelize the layer with "
            f"torch.distributed.tensor.parallel.parallelize_module, which makes DTensors of its inputs too, or call "
            f"DTensor.from_local(x, mesh, placements)"
        )
    if any(t.device_mesh != weight.device_mesh for t in given.values()):
        meshes = ", ".join(f"{name} {t.device_mesh}" for name, t in given.items())
        raise ValueError(f"layer {layer.fp8_name!r}: the tensors lie on different meshes: {meshes}")
    placed = [t.placements for t in given.values()]
    splits = [_split(x.ndim, *along) for along in zip(*placed, strict=True)]
    if any(s is None for s in splits):
        said = ", ".join(f"{name} {tuple(t.placements)}" for name, t in given.items())
        raise ValueError(
            f"layer {layer.fp8_name!r}: {said} do not multiply shard by shard. The input must be Replicate for a "
            f"weight that is Shard(0), Shard({x.ndim - 1}) for Shard(1), and Replicate or Shard of another dimension "
            f"for Replicate; a bias goes with Shard(0) as Shard(0), else as Replicate. Redistribute the input with "
            f"x.redistribute(placements=…), or name its layout to ColwiseParallel or RowwiseParallel(input_layouts=…)"
        )
    return [s for s in splits if s is not None]


def _split(ndim: int, x: Any, w: Any, bias: Any = None) -> Split | None:
    """The row of the table above for one dimension of the mesh, or None."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = ndim - 1
    if x.is_replicate() and w.is_shard(0):
        split = Split(Shard(last), Partial(), w, Shard(0), Shard(0))
    elif x.is_shard(last) and w.is_shard(1):
        split = Split(Partial(), x, w, Replicate(), Replicate())
    elif x.is_shard() and not x.is_shard(last) and w.is_replicate():
        split = Split(x, x, Partial(), Replicate(), Partial())
    elif x.is_replicate() and w.is_replicate():
        split = Split(Replicate(), Replicate(), Replicate(), Replicate(), Replicate())
    else:
        return None
    return split if bias is None or bias == split.bias else None


def own_scaled(layer: ScaledLayer, roles: Sequence[int]) -> list[int]:
    """Those of the roles whose scale is one number, made of the tensor itself.

    Whether a history has made a scale is known on the device; it is read until it has, and then kept. A trace or a
    captured graph cannot read and asks the next commit; until then it may reduce once more than needed, which changes
    nothing.
    """
    recipe = layer.fp8_recipe
    whole = [(index, role) for index in roles if (role := recipe.roles()[index]) is not None and role.block == "tensor"]
    has = _has_scales(layer)
    if any(role.scaling != "current" and not has[index] for index, role in whole):
        if torch.compiler.is_compiling() or (layer.fp8_scale.is_cuda and torch.cuda.is_current_stream_capturing()):
            layer.fp8_asks = True  # type: ignore[assignment]
        else:
            has = _read([layer])[0]
    return [index for index, role in whole if role.scaling == "current" or not has[index]]


def _has_scales(layer: ScaledLayer) -> tuple[bool, ...]:
    """Of which roles a scale was seen, since the layer's state was last replaced."""
    generation, has = layer.fp8_scaled
    return has if generation == state.generation else (False,) * len(ROLES)


def _read(found: Sequence[ScaledLayer]) -> list[tuple[bool, ...]]:
    has = [tuple(row) for row in (torch.stack([layer.fp8_scale for layer in found]) > 0).tolist()]
    for layer, scales in zip(found, has, strict=True):
        layer.fp8_scaled = state.generation, scales
    return has


def answer(found: list[ScaledLayer]) -> None:
    """After a commit: read the scales of the layers that asked."""
    asking = [layer for layer in found if layer.__dict__.pop("fp8_asks", False)]
    if asking:
        _read(asking)


def own_scales(layer: ScaledLayer) -> Tensor:
    """The scales of a layer, a copy [3]; 0 where a tensor is to take the scale of its own amax."""
    scale = layer.fp8_scale.clone()
    for index, role in enumerate(layer.fp8_recipe.roles()):
        if role is not None and role.scaling == "current":
            scale[index] = 0.0
    return scale


def with_scale(layer: ScaledLayer, scale: Tensor, own: Sequence[int]) -> ScaledLayer:
    """The layer for one call, with these scales in place of its own: the same buffers, parameters and flags.

    own  roles whose scale is made of the tensor itself, which cuts nothing
    """
    stand_in = object.__new__(type(layer))
    stand_in.__dict__.update(layer.__dict__)
    stand_in.__dict__["_buffers"] = layer._buffers | {"fp8_scale": scale}
    stand_in.__dict__["fp8_recipe"] = _given(layer.fp8_recipe, tuple(own))
    return stand_in


@functools.lru_cache(maxsize=64)
def _given(recipe: Recipe, own: tuple[int, ...]) -> Recipe:
    """The recipe with scales given from outside where it makes one of the whole tensor."""

    def give(index: int, role: Any) -> Any:
        if role is None or role.block != "tensor":
            return role
        return replace(role, scaling="static", clamp=role.clamp and index not in own)

    roles = [give(index, role) for index, role in enumerate(recipe.roles())]
    return replace(recipe, input=roles[INPUT], weight=roles[WEIGHT], grad=roles[GRAD])


def fill(layer: ScaledLayer, scale: Tensor, roles: Sequence[int], amax: Tensor) -> None:
    """Where a scale [3] is 0, take that of the amax [len(roles)] of the whole tensor; in place."""
    recipe = layer.fp8_recipe
    for index, seen in zip(roles, amax, strict=True):
        own = scale_from_amax(seen, recipe.target(index), power_of_two=recipe.power_of_two)
        scale[index] = torch.where(scale[index] == 0, own, scale[index])


def whole_amax(shards: Sequence[Tensor], groups: Sequence[Any]) -> Tensor:
    """fp32 [len(shards)]: the largest finite magnitudes of tensors over all their shards, one collective a group."""
    amax = torch.stack([finite_amax(x) for x in shards])
    for group in groups:
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=group)
    return amax


def finite_amax(x: Tensor) -> Tensor:
    """fp32 []: what `quantize` makes a scale of; 0 for a shard without elements."""
    if not x.numel():
        return torch.zeros((), dtype=torch.float32, device=x.device)
    magnitude = x.abs()
    return torch.where(magnitude.isfinite(), magnitude, 0.0).amax().float()


class _WholeGradient(torch.autograd.Function):
    """Between a layer and its result: the scale of the whole output gradient, before the backward rounds a shard."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, layer: ScaledLayer, scale: Tensor, groups: Sequence[Any]) -> Tensor:
        ctx.how = (layer, scale, groups)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        layer, scale, groups = ctx.how
        fill(layer, scale, [GRAD], whole_amax([grad], groups))
        return grad, None, None, None


class _Elsewhere(torch.autograd.Function):
    """The bias on ranks whose partial sum it is not part of: another rank adds it, all compute its gradient."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor) -> Tensor:
        return torch.zeros_like(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
