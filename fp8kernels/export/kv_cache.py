"""The entry `kv_cache` of a checkpoint's quantization_config: the format of an 8-bit cache, and calibrated scales.

    {"fmt": "hif8", "scales": {"0": [[0.13, 0.11], [0.02, 0.02]], …}}

`scales` may be missing; it has, for a layer of attention by its number, a scale for each head of the keys and of the
values. A layer that is missing takes its scales from the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..formats import Format, get_format
from ..scaling.rules import LARGEST_SCALE, SMALLEST_SCALE

Scales = Mapping[int, tuple[Tensor, Tensor]]  # layer -> fp32 [KH] of keys, of values
KEY = "quantization_config: kv_cache"


def kv_cache_entry(fmt: Format | str, scales: Scales | None = None) -> dict[str, Any]:
    """What config.json says of an 8-bit cache: a dict for JSON, in which every scale is exact.

    raises   ValueError for an unknown format, or a scale that is not positive and finite
    """
    entry: dict[str, Any] = {"fmt": get_format(fmt).name}
    if scales:
        entry["scales"] = {str(layer): [each.float().tolist() for each in pair] for layer, pair in scales.items()}
        cache_scales(entry)
    return entry


def cache_scales(entry: Mapping[str, Any] | None) -> dict[int, tuple[Tensor, Tensor]] | None:
    """The calibrated scales of an entry, or None where it has none.

    raises   ValueError naming the layer whose scales are not two lists of positive, finite numbers of one length
    """
    found = None if entry is None else entry.get("scales")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"{KEY}: scales is {str(found)[:100]}, it is an object of lists by layer; calibrate again")
    return {_number(name): _pair(name, lists) for name, lists in found.items()}


def _number(name: Any) -> int:
    if not (isinstance(name, str) and name.isascii() and name.isdigit()):
        raise ValueError(f"{KEY}: scales names {str(name)[:100]!r}, it names layers by number; calibrate again")
    return int(name)


def _pair(name: str, lists: Any) -> tuple[Tensor, Tensor]:
    fits = isinstance(lists, list) and len(lists) == 2 and all(isinstance(each, list) and each for each in lists)
    if not fits or len(lists[0]) != len(lists[1]):
        raise ValueError(f"{KEY}: scales of layer {name} are {str(lists)[:100]}, they are two lists; calibrate again")
    for each in (*lists[0], *lists[1]):
        number = isinstance(each, int | float) and not isinstance(each, bool)
        if not number or not SMALLEST_SCALE <= each <= LARGEST_SCALE:
            said = str(each)[:100]
            raise ValueError(f"{KEY}: layer {name} has the scale {said}, it is a positive fp32 number; calibrate again")
    keys, values = (torch.tensor(each, dtype=torch.float32) for each in lists)
    return keys, values
