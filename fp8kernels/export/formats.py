"""The layouts of others that export writes, and what config.json says of each, in the words of their loaders."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from .stored import FUSED

NATIVE = "native"
EDGE = 128  # elements; the side of a block of weights, and the length of a group of inputs


@dataclass(frozen=True)
class Layout:
    """A layout with E4M3 weights.

    method   quant_method of config.json
    block    which elements of a weight share a scale: "tensor", "row" or "128x128"
    inputs   "static": one trained scale. "token", "group": each gets the scale of its own amax when it is served
    """

    name: str
    method: str
    block: str
    inputs: str

    @property
    def static(self) -> bool:
        return self.inputs == "static"


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("compressed-tensors", "compressed-tensors", "tensor", "static"),
        Layout("compressed-tensors-dynamic", "compressed-tensors", "row", "token"),
        Layout("compressed-tensors-block", "compressed-tensors", "128x128", "group"),
        Layout("fp8", "fp8", "tensor", "static"),
    )
}
FORMATS = (NATIVE, *LAYOUTS)
_WEIGHTS: dict[str, dict[str, Any]] = {
    "tensor": {"strategy": "tensor"},
    "row": {"strategy": "channel"},
    "128x128": {"strategy": "block", "block_structure": [EDGE, EDGE]},
}
_INPUTS: dict[str, dict[str, Any]] = {
    "static": {"strategy": "tensor", "dynamic": False},
    "token": {"strategy": "token", "dynamic": True},
    "group": {"strategy": "group", "group_size": EDGE, "dynamic": True},
}


def get_layout(name: str) -> Layout:
    """The layout of that name.

    raises   ValueError naming the known ones and the near match
    """
    if name in LAYOUTS:
        return LAYOUTS[name]
    near = difflib.get_close_matches(str(name), FORMATS, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"export: unknown format {name!r}: known are {', '.join(map(repr, FORMATS))}{hint}")


def foreign_config(layout: Layout, ignore: list[str], *, cache: bool = False) -> dict[str, Any]:
    """`quantization_config` of config.json.

    ignore   names of the linear layers that are in high precision, as the files have them
    cache    whether the files hold k_scale and v_scale of an E4M3 cache
    source   compressed-tensors 0.20.0 QuantizationConfig; vllm 0.33.0 Fp8Config.from_config
    """
    if layout.method == "fp8":
        return {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ignore}
    eight_bit = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "weights": {**eight_bit, "dynamic": False, **_WEIGHTS[layout.block]},
        "input_activations": {**eight_bit, **_INPUTS[layout.inputs]},
        "output_activations": None,
        "targets": ["Linear"],
        "format": "float-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [*ignore, *_fused(ignore)],
        "kv_cache_scheme": {**eight_bit, "strategy": "tensor", "dynamic": False} if cache else None,
    }


def _fused(names: list[str]) -> list[str]:
    """The fused layers of which all parts are named.

    SGLang's Llama, Qwen and their like do not say which parts a fused layer has, and look for its own name alone.
    """
    named = set(names)
    return [
        name.removesuffix(parts[0]) + fused
        for fused, parts in FUSED.items()
        for name in names
        if name.rpartition(".")[2] == parts[0] and all(name.removesuffix(parts[0]) + part in named for part in parts)
    ]
