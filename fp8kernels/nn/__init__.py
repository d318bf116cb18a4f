"""Drop-in modules that compute on 8-bit codes."""

from .attention import MultiheadAttention
from .linear import Conv1d, Conv2d, Conv3d, Linear
from .state import ScaledLayer

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Linear", "MultiheadAttention", "ScaledLayer"]
