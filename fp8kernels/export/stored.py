"""What a folder of any layout holds, from config.json and headers alone: each linear layer and its scales.

Read loosely: what no server could load is described too, so that `check` can say why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..headers import CONFIG, FLOATS, TensorHeader, check_folder, read_headers, read_json
from .config import KEY, QUANT_METHOD
from .foreign import INPUT_SCALES, OTHER_EIGHT_BITS, STORED, WEIGHT_SCALES
from .layout import CODES, INPUT_SCALE, MANIFEST, SCALE, LayerEntry
from .patterns import REGEX, Patience, matches

OLD_CONFIG = "hf_quant_config.json"  # ModelOpt's own, beside config.json
COMPRESSED, FP8, MODELOPT = "compressed-tensors", "fp8", "modelopt"
FUSED = {  # projections that vLLM and SGLang compute as one: their packed_modules_mapping for most models
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
EMBEDDING = re.compile(r"(^|[._])(embed\w*|wte|wpe|embeddings?)$")  # tables that are looked up in, by common names


@dataclass(frozen=True)
class Scheme:
    """How a layer computes. As config.json says, in words; None where it says nothing that is known.

    weights   "tensor", "channel", "RxC" or "group N": what shares a scale
    inputs    "static", "token", "group N", "tensor": what shares a scale, all but static found anew for every input;
              "none": weights alone are 8-bit
    """

    fmt: str
    weights: str
    inputs: str

    def block(self) -> tuple[int, int] | None:
        """Rows and columns of a block of the weight, where blocks have scales."""
        if not re.fullmatch(r"\d{1,6}x\d{1,6}", self.weights):
            return None
        rows, columns = self.weights.split("x")
        return (int(rows), int(columns)) if int(rows) and int(columns) else None


@dataclass(frozen=True)
class StoredLayer:
    """One linear layer in the files.

    weight   the name of the tensor with the codes or numbers, [N, K]
    scale, input_scale   names of tensors, or None
    scheme   how it computes; None: in high precision, or by a config that says nothing known of it
    ignored  whether config.json tells servers to leave it in high precision
    """

    name: str
    weight: str
    shape: tuple[int, ...]
    dtype: str
    scale: str | None = None
    input_scale: str | None = None
    scheme: Scheme | None = None
    ignored: bool = False

    @property
    def eight_bit(self) -> bool:
        """Whether the file holds codes."""
        return self.dtype == STORED or self.dtype in OTHER_EIGHT_BITS or self.weight.endswith(f".{CODES}")


@dataclass(frozen=True)
class Stored:
    """A folder: `method` is quant_method of its config, "" where weights are in high precision."""

    folder: Path
    method: str
    config: dict[str, Any]
    settings: dict[str, Any]
    tensors: dict[str, TensorHeader]
    layers: list[StoredLayer] = field(default_factory=list)

    def groups(self) -> list[list[StoredLayer]]:
        """Layers that servers compute as one, in the order of their shards; those of two or more alone."""
        found: dict[tuple[str, str], dict[str, StoredLayer]] = {}
        for layer in self.layers:
            parent, _, last = layer.name.rpartition(".")
            for fused, parts in FUSED.items():
                if last in parts:
                    found.setdefault((parent, fused), {})[last] = layer
        return [
            [members[part] for part in FUSED[fused] if part in members]
            for (_, fused), members in found.items()
            if len(members) > 1
        ]


def read_stored(folder: str | Path) -> Stored:
    """What the folder holds; reads config.json, the index and headers, and no tensor.

    raises   FileNotFoundError if it is no folder, or files are missing; ValueError for a file that is not what its
             header says, or a config that is no JSON object
    """
    folder = check_folder(folder)
    tensors = read_headers(folder)
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    settings = config.get(KEY) or config.get("compression_config") or {}
    if not settings and (folder / OLD_CONFIG).exists():
        settings = {"quant_method": MODELOPT, **read_json(folder / OLD_CONFIG)}
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / CONFIG}: {KEY} is {str(settings)[:100]!r}, not an object")
    method = settings.get("quant_method", "")
    if (folder / MANIFEST).exists():
        method = QUANT_METHOD
    if not isinstance(method, str):
        raise ValueError(f"{folder / CONFIG}: quant_method is {str(method)[:100]!r}, not a word")
    stored = Stored(folder, method, config, settings, tensors)
    stored.layers.extend(_layers(stored))
    return stored


def with_entries(stored: Stored, entries: Mapping[str, LayerEntry]) -> None:
    """Give the layers of a native folder the schemes of its manifest."""
    for index, layer in enumerate(stored.layers):
        if (entry := entries.get(layer.name)) is not None:
            inputs = (
                "static"
                if entry.input_scaling == "static"
                else {"row": "token"}.get(entry.input_block, entry.input_block)
            )
            scheme = Scheme(entry.weight_fmt, {"row": "channel"}.get(entry.weight_block, entry.weight_block), inputs)
            stored.layers[index] = StoredLayer(**{**layer.__dict__, "scheme": scheme})


class Ignored:
    """The names and patterns of layers that config.json leaves in high precision."""

    def __init__(self, method: str, entries: list[str]) -> None:
        self.entries = entries
        plain = {entry for entry in entries if not entry.startswith(REGEX)} if method != MODELOPT else set()
        self.names, self.patterns = plain, [entry for entry in entries if entry not in plain]

    def of(self, layer: str, patience: Patience) -> Iterator[str]:
        """The entries that may mean a layer.

        raises   ValueError once patience is at its end
        """
        if layer in self.names:
            yield layer
        yield from patience.all(self.patterns)


def ignored_by(stored: Stored) -> Ignored:
    """What config.json leaves in high precision.

    raises   ValueError if that is no list of words
    """
    keys = {
        COMPRESSED: ("ignore",),
        FP8: ("ignored_layers", "modules_to_not_convert"),
        MODELOPT: ("ignore", "exclude_modules"),
    }
    settings = stored.settings
    if isinstance(nested := settings.get("quantization"), dict):
        settings = {**settings, **nested}
    for key in keys.get(stored.method, ()):
        if found := settings.get(key):
            if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
                raise ValueError(f"{CONFIG}: {key} is {str(found)[:100]!r}, it is a list of names of layers")
            return Ignored(stored.method, found)
    return Ignored(stored.method, [])


def ignores(method: str, pattern: str, name: str) -> bool:
    """Whether an entry of the ignore list means a layer, as the loaders of that method read it.

    compressed-tensors  the name, or "re:" and an expression (compressed_tensors.utils.match.match_name, 0.20.0)
    fp8                 the name, or a module that holds it (vllm 0.33.0 is_layer_skipped, exact)
    modelopt            a part of the name, or a pattern with * (vllm 0.33.0 ModelOptQuantConfigBase.is_layer_excluded)
    raises   ValueError for an expression that is refused
    """
    if method == COMPRESSED:
        return matches(pattern, name)
    if method == MODELOPT:
        return pattern in name or (pattern.count("*") <= 8 and fnmatchcase(name, pattern))
    return pattern == name


def _layers(stored: Stored) -> list[StoredLayer]:
    ignored = ignored_by(stored)
    patience = Patience()
    found = []
    for name, header in stored.tensors.items():
        patience.spend()
        layer, _, key = name.rpartition(".")
        if key == CODES and len(header.shape) == 2:
            has = [f"{layer}.{part}" if f"{layer}.{part}" in stored.tensors else None for part in (SCALE, INPUT_SCALE)]
            found.append(StoredLayer(layer, name, header.shape, header.dtype, has[0], has[1]))
            continue
        plain = header.dtype in FLOATS and not EMBEDDING.search(layer)
        if (
            key != "weight"
            or len(header.shape) != 2
            or not (plain or header.dtype == STORED or header.dtype in OTHER_EIGHT_BITS)
        ):
            continue
        skip = any(ignores(stored.method, pattern, layer) for pattern in ignored.of(layer, patience))
        found.append(
            StoredLayer(
                layer,
                name,
                header.shape,
                header.dtype,
                _first(layer, WEIGHT_SCALES, stored.tensors),
                _first(layer, INPUT_SCALES, stored.tensors),
                None if skip else _scheme(stored, layer, patience),
                skip,
            )
        )
    return found


def _first(layer: str, keys: tuple[str, ...], tensors: Mapping[str, TensorHeader]) -> str | None:
    return next((f"{layer}.{key}" for key in keys if f"{layer}.{key}" in tensors), None)


def _scheme(stored: Stored, layer: str, patience: Patience) -> Scheme | None:
    """What config.json says of a layer that it does not ignore."""
    settings = stored.settings
    if stored.method == FP8:
        size = settings.get("weight_block_size")
        if isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < 10**6 for side in size):
            return Scheme("e4m3", f"{size[0]}x{size[1]}", f"group {size[1]}")
        return Scheme("e4m3", "tensor", "static" if settings.get("activation_scheme") == "static" else "token")
    if stored.method == MODELOPT:
        nested = settings.get("quantization")
        algorithm = str((nested if isinstance(nested, dict) else settings).get("quant_algo", "")).upper()
        known = {
            "FP8": ("tensor", "static"),
            "FP8_PER_CHANNEL_PER_TOKEN": ("channel", "token"),
            "FP8_PB_WO": ("128x128", "none"),
        }
        return Scheme("e4m3", *known[algorithm]) if algorithm in known else None
    groups = settings.get("config_groups")
    if stored.method != COMPRESSED or not isinstance(groups, dict):
        return None
    named, whole = None, None
    for group in groups.values():
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            continue
        if any(matches(target, layer) for target in patience.all(targets) if target != "Linear"):
            named = named or group
        elif "Linear" in targets:
            whole = whole or group
    return _compressed(named or whole)


def _compressed(group: Any) -> Scheme | None:
    if not isinstance(group, dict) or not isinstance(weights := group.get("weights"), dict):
        return None
    if weights.get("type") != "float" or weights.get("num_bits") != 8:
        return None
    inputs = group.get("input_activations")
    strategy, sides = weights.get("strategy"), weights.get("block_structure")
    shared = str(strategy)
    if strategy == "block":
        shared = "x".join(map(str, sides)) if isinstance(sides, list) and len(sides) == 2 else str(sides)
    elif strategy == "group":
        shared = f"group {weights.get('group_size')}"
    if not isinstance(inputs, dict):
        return Scheme("e4m3", shared[:40], "none")
    given = str(inputs.get("strategy"))
    if not inputs.get("dynamic"):
        given = "static" if given == "tensor" else f"static {given}"
    elif given == "group":
        given = f"group {inputs.get('group_size')}"
    return Scheme("e4m3", shared[:40], given[:40])
