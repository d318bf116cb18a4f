"""A linear layer of a server, filled from a native checkpoint: what the plug-ins for vLLM and SGLang share.

Both servers build fused layers (q, k and v in one; gate and up in one), cut them over ranks, and hand each tensor of
the checkpoint to the `weight_loader` of a parameter of its name, with the part of the fused layer it belongs to. The
parameters here carry the marks that those loaders go by (`output_dim`, `input_dim`, `needs_scalar_to_array`):

    weight_codes  uint8 [N, K] of this rank
    weight_scale  fp32: block "tensor" [parts, 1]; "row" [N, 1]; "1x128" and "128x128" [N, K / 128], the scales of a
                  128x128 block repeated over its rows, so that any row can be where a rank's part begins
    input_scale   fp32 [parts, 1]

They stay as they are loaded, so that the next weights of a running server go the same way; what `apply` needs of them
is made by `finish` beside them. Nothing here imports a server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..export.inference import check_scales
from ..export.layout import CODES, INPUT_SCALE, SCALE, LayerEntry
from ..nn.function import output_dtype
from ..ops import linear  # noqa: F401  registers torch.ops.fp8kernels.linear
from ..scaling.block import get_block

WHOLE = "whole"  # the part of a tensor that fills its parameter at once
PARTS = {"q": 0, "k": 1, "v": 2}  # how both servers name the parts of a fused attention layer


@dataclass(frozen=True)
class Run:
    """Neighbouring parts with one input scale: one product.

    codes        uint8 [n, K], a view of the layer's
    scale        fp32 on a grid of theirs
    input_scale  fp32 [1, 1]
    """

    start: int
    stop: int
    codes: Tensor
    scale: Tensor
    input_scale: Tensor


@dataclass
class Served:
    """What a layer knows of itself: its entry, its parts, which tensors have come, and the products to run."""

    name: str
    entry: LayerEntry
    parts: tuple[int, ...]
    arrived: dict[str, set[Any]] = field(default_factory=dict)
    runs: tuple[Run, ...] = ()
    fresh: bool = False


def layer_entry(
    entries: Mapping[str, LayerEntry], prefix: str, packed: Mapping[str, Sequence[str]]
) -> LayerEntry | None:
    """How the server's layer `prefix` reads its codes; None: it is in high precision.

    packed   the parts of a fused layer by its last name, as {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    raises   ValueError where the parts of one fused layer are not read alike; the message names them
    """
    if prefix in entries:
        return entries[prefix]
    parent, dot, last = prefix.rpartition(".")
    parts = packed.get(last)
    if not parts or isinstance(parts, (str, Mapping)):
        return None
    found = {f"{parent}{dot}{part}": entries.get(f"{parent}{dot}{part}") for part in parts}
    kinds = list(found.values())
    if all(kind == kinds[0] for kind in kinds):
        return kinds[0]
    said = "; ".join(f"{name}: {_said(kind)}" for name, kind in found.items())
    raise ValueError(
        f"{prefix}: the server computes these layers as one, but they are not read alike ({said}); convert all of "
        f"them with one recipe or none of them and export again, or serve the folder with fp8kernels.serving, which "
        f"keeps them apart"
    )


def create(
    layer: nn.Module,
    entry: LayerEntry,
    *,
    name: str,
    in_local: int,
    out_local: Sequence[int],
    weight_loader: Callable[..., None],
    device: torch.device | str | None = None,
) -> None:
    """Give a server's layer the parameters of a layer that holds codes.

    in_local       K of this rank
    out_local      N of this rank's parts, in the order of the fused layer
    weight_loader  the layer's own, called with the parameter, a checkpoint's tensor and, of fused layers, the part
    raises         ValueError if a block does not divide this rank's part
    """
    for what, name_of_block in (("weight", entry.weight_block), ("input", entry.input_block)):
        columns = get_block(name_of_block).cols
        if columns is not None and in_local % columns:
            raise ValueError(
                f"{name}: this rank's {in_local} inputs are not a multiple of {columns}, the columns of the {what}'s "
                f"block {name_of_block!r}; serve on fewer ranks"
            )
    served = Served(name, entry, tuple(out_local))
    layer.fp8kernels_served = served  # type: ignore[assignment]  # no module and no tensor: a plain note
    rows, parts = sum(out_local), len(out_local)
    block = get_block(entry.weight_block)

    def add(key: str, data: Tensor, **marks: Any) -> None:
        parameter = nn.Parameter(data, requires_grad=False)
        for mark, value in {**marks, "weight_loader": _loader(served, key, weight_loader)}.items():
            setattr(parameter, mark, value)
        layer.register_parameter(key, parameter)

    codes = torch.zeros(rows, in_local, dtype=torch.uint8, device=device)  # [N, K]
    add(CODES, codes, output_dim=0, input_dim=1)
    if entry.weight_block == "tensor":
        add(SCALE, _unset(parts, 1, device), needs_scalar_to_array=True)
    elif block.cols is None:
        add(SCALE, _unset(rows, 1, device), output_dim=0)
    else:
        add(SCALE, _unset(rows, in_local // block.cols, device), output_dim=0, input_dim=1)
    add(INPUT_SCALE, _unset(parts, 1, device), needs_scalar_to_array=True)


def finish(layer: nn.Module) -> None:
    """Make the products to run of what has been loaded. Called again, it makes them anew.

    raises   ValueError naming what never came, or a scale that decodes nothing
    """
    served: Served = layer.fp8kernels_served  # type: ignore[assignment]
    for key in (CODES, SCALE, INPUT_SCALE):
        missing = _missing(served, key)
        if missing:
            which = f" for its parts {missing}" if len(served.parts) > 1 else ""
            raise ValueError(
                f"{served.name}: the checkpoint brought no {key}{which}; copy the folder again, or export the model "
                f"again"
            )
    codes, scale, inputs = (getattr(layer, key).detach() for key in (CODES, SCALE, INPUT_SCALE))
    if inputs.shape[0] > 1 and WHOLE in served.arrived[INPUT_SCALE]:  # fused in the checkpoint: one scale for all parts
        inputs.copy_(inputs[:1].expand_as(inputs).clone())
    if served.entry.weight_block == "tensor":
        if WHOLE in served.arrived[SCALE]:
            scale.copy_(scale[:1].expand_as(scale).clone())
    else:
        scale = _without_padding(codes, scale)
    check_scales(served.name, served.entry, scale, inputs)
    served.runs = tuple(_runs(served, codes, scale, inputs))
    served.fresh = True


def apply(layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """decode(quantize(x)) @ decode(codes).T + bias.

    x        [..., K] fp32, bf16 or fp16
    bias     [N], or None
    returns  [..., N] in autocast's dtype, else that of x
    """
    served: Served = layer.fp8kernels_served  # type: ignore[assignment]
    if not served.fresh:
        finish(layer)
    entry, dtype = served.entry, output_dtype(x)
    outs = [
        torch.ops.fp8kernels.linear(
            x,
            run.input_scale,
            entry.input_fmt,
            entry.input_block,
            float(entry.input_target),
            entry.power_of_two,
            run.codes,
            run.scale,
            entry.weight_fmt,
            None if bias is None else bias[run.start : run.stop],
            torch.float32 if dtype == torch.float16 else dtype,
        )
        for run in served.runs
    ]  # [..., n] each
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
    return out if out.dtype == dtype else out.to(dtype)


def _said(entry: LayerEntry | None) -> str:
    if entry is None:
        return "high precision"
    return (
        f"weight {entry.weight_fmt} {entry.weight_block}, input {entry.input_fmt} {entry.input_block} "
        f"{entry.input_scaling}, target {entry.input_target:g}"
    )


def _loader(served: Served, key: str, inner: Callable[..., None]) -> Callable[..., None]:
    """The layer's loader, which also notes what has come and makes the products anew when all of it has."""

    def load(parameter: nn.Parameter, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        part = args[0] if args else next(iter(kwargs.values()), None)
        if key == SCALE and served.entry.weight_block == "128x128":
            tensor = tensor.repeat_interleave(128, dim=0)  # [N, K / 128]
        served.fresh = False
        inner(parameter, tensor, *args, **kwargs)
        served.arrived.setdefault(key, set()).add(WHOLE if part is None else PARTS.get(part, part))

    return load


def _missing(served: Served, key: str) -> list[int]:
    """The parts of a parameter for which nothing has come."""
    arrived = served.arrived.get(key, set())
    return [] if WHOLE in arrived else [part for part in range(len(served.parts)) if part not in arrived]


def _unset(rows: int, columns: int, device: torch.device | str | None) -> Tensor:
    return torch.full((rows, columns), float("nan"), dtype=torch.float32, device=device)


def _without_padding(codes: Tensor, scale: Tensor) -> Tensor:
    """Scales [N, C] where a server's padding of a vocabulary, zeros all over, has the scale 1."""
    empty = (scale == 0).all(dim=1)  # [N]
    if bool(empty.any()):
        empty &= (codes == 0).all(dim=1)
        scale = torch.where(empty[:, None], torch.ones_like(scale), scale)
    return scale


def _runs(served: Served, codes: Tensor, scale: Tensor, inputs: Tensor) -> list[Run]:
    bounds = [sum(served.parts[:part]) for part in range(len(served.parts) + 1)]
    starts = [0] + [p for p in range(1, len(served.parts)) if not torch.equal(inputs[p], inputs[p - 1])]
    runs = []
    for first, last in zip(starts, [*starts[1:], len(served.parts)], strict=True):
        start, stop = bounds[first], bounds[last]
        if served.entry.weight_block == "tensor":
            found = scale[first:last]  # [parts, 1]
            if bool((found == found[0]).all()):
                grid = found[:1].clone()
            else:
                sizes = torch.tensor(served.parts[first:last], device=scale.device)
                grid = found.repeat_interleave(sizes, dim=0)  # [n, 1]
        else:
            grid = _blocks(served.entry, scale[start:stop])
        runs.append(Run(start, stop, codes[start:stop], grid, inputs[first : first + 1].clone()))
    return runs


def _blocks(entry: LayerEntry, scale: Tensor) -> Tensor:
    """Scales [n, C] of rows, as a grid of 128x128 where the rows are whole blocks."""
    rows = get_block(entry.weight_block).rows
    if rows is None or rows == 1 or scale.shape[0] % rows:
        return scale
    tiles = scale.reshape(-1, rows, scale.shape[1])  # [n / 128, 128, C]
    return tiles[:, 0].contiguous() if bool((tiles == tiles[:, :1]).all()) else scale
