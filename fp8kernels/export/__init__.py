"""Write a converted model as a checkpoint with 8-bit weights, check what lies in one, and read it back."""

from .calibrate import Calibration, calibrate
from .check import Report, check, check_report
from .layout import LayerEntry, Manifest
from .read import load_into
from .servers import ServerRow, explain_servers
from .write import export, pack

__all__ = [
    "Calibration",
    "LayerEntry",
    "Manifest",
    "Report",
    "ServerRow",
    "calibrate",
    "check",
    "check_report",
    "explain_servers",
    "export",
    "load_into",
    "pack",
]
