"""What export does with each layer of a model, decided before anything is written: by amaxes alone, no codes yet."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import E4M3
from ..nn import Linear, ScaledLayer
from ..nn.dtensor import local, whole
from ..scaling.delayed import INPUT, WEIGHT, is_state
from ..scaling.rules import scale_from_amax
from .formats import EDGE, Layout, get_layout
from .names import own
from .requantize import bf16_exact, decode, encode, fp16_safe, sqnr_db, weight_amax, weight_scale
from .stored import FUSED

FALLEN_BACK = "it had fallen back to high precision"
CONVERT = "call fp8kernels.convert(model), then fp8kernels.export.calibrate(model, batches) or train it"


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer on its way into a file.

    scale         fp32 on the block's grid, exact in bf16
    input_scale   fp32 (1,), exact in bf16; None where servers scale inputs by their own amax
    shared        the layers that have scales in common with it, itself among them; empty where it stands alone
    """

    name: str
    layer: Linear
    layout: Layout
    scale: Tensor
    input_scale: Tensor | None = None
    shared: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """weight float8_e4m3fn [N, K]; weight_scale fp32 (1,), [N, 1] or [ceil(N/128), ceil(K/128)]; input_scale."""
        carrier = E4M3.carrier
        assert carrier is not None
        codes = encode(whole(self.layer.weight.detach()), self.scale, self.layout.block)  # [N, K] uint8
        scale = self.scale.reshape(1) if self.layout.block == "tensor" else self.scale
        found = {"weight": codes.cpu().view(carrier), "weight_scale": scale.cpu().clone()}  # not its neighbours' tensor
        if self.input_scale is not None:
            found["input_scale"] = self.input_scale.cpu().clone()
        return found

    @torch.no_grad()
    def sqnr(self) -> tuple[float, float]:
        """SQNR of the weight in dB: as it was trained, and as it is written."""
        weight = whole(self.layer.weight.detach())
        was_training = self.layer.training
        self.layer.eval()  # so that nothing is noted
        try:
            coded = self.layer.fp8_quantize(weight, WEIGHT, exact=True)
        finally:
            self.layer.train(was_training)
        trained = decode(coded.codes, coded.scale, self.layer.fp8_recipe.weight.block, coded.fmt)
        written = decode(encode(weight, self.scale, self.layout.block), self.scale, self.layout.block)
        return sqnr_db(weight, trained), sqnr_db(weight, written)


@dataclass(frozen=True)
class Plan:
    """Everything export has decided.

    layers   8-bit in the files, in the model's order
    kept     linear layers in high precision, and why; the `ignore` of config.json
    left     other 8-bit modules (convolutions, attention) that are written in high precision, and why
    notes    what a reader of the report should know besides
    """

    layout: Layout
    layers: dict[str, LayerPlan]
    kept: dict[str, str]
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def plan_export(model: nn.Module, format: str) -> Plan:
    """Decide what becomes of each layer in a layout with E4M3 weights; reads weights, writes nothing.

    raises   ValueError naming the layer, and the way out, where nothing is converted, weights or scales are not finite,
             or a static input has no scale
    """
    layout = get_layout(format)
    check_numbers(model)
    kept: dict[str, str] = {}
    left: dict[str, str] = {}
    found: dict[str, Linear] = {}
    for name, module in model.named_modules():
        reason = _why_high(name, module, layout)
        if isinstance(module, Linear) and reason is None:
            found[name] = module
        elif isinstance(module, nn.Linear):
            kept[name] = reason or "not converted"
        elif isinstance(module, ScaledLayer):
            left[name] = reason or f"{layout.name} holds Linear layers only"
    groups = _groups([*found, *kept])
    if layout.block == "128x128":
        kept.update(_uneven(model, found, groups))
        found = {name: layer for name, layer in found.items() if name not in kept}
    for group in groups:
        high = [name for name in group if name in kept]
        if high and len(high) < len(group):
            for name in set(group) - set(high):
                found.pop(name)
                kept[name] = f"{high[0].rpartition('.')[2]} is in high precision, and servers compute them as one"
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list({**kept, **left}.items())[:5])
        raise ValueError(f"export: no layer can be {layout.name} ({reasons}); format='native' holds what is converted")
    scales = _weight_scales(found, layout)
    inputs = _input_scales(found, layout)
    shared: dict[str, tuple[str, ...]] = {}
    if layout.block == "tensor":
        for group in groups:
            members = tuple(name for name in group if name in found)
            for part in (scales, inputs):
                if members and members[0] in part:
                    largest = torch.stack([part[name] for name in members]).amax(dim=0)
                    part.update(dict.fromkeys(members, largest))
            shared.update(dict.fromkeys(members, members))
    layers = {
        name: LayerPlan(name, layer, layout, scales[name], inputs.get(name), shared.get(name, ()))
        for name, layer in found.items()
    }
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    kept = dict(sorted(kept.items(), key=lambda item: order[item[0]]))
    return Plan(layout, layers, kept, left, [*_notes(found, layout), *warmup_note(model)])


def check_numbers(model: nn.Module) -> None:
    """Refuse what no codes can stand for.

    raises   ValueError if nothing is converted, or naming the layer with a weight or scale that is NaN or Inf
    """
    if not any(isinstance(module, ScaledLayer) for module in model.modules()):
        raise ValueError(f"export: the model has no 8-bit layers; {CONVERT}")
    for name, parameter in model.named_parameters():
        held = local(parameter.detach())
        if held.is_floating_point() and not bool(torch.isfinite(held).all()):
            bad = int((~torch.isfinite(held)).sum())
            raise ValueError(
                f"export: {name} {list(parameter.shape)} holds {bad:,} values that are NaN or Inf; training diverged, "
                "export an earlier checkpoint"
            )
    for name, module in model.named_modules():
        if isinstance(module, ScaledLayer):
            for role, scale in zip(("input", "weight"), module.fp8_scale[: WEIGHT + 1].tolist(), strict=True):
                if not 0 <= scale < float("inf"):
                    raise ValueError(
                        f"export: the {role} scale of layer {name!r} is {scale}: an amax of it was NaN or Inf; load "
                        "the scaling state of an earlier checkpoint, or call "
                        "fp8kernels.export.calibrate(model, batches)"
                    )


def warmup_note(model: nn.Module) -> list[str]:
    """What a report says of a model that still computes in high precision, while the file holds codes."""
    cold = [module for module in model.modules() if isinstance(module, ScaledLayer) and not module.fp8_warm]
    if not cold:
        return []
    steps, done = cold[0].fp8_recipe.warmup_steps, int(cold[0].fp8_step)
    return [f"the warm-up has not ended ({done} of {steps} steps): the model has never computed in the 8 bits written"]


def saved_transposed(layer: nn.Linear) -> bool:
    """Whether a checkpoint has the weight as [in, out], as GPT-2's Conv1D keeps it."""
    saved = layer.state_dict()["weight"]
    return saved.shape != layer.weight.shape or (saved.stride() != layer.weight.stride() and saved.numel() > 1)


def _why_high(name: str, module: nn.Module, layout: Layout) -> str | None:
    """Why a layer is written in high precision, in words, or None."""
    if not isinstance(module, ScaledLayer):
        return None if not isinstance(module, nn.Linear) else "not converted"
    if not isinstance(module, Linear):
        return f"it is a {type(module).__name__}; {layout.name} holds Linear layers only"
    if not name:
        return "the model is one bare layer, whose tensors have no names"
    if module.fp8_high:
        return FALLEN_BACK
    if saved_transposed(module):
        return "the checkpoint has its weight as [in, out] (Conv1D), which loaders of this layout do not read as 8-bit"
    if layout.block == "128x128" and module.in_features % EDGE:
        return f"its {module.in_features} inputs are no multiple of {EDGE}, and servers scale inputs by groups of those"
    return None


def _groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Layers that servers compute as one, in the order of their shards."""
    there = set(names)
    parents = dict.fromkeys(name.rpartition(".")[0] for name in names)
    out = []
    for parent in parents:
        for parts in FUSED.values():
            group = tuple(full for part in parts if (full := f"{parent}.{part}" if parent else part) in there)
            if len(group) > 1:
                out.append(group)
    return out


def _uneven(model: nn.Module, layers: dict[str, Linear], groups: list[tuple[str, ...]]) -> dict[str, str]:
    """Layers that servers join with others (or split, where the model has them joined) in the middle of a block.

    source   vllm 0.33.0 validate_fp8_block_shape; SGLang 0.5.23 refuses the same
    """
    out = {}
    for name in (name for group in groups for name in group if name in layers):
        if layers[name].out_features % EDGE:
            out[name] = (
                f"its {layers[name].out_features} rows are no multiple of {EDGE}, and servers join it with others"
            )
    for name, layer in layers.items():
        shards = _shards(model, name.rpartition(".")[2], layer)
        if any(rows % EDGE for rows in shards):
            out[name] = f"its parts of {' and '.join(map(str, shards))} rows are no multiples of {EDGE}"
    return out


def _shards(model: nn.Module, last: str, layer: Linear) -> list[int]:
    """Rows of the parts of a layer that holds several projections, as far as its name and the config tell."""
    rows = layer.out_features
    if last == "gate_up_proj":
        return [rows // 2, rows // 2]
    if last not in ("qkv_proj", "query_key_value"):
        return []
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None) or 1
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = rows // (heads + 2 * groups)
    return [heads * width, groups * width, groups * width]


def _weight_scales(layers: dict[str, Linear], layout: Layout) -> dict[str, Tensor]:
    """Every weight's amax at the largest E4M3 value, or at the recipe's target where it trained in E4M3."""
    out = {}
    for name, layer in layers.items():
        recipe = layer.fp8_recipe
        target = recipe.target(WEIGHT) if recipe.weight.fmt == E4M3.name else E4M3.target
        amax = weight_amax(whole(layer.weight.detach()), layout.block)
        scale = weight_scale(amax, target, power_of_two=recipe.power_of_two)
        out[name] = fp16_safe(scale, amax) if layout.block == "tensor" else scale
    return out


def _input_scales(layers: dict[str, Linear], layout: Layout) -> dict[str, Tensor]:
    """The trained scales, translated so that the amax that they stand for lands at E4M3's target."""
    if not layout.static:
        return {}
    out = {}
    for name, layer in layers.items():
        recipe = layer.fp8_recipe
        scale = layer.fp8_scale[INPUT : INPUT + 1].float()  # (1,), in units of the trained format
        if recipe.input.scaling == "current" and not layer.fp8_calibrated:
            fits = "compressed-tensors-block" if recipe.input.block == "1x128" else "compressed-tensors-dynamic"
            raise ValueError(
                f"export: layer {name!r} was trained with inputs scaled by their own amax ({recipe.input.block}), and "
                f"{layout.name!r} has static scales; take format={fits!r}, or make scales of some text with "
                "fp8kernels.export.calibrate(model, batches)"
            )
        if not float(scale) > 0:
            raise ValueError(
                f"export: layer {name!r} has no input scale (it is 0: no optimizer step has seen the layer), and "
                f"{layout.name!r} has static ones; train it, call fp8kernels.export.calibrate(model, batches), or take "
                "format='compressed-tensors-dynamic'"
            )
        if recipe.input.fmt != E4M3.name:
            amax = scale * recipe.target(INPUT)  # what the history knows, head-room left out
            scale = scale_from_amax(amax, E4M3.target * 2.0**-recipe.margin, power_of_two=recipe.power_of_two)
        out[name] = bf16_exact(scale)
    return out


def _notes(layers: dict[str, Linear], layout: Layout) -> list[str]:
    """How what servers compute differs from what was trained, besides the rounding of weights."""
    out = []
    recipes: dict[str, Any] = {layer.fp8_recipe.input.fmt: layer for layer in layers.values()}
    others = sorted(set(recipes) - {E4M3.name})
    if others:
        out.append(f"inputs trained in {', '.join(others)} are rounded to e4m3 by the server")
    trained = {(layer.fp8_recipe.input.scaling, layer.fp8_recipe.input.block) for layer in layers.values()}
    served = {"static": "static", "token": "current row", "group": "current 1x128"}[layout.inputs]
    for scaling, block in sorted(trained):
        was = "static" if scaling != "current" else f"current {block}"
        if was != served:
            out.append(f"inputs trained with {scaling} scales ({block}) are served with {served} ones")
    if not layout.static and any(layer.fp8_recipe.input.clamp for layer in layers.values()):
        out.append("inputs trained with clamp=True are not cut: each has the scale of its own amax")
    return out


def high_precision(model: nn.Module, plan: Plan, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All other tensors of the model by name, and the names that share another's tensor, with whose.

    A parameter that two modules share is written once, under its first name
    """
    tied: dict[str, str] = {}
    tensors = {name: in_dtype(tensor, dtype) for name, tensor in others(model, plan.layers, tied)}
    return tensors, tied


def others(model: nn.Module, layers: Container[str], tied: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model but for scaling state and the weights of `layers`, as they are; shared ones once.

    tied   gets the names that are left out, with the names that they share a tensor with
    """
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in model.state_dict().items():
        owner, _, key = name.rpartition(".")
        if is_state(name) or (owner in layers and key == "weight"):
            continue
        place = (local(tensor).data_ptr(), tensor.shape)
        if local(tensor).numel() and place in first:
            tied[name] = first[place]
            continue
        first[place] = name
        yield name, tensor


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """All of a tensor on the CPU, floats in `dtype`, with a storage of its own."""
    kept: Tensor = whole(tensor.detach())
    return own(kept.to("cpu", dtype if kept.is_floating_point() else None))
