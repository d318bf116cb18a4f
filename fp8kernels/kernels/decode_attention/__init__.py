"""decode_attention: few queries against the keys and values of everything before them, which are 8-bit codes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class HeadCodes(NamedTuple):
    """Keys or values: codes uint8 [B, KH, T, D], any strides; scale fp32 [B, KH], one a sequence and head."""

    codes: Tensor
    scale: Tensor
