"""The entry `quantization_config` of a native checkpoint's config.json: all that a server needs to read its layers.

    {"quant_method": "fp8kernels", "version": 1,
     "groups": [{"weight_fmt": "hif8", "weight_block": "tensor", "input_fmt": "hif8", "input_block": "tensor",
                 "input_scaling": "static", "input_target": 15.0, "power_of_two": false,
                 "layers": ["model.layers.0.mlp.up_proj", …]}, …],
     "kv_cache": {"fmt": "hif8"}}       only where the checkpoint asks for an 8-bit cache; more in kv_cache.py

Layers that stand in no group are in high precision. Names are those of the tensors in the files.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from ..formats import get_format
from .kv_cache import cache_scales, kv_cache_entry
from .layout import LayerEntry, check_entry

QUANT_METHOD = "fp8kernels"
VERSION = 1  # of the entry; raised when an older reader would misread a newer one
KEY = "quantization_config"
AGAIN = "export the model again"


def quantization_config(
    layers: dict[str, LayerEntry], *, kv_cache: str | dict[str, Any] | None = None
) -> dict[str, Any]:
    """What config.json says of a native checkpoint: layers that are read alike share a group.

    layers     of a manifest: by name, how each is read
    kv_cache   the format of an 8-bit cache, or what `kv_cache_entry` makes of it and of calibrated scales; or None
    returns    a dict for JSON; groups in the order of their first layers
    raises     ValueError for an unknown format of the cache
    """
    groups: dict[LayerEntry, list[str]] = {}
    for name, entry in layers.items():
        groups.setdefault(entry, []).append(name)
    found: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "groups": [{**asdict(entry), "layers": names} for entry, names in groups.items()],
    }
    if kv_cache is not None:
        found["kv_cache"] = kv_cache_entry(kv_cache) if isinstance(kv_cache, str) else kv_cache
        kv_cache_format(found)
    return found


def entries(config: dict[str, Any]) -> dict[str, LayerEntry]:
    """The layers that a `quantization_config` names, each with how its codes are read.

    raises   ValueError if it is not ours, is from another version, or says something that no layer can mean; the
             message names the field
    """
    if not isinstance(config, dict) or config.get("quant_method") != QUANT_METHOD:
        method = config.get("quant_method") if isinstance(config, dict) else config
        raise ValueError(f"{KEY} is of the method {method!r}, not {QUANT_METHOD!r}")
    if config.get("version") != VERSION:
        raise ValueError(
            f"{KEY} has version {config.get('version')!r}, this fp8kernels reads {VERSION}; use a matching version"
        )
    groups = config.get("groups")
    if not isinstance(groups, list) or not groups:
        raise ValueError(f"{KEY}: groups is {_brief(groups)}, it is a list of groups of layers; {AGAIN}")
    found: dict[str, LayerEntry] = {}
    for number, group in enumerate(groups):
        entry, names = _group(number, group)
        for name in names:
            if name in found:
                raise ValueError(f"{KEY}: layer {name!r} stands in two groups; {AGAIN}")
            found[name] = entry
    kv_cache_format(config)
    return found


def kv_cache_format(config: dict[str, Any]) -> str | None:
    """The format of the 8-bit cache that a `quantization_config` asks for, or None.

    raises   ValueError if it says something else than a format
    """
    cache = config.get("kv_cache")
    if cache is None:
        return None
    if (
        not isinstance(cache, dict)
        or not {"fmt"} <= set(cache) <= {"fmt", "scales"}
        or not isinstance(cache["fmt"], str)
    ):
        raise ValueError(
            f'{KEY}: kv_cache is {_brief(cache)}, it is {{"fmt": a format}}, with "scales" or without; {AGAIN}'
        )
    cache_scales(cache)
    return get_format(cache["fmt"]).name


def _group(number: int, group: Any) -> tuple[LayerEntry, list[str]]:
    where = f"{KEY}: group {number}"
    keys = {field.name for field in fields(LayerEntry)}
    if not isinstance(group, dict) or set(group) != {*keys, "layers"}:
        said = sorted(map(str, group)) if isinstance(group, dict) else _brief(group)
        raise ValueError(f"{where} has {said}, it needs {sorted(keys)} and layers; {AGAIN}")
    names = group["layers"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{where}: layers is {_brief(names)}, it is a list of names; {AGAIN}")
    entry = LayerEntry(**{key: group[key] for key in keys})
    try:
        check_entry(entry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is no entry of a layer ({error}); {AGAIN}") from None
    return entry, names


def _brief(value: Any) -> str:
    return repr(value)[:100]
