"""Write a converted model as a checkpoint with 8-bit weights, check what lies in one, and read it back."""

from .check import Report, check, check_report
from .layout import LayerEntry, Manifest
from .read import load_into
from .servers import ServerRow, explain_servers
from .write import export, pack

__all__ = [
    "LayerEntry",
    "Manifest",
    "Report",
    "ServerRow",
    "check",
    "check_report",
    "explain_servers",
    "export",
    "load_into",
    "pack",
]
