"""The 8-bit formats, by name."""

from __future__ import annotations

import difflib

from .format import Format
from .fp8 import E4M3, E5M2
from .hif8 import HIF8

FORMATS = {fmt.name: fmt for fmt in (HIF8, E4M3, E5M2)}
ALIASES = {"hifloat8": "hif8", "e4m3fn": "e4m3", "float8_e4m3fn": "e4m3", "fp8": "e4m3", "float8_e5m2": "e5m2"}


def get_format(fmt: Format | str) -> Format:
    """The format of that name; a Format is returned as it is.

    raises   ValueError naming the near matches
    """
    if isinstance(fmt, Format):
        return fmt
    name = ALIASES.get(str(fmt).lower(), str(fmt).lower())
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, [*FORMATS, *ALIASES], n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"unknown format {fmt!r}: known are {', '.join(map(repr, FORMATS))}{hint}")


__all__ = ["ALIASES", "E4M3", "E5M2", "FORMATS", "HIF8", "Format", "get_format"]
