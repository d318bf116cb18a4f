"""What modules share whose result goes to 8-bit linear layers and nowhere else: they may make the codes themselves.

The first of the layers that read the result is its owner: the codes are made with the owner's scale and noted in the
owner's state, once. A commit then tells the other readers what they would have seen (`pairs`), so that histories and
scales of all are those of a model whose layers quantize for themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.check import FLOATS
from ..scaling.delayed import INPUT
from .coded import CodedTensor, Straight
from .dtensor import is_dtensor
from .function import keeps_transposed
from .observe import observe
from .state import Coded, ScaledLayer, role_arguments

producers: weakref.WeakSet[Producer] = weakref.WeakSet()


class Place(NamedTuple):
    """Where a reader stands: parent.name."""

    parent: nn.Module
    name: str


class Producer(nn.Module):
    """Mixin in front of the class that a module had; `super().forward` is what it did before."""

    fp8_mixin: type[Producer]  # the two classes that the module's class is made of: this one, and the one it had
    fp8_original: type[nn.Module]
    fp8_readers: tuple[ScaledLayer, ...]  # the owner first; plain attributes, as they stand elsewhere in the model
    fp8_places: tuple[Place, ...]
    fp8_parts: Any

    def join(self, places: Sequence[Place], parts: Any = None) -> None:
        """Make codes for the layers at these places from now on; `parts` tells the mixin what its module is made of."""
        self.fp8_places, self.fp8_parts = tuple(places), parts
        self.fp8_readers = tuple(getattr(place.parent, place.name) for place in places)
        producers.add(self)

    def release(self) -> None:
        """Be the module of before again."""
        producers.discard(self)
        for name in ("fp8_places", "fp8_readers", "fp8_parts"):
            self.__dict__.pop(name, None)
        self.__class__ = self.fp8_original  # type: ignore[assignment]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module did before, or the same with codes."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and self.fp8_codes_now(args[0]):
            return self.fp8_fused(args[0])
        return super().forward(*args, **kwargs)

    def fp8_plain(self, x: Tensor) -> Tensor:
        """What the module did before."""
        out: Tensor = super().forward(x)
        return out

    def fp8_fused(self, x: Tensor) -> Tensor:
        """The same with codes."""
        raise NotImplementedError

    def fp8_codes_now(self, x: Tensor) -> bool:
        """Whether this call may give codes.

        Not while readers warm up, where one of them was replaced, where some train and some do not, or where a hook
        watches what would be skipped; torch.compile fuses on its own, and cannot look into a CodedTensor.
        """
        if torch.compiler.is_compiling():
            return False
        first = self.fp8_readers[0]
        if first.fp8_recipe.straight_through != "plain":  # which needs the tensor beside its codes
            return False
        if x.dtype not in FLOATS or x.device != first.fp8_scale.device or x.ndim < 1 or is_dtensor(x):
            return False
        skipped = [
            child for child in self._modules.values() if child is not None and not isinstance(child, ScaledLayer)
        ]
        if any(watched(child) for child in skipped):
            return False
        return all(
            place.parent._modules.get(place.name) is reader
            and reader.fp8_on
            and reader.training == first.training
            and not watched(reader)
            and not is_dtensor(reader._parameters.get("weight"))
            for place, reader in zip(self.fp8_places, self.fp8_readers, strict=True)
        )

    def fp8_code(self, y: Tensor) -> Tensor:
        """A finished result as codes for its readers."""
        if y.dtype not in FLOATS:
            return y
        coded = self.fp8_readers[0].fp8_quantize(y, INPUT, transpose=needs_transposed(self.fp8_readers, y))
        observe(self.fp8_readers[1:], INPUT, y)  # the first one saw it just now
        out: Tensor = Straight.apply(y, coded, self.fp8_readers)
        return out

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        producers.add(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time: copies and pickles name what it is made of."""
        return empty, (self.fp8_mixin, self.fp8_original), self.__dict__


def watched(module: nn.Module) -> bool:
    """Whether a hook wants to see what goes through a module."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def fused_class(mixin: type[Producer], original: type[nn.Module]) -> type[Producer]:
    """The class of a fused module: the mixin's forward before that of the class it had."""
    if (mixin, original) not in _classes:
        parts = {"fp8_mixin": mixin, "fp8_original": original}
        _classes[mixin, original] = type(f"Fused{original.__name__}", (mixin, original), parts)
    return _classes[mixin, original]


_classes: dict[tuple[type[Producer], type[nn.Module]], type[Producer]] = {}


def empty(mixin: type[Producer], original: type[nn.Module]) -> Producer:
    """A fused module without its attributes, for copies and unpickling."""
    cls = fused_class(mixin, original)
    out: Producer = cls.__new__(cls)
    return out


def pays(device: torch.device) -> bool:
    """Whether one kernel for a module and its rounding beats two.

    On a GPU its result then never travels through memory. On a CPU the kernels are composed of the same parts, so the
    module computes as before, to the bit, and what is saved is rounding once for all readers.
    """
    return device.type == "cuda"


def needs_transposed(readers: tuple[ScaledLayer, ...], x: Tensor) -> bool:
    """Whether the readers' backward will multiply transposed codes of x."""
    if not torch.is_grad_enabled() or not keeps_transposed(x.device, readers[0].fp8_recipe):
        return False
    return any(reader.weight.requires_grad for reader in readers)


class Ask(NamedTuple):
    """What a reader asks of an op that makes its input: scales, where to note it, how to round, the codes' format."""

    scale: Tensor
    pending: Tensor | None
    counters: Tensor | None
    how: tuple[Any, ...]
    fmt: str

    def coded(self, codes: Tensor, used: Tensor, codes_t: Tensor) -> Coded:
        return Coded(codes, used, self.fmt, codes_t if codes_t.numel() else None)


def ask(readers: tuple[ScaledLayer, ...], x: Tensor) -> Ask:
    """For a result of the shape of x, by the state of the first reader."""
    first = readers[0]
    recipe = first.fp8_recipe
    scale, how, fmt = role_arguments(
        x,
        recipe.input,
        recipe.target(INPUT),
        recipe.power_of_two,
        first.fp8_scale[INPUT : INPUT + 1],
        transpose=needs_transposed(readers, x),
        carrier=first.fp8_carrier(INPUT, x.device),
    )
    if not first.training:
        return Ask(scale, None, None, how, fmt)
    return Ask(scale, first.fp8_pending[INPUT : INPUT + 1], first.fp8_counters[INPUT], how, fmt)


def pairs(found: list[ScaledLayer]) -> list[tuple[ScaledLayer, ScaledLayer]]:
    """(other reader, first reader) of codes that two of the layers read: a commit tells the other what was noted."""
    if not producers:
        return []
    present = {id(layer) for layer in found}
    return [
        (other, first)
        for first, *others in (producer.fp8_readers for producer in list(producers))
        if id(first) in present
        for other in others
        if id(other) in present
    ]


__all__ = ["Ask", "CodedTensor", "Place", "Producer", "ask", "fused_class", "pairs", "pays", "producers"]
