"""The study of HiF8 quantization-aware training: one factor at a time, from a grid to a page with intervals."""

from .page import redraw as draw_again
from .study import run_study

__all__ = ["draw_again", "run_study"]
