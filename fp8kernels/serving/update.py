"""update: new weights for a loaded model, taken from a stream, in place; how RL frameworks keep a server up to date."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..export.foreign import in_memory
from ..export.inference import check_scales
from ..export.layout import CODES, INPUT_SCALE, SCALE, LayerEntry
from ..export.stream import scale_name
from ..formats import get_format
from ..headers import some
from ..nn.inference import InferenceLinear
from ..nn.inference_embedding import InferenceEmbedding
from ..nn.inference_joined import Joined, JoinedLinear, rejoin
from ..ops import quantize

WEIGHT = "weight"
AGAIN = "stream the trained model in the format the folder was exported with"


@dataclass
class Updated:
    """What an update has changed: names of 8-bit layers, and of tensors in high precision."""

    layers: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{len(self.layers)} layers in 8 bits and {len(self.others)} tensors in high precision hold new weights"


@torch.no_grad()
def update(model: nn.Module, stream: Iterable[tuple[str, Tensor, Tensor | None]]) -> Updated:
    """Take the weights of a stream into a loaded model, in place; every later result is that of a fresh load.

    model   from `fp8kernels.serving.load`; layers that are one product stay one, and a head that was rounded while it
            was loaded is rounded anew
    stream  of `fp8kernels.export.stream`, in the layout of the folder the model was loaded from. Codes of the native
            layout do not say their format: the streamed model must have been converted by the same recipe
    returns what has new weights now

    A layer changes when all its tensors have come and been checked, and then all of them at once: a stream that is
    refused or breaks off leaves every layer as it was or wholly new, and the message says how many are new. Answers
    that are being generated meanwhile would mix the weights, and so would keys and values that are kept from before:
    update between requests.

    raises  ValueError naming the tensor that the model does not have, that has another shape or format, that decodes to
            no number, or that the stream left out
    """
    target = _Target(model)
    done = Updated()
    try:
        for name, tensor, scale in stream:
            target.take(name, tensor, scale, done)
        target.check_complete()
    except ValueError as error:
        if done.layers or done.others:
            raise ValueError(f"{error}. Before that, {done}; update again with a whole stream") from error
        raise
    finally:
        for joined, parts in target.joined.values():
            rejoin(joined, parts)
    return done


class _Target:
    """A model while weights arrive: what it can take, and what has come of layers that are not complete."""

    def __init__(self, model: nn.Module) -> None:
        self.coded: dict[str, InferenceLinear | InferenceEmbedding] = {
            name: module
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, (InferenceLinear, InferenceEmbedding))
        }
        if not any(isinstance(module, InferenceLinear) for module in self.coded.values()):
            raise ValueError("update: the model has no layers that hold 8-bit codes; load it with fp8kernels.serving")
        get: Any = getattr(model, "get_output_embeddings", lambda: None)
        self.head = get()
        self.plain = {
            name: tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if name.rpartition(".")[0] not in self.coded or name.endswith(".bias")
        }
        self.waiting: dict[str, dict[str, Tensor]] = {}
        self.written: set[int] = set()  # data_ptr: a tensor under two names comes once
        self.joined: dict[int, tuple[Joined, list[JoinedLinear]]] = {}
        for module in self.coded.values():
            if isinstance(module, JoinedLinear):
                self.joined.setdefault(id(module.joined), (module.joined, []))[1].append(module)

    def take(self, name: str, tensor: Tensor, scale: Tensor | None, done: Updated) -> None:
        """One item of the stream: kept until its layer is complete, or written."""
        layer, _, key = name.rpartition(".")
        module = self.coded.get(layer)
        if module is not None and key in (WEIGHT, CODES, INPUT_SCALE):
            if scale is None and key == WEIGHT and tensor.dtype in (torch.bfloat16, torch.float16, torch.float32):
                self._round(layer, module, tensor, done)
                return
            found = self.waiting.setdefault(layer, {})
            found[key] = tensor
            if key != INPUT_SCALE:
                if scale is None:
                    raise ValueError(f"update: {name} came without a scale; {AGAIN}")
                found[SCALE] = scale
            self._write_if_complete(layer, module, done)
            return
        if name not in self.plain or scale is not None:
            like = some(
                [known for known in (*self.plain, *self.coded) if known.rpartition(".")[2] == key] or self.coded
            )
            raise ValueError(f"update: the model has no {name!r} that takes this; it has {like}; {AGAIN}")
        own = self.plain[name]
        _same_shape(name, tensor, own)
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"update: {name} holds numbers that are not finite; the training has diverged")
        if isinstance(module, JoinedLinear):
            module.joined.hold_back()
        own.copy_(tensor)
        self.written.add(own.data_ptr())
        done.others.append(name)

    def check_complete(self) -> None:
        """raises ValueError naming the layers and tensors that did not come."""
        for layer, found in self.waiting.items():
            raise ValueError(f"update: of {layer} only {', '.join(sorted(found))} came; {AGAIN}")
        missing = [
            name
            for name, tensor in (*self.plain.items(), *((name, m.weight_codes) for name, m in self.coded.items()))
            if tensor.data_ptr() not in self.written and tensor.numel()
        ]
        if missing:
            raise ValueError(f"update: the stream brought nothing for {some(missing)}")

    def _write_if_complete(self, layer: str, module: nn.Module, done: Updated) -> None:
        found = self.waiting[layer]
        if not isinstance(module, InferenceLinear):
            raise ValueError(f"update: {layer} is an embedding, whose weight comes in high precision; {AGAIN}")
        native = CODES in found
        if SCALE not in found or (INPUT_SCALE not in found and (native or module.input_role.scaling == "static")):
            return
        entry = _entry(module)
        new = dict(found) if native else _from_fp8(layer, module, entry, found)
        if new[CODES].dtype != torch.uint8:
            raise ValueError(f"update: {layer}.{CODES} is {new[CODES].dtype}, codes are uint8; {AGAIN}")
        for key, tensor in new.items():
            _same_shape(f"{layer}.{key}", tensor, getattr(module, key))
        check_scales(layer, entry, new[SCALE], new[INPUT_SCALE], where="update: ")
        nan = get_format(entry.weight_fmt).table(device=new[CODES].device).isnan().nonzero().flatten().to(torch.uint8)
        if bool(torch.isin(new[CODES], nan).any()):
            raise ValueError(f"update: {layer} has codes that are not numbers; the training has diverged")
        self._write(layer, module, new, done)
        del self.waiting[layer]

    def _round(self, layer: str, module: nn.Module, weight: Tensor, done: Updated) -> None:
        """A head, or its embedding, that was rounded while it was loaded: the same for its new weight."""
        if module is not self.head and not isinstance(module, InferenceEmbedding):
            raise ValueError(f"update: {layer} holds 8-bit codes, and its new weight came as {weight.dtype}; {AGAIN}")
        assert isinstance(module, (InferenceLinear, InferenceEmbedding))
        _same_shape(f"{layer}.{WEIGHT}", weight, module.weight_codes)
        if not bool(weight.isfinite().all()):
            raise ValueError(f"update: {layer} holds numbers that are not finite; the training has diverged")
        fmt = module.fmt if isinstance(module, InferenceEmbedding) else module.weight_role.fmt
        coded = quantize(weight.detach(), fmt, block="row")  # as serving/head.py
        self._write(layer, module, {CODES: coded.codes, SCALE: coded.scale}, done)

    def _write(self, layer: str, module: nn.Module, new: dict[str, Tensor], done: Updated) -> None:
        if isinstance(module, JoinedLinear):
            module.joined.hold_back()
        for key, tensor in new.items():
            getattr(module, key).copy_(tensor)
        self.written.add(module.weight_codes.data_ptr())  # type: ignore[union-attr,operator]
        done.layers.append(layer)


def _from_fp8(layer: str, module: InferenceLinear, entry: LayerEntry, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of compressed-tensors or "fp8" as the layer holds them."""
    weight = found[WEIGHT]
    if weight.dtype != torch.float8_e4m3fn or entry.weight_fmt != "e4m3":
        raise ValueError(
            f"update: {layer}.{WEIGHT} came as {weight.dtype}, and the layer holds codes of {entry.weight_fmt}; {AGAIN}"
        )
    _same_shape(f"{layer}.{WEIGHT}", weight, module.weight_codes)
    named = {f"{layer}.{key}": tensor for key, tensor in found.items() if key != SCALE}
    named[scale_name(f"{layer}.{WEIGHT}")] = found[SCALE]
    try:
        return in_memory(layer, entry, named)
    except RuntimeError:
        raise ValueError(
            f"update: {layer} came with scales {tuple(found[SCALE].shape)}, and the layer has them on the grid "
            f"{tuple(module.weight_scale.shape)} of its {tuple(weight.shape)} weight; {AGAIN}"
        ) from None


def _entry(module: InferenceLinear) -> LayerEntry:
    return LayerEntry(
        weight_fmt=module.weight_role.fmt,
        weight_block=module.weight_role.block,
        input_fmt=module.input_role.fmt,
        input_block=module.input_role.block,
        input_scaling=module.input_role.scaling,
        input_target=module.input_target,
        power_of_two=module.power_of_two,
    )


def _same_shape(name: str, tensor: Tensor, own: Tensor) -> None:
    if tensor.shape != own.shape:
        raise ValueError(f"update: {name} is {tuple(tensor.shape)}, the model's is {tuple(own.shape)}; {AGAIN}")
