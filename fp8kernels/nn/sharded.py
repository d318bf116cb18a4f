"""Weights that FSDP2 gathers as 8-bit codes: one byte an element on the wire in place of two or four.

    sharded      fp32 or bf16, as ever: optimizer, gradients, clipping, state_dict see an ordinary shard
    all-gather   each rank rounds its shard with the layer's scale and sends the codes      (fsdp_pre_all_gather)
    unsharded    a GatheredWeight of all codes, which the layer multiplies as they are      (fsdp_post_all_gather)

The delayed scale is the same on every rank, so the codes are those that the layer would make of the gathered weight.
The amax of a shard is noted in the layer's state, and the commit's MAX over the ranks makes it the weight's. Where a
scale is made of the tensor itself (no history yet, or scaling="current"), one collective gives the amax of all layers.

source   the extension points of FSDP2: torch.distributed.fsdp, `fsdp_pre_all_gather` and `fsdp_post_all_gather`;
         torchao's float8 calls the same option enable_fsdp_float8_all_gather
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..scaling.delayed import WEIGHT
from .dtensor import is_dtensor
from .gathered import GatheredWeight
from .linear import Linear
from .roots import layers
from .state import ScaledLayer
from .tensor_parallel import fill, own_scaled, own_scales, whole_amax, with_scale

TOGETHER = "fp8_together"  # the attribute of layers whose amax is found together

_aten = torch.ops.aten
SHARDING = {  # what FSDP makes shards of shards with; results of everything else are plain tensors
    _aten.detach.default,
    _aten.clone.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_zeros.default,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.view.default,
    _aten.as_strided.default,
    _aten._to_copy.default,
    _aten._pin_memory.default,
}


def all_gather_codes(model: nn.Module) -> nn.Module:
    """Have FSDP2 gather the weights of a converted model's linear layers as 8-bit codes; before fully_shard.

        fp8kernels.all_gather_codes(fp8kernels.convert(model))
        for block in model.layers:
            fully_shard(block)
        fully_shard(model)

    model    converted, and with tensor parallel already parallelized. Linear layers whose weight is theirs alone take
             part, all other parameters travel as before
    returns  the model. Losses, scales and weights are those of FSDP2 without this, bit for bit; counters count a rank's
             shards, once an all-gather
    raises   ValueError if the model has no such layers, is sharded already, or a recipe needs the weight in high
             precision (warm-up, straight_through="clipped", alarm policy "fallback") or more than one scale for it
             (blocks)
    """
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("all_gather_codes: the model is sharded already; call this before fully_shard")
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    found = [layer for layer in layers(model) if isinstance(layer, Linear) and owners[id(layer.weight)] == 1]
    if not found:
        raise ValueError("all_gather_codes: the model has no 8-bit linear layers; call fp8kernels.convert(model) first")
    for layer in found:
        reason = why_not(layer)
        if reason is not None:
            raise ValueError(f"all_gather_codes: layer {layer.fp8_name!r}: {reason}")
    together = Together(found)
    for layer in found:
        layer.__dict__[TOGETHER] = together
        layer.register_load_state_dict_post_hook(_wrap)
        _wrap(layer)
    return model


def _wrap(layer: Any, *_: Any) -> None:
    """Make the weight a CodeShard; again where load_state_dict(assign=True) has put another tensor in its place."""
    weight = layer.weight
    if is_dtensor(weight):
        shard = weight.detach().to_local()
        if isinstance(shard, CodeShard):
            return
        from torch.distributed.tensor import DTensor

        where: Any = (weight.device_mesh, weight.placements)
        how: Any = {"run_check": False, "shape": weight.shape, "stride": weight.stride()}
        wrapped: Tensor = DTensor.from_local(CodeShard(shard), *where, **how)
    elif isinstance(weight, CodeShard):
        return
    else:
        wrapped = CodeShard(weight.detach())
    layer.weight = nn.Parameter(wrapped, requires_grad=weight.requires_grad)


def why_not(layer: Linear) -> str | None:
    """Why a layer's weight cannot travel as codes, in words, or None."""
    recipe = layer.fp8_recipe
    if recipe.weight.block != "tensor":
        return f"its weight has a scale for each {recipe.weight.block!r} block, which would have to travel too"
    if recipe.warmup_steps:
        return f"warmup_steps={recipe.warmup_steps} computes with the weight itself; recipe.replace(warmup_steps=0)"
    if recipe.straight_through == "clipped":
        return "straight_through='clipped' compares the weight itself with its largest code; take 'plain'"
    if recipe.alarm.policy == "fallback":
        return "the alarm policy 'fallback' may call for the weight itself; take policy='warn'"
    return None


class CodeShard(torch.Tensor):
    """A parameter, or the part of it that this rank keeps, which FSDP sends to other ranks as codes.

    An ordinary tensor in all else: operations give plain tensors, and it is saved as one.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, x: Tensor) -> CodeShard:
        out: CodeShard = torch.Tensor._make_subclass(cls, x)
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        with torch._C._DisableTorchDispatch():  # a CodeShard has storage of its own: any operation takes it as it is
            out = func(*args, **(kwargs or {}))
            return tree_map_only(Tensor, CodeShard, out) if func in SHARDING else out

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        out = CodeShard(copy.deepcopy(self.plain(), memo)).requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            out._is_param = True  # type: ignore[attr-defined]
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Checkpoints and pickles hold ordinary tensors, which load without this class."""
        x = self.plain()
        return (nn.Parameter(x, self.requires_grad) if isinstance(self, nn.Parameter) else x).__reduce_ex__(protocol)

    def plain(self) -> Tensor:
        """The same storage as a tensor like any other."""
        with torch._C._DisableTorchDispatch():
            return torch.Tensor._make_subclass(torch.Tensor, self.detach())

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor], Gathered]:
        """This rank's codes, padded to the size that all ranks send, and what decodes them.

        They are made of what FSDP would send without this: the shard in the policy's param_dtype
        """
        assert isinstance(module, Linear)
        x = self.plain()
        x = x.to(mp_policy.param_dtype or x.dtype)
        layer: ScaledLayer = module
        if own_scaled(module, [WEIGHT]):
            together: Together = module.__dict__[TOGETHER]
            layer = with_scale(module, together.scales(module, x.dtype), [WEIGHT])
        coded = layer.fp8_quantize(x, WEIGHT)
        codes = coded.codes
        short = -(-outer_size[0] // mesh.size()) - x.shape[0] if x.shape[1] == outer_size[1] else 0
        if short:
            codes = nn.functional.pad(codes, (0, 0, 0, short))
        return (codes,), Gathered(coded.scale, coded.fmt)

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: Gathered,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """All codes, [N, K] with rows of padding at the end; on later calls they are in `out`'s storage already."""
        (codes,) = all_gather_outputs
        if out is not None:
            weight = out._local_tensor if is_dtensor(out) else out  # type: ignore[attr-defined]  # the object, no view
            assert isinstance(weight, GatheredWeight)
            weight.scale, weight.fmt = metadata.scale, metadata.fmt
            return None
        return GatheredWeight(codes, metadata.scale, metadata.fmt, param_dtype), (codes,)


class Gathered(NamedTuple):
    """What ranks know without being told: what decodes a layer's weight."""

    scale: Tensor
    fmt: str


class Together:
    """The layers whose weights' amax is found in one collective."""

    def __init__(self, found: list[Linear]) -> None:
        self.layers = found
        self.seen: dict[int, tuple[Any, Tensor]] = {}  # of a layer's id: its mark, its scales

    def scales(self, layer: Linear, dtype: torch.dtype) -> Tensor:
        """fp32 [3], the scales of a layer whose weight takes that of its own amax; of all ranks, which call alike.

        What was found serves one all-gather of each layer; weights do not change within a forward or a backward
        """
        known = self.seen.pop(id(layer), None)
        if known is None or known[0] != mark(layer):
            self._reduce(layer, dtype)
            known = self.seen.pop(id(layer))
        return known[1]

    def _reduce(self, asking: Linear, dtype: torch.dtype) -> None:
        mesh, placements = asking.weight.device_mesh, asking.weight.placements  # type: ignore[attr-defined]
        found, shards = [], []
        for layer in self.layers:
            weight: Any = layer.weight  # a DTensor while it is sharded, as it is on all ranks or on none
            if is_dtensor(weight) and weight.device_mesh == mesh and own_scaled(layer, [WEIGHT]):
                found.append(layer)
                shards.append(weight.to_local())
        groups = [mesh.get_group(d) for d, p in enumerate(placements) if not p.is_replicate()]
        amax = whole_amax([shard.plain().to(dtype) for shard in shards], groups)
        for layer, seen in zip(found, amax, strict=True):
            scale = own_scales(layer)
            fill(layer, scale, [WEIGHT], seen.reshape(1))
            self.seen[id(layer)] = mark(layer), scale


def mark(layer: Linear) -> tuple[int, int]:
    """Changes when a sharded weight does: writes are counted by the DTensor, not by the shard in it."""
    return id(layer.weight), layer.weight._version
