"""Write a converted model as a checkpoint with 8-bit weights, and read it back."""

from .layout import LayerEntry, Manifest
from .read import check, load_into
from .write import export, pack

__all__ = ["LayerEntry", "Manifest", "check", "export", "load_into", "pack"]
