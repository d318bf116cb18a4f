"""Write a converted model as a checkpoint with 8-bit weights, check what lies in one, and read it back."""

from .calibrate import Calibration, calibrate
from .check import Report, check, check_report
from .layout import LayerEntry, Manifest
from .plan import LayerPlan, Plan, high_precision, plan_export
from .read import load_into
from .report import ExportedLayer, ExportReport
from .servers import ServerRow, explain_servers
from .stream import pairs, stream
from .write import export, pack

__all__ = [
    "Calibration",
    "ExportReport",
    "ExportedLayer",
    "LayerEntry",
    "LayerPlan",
    "Manifest",
    "Plan",
    "Report",
    "ServerRow",
    "calibrate",
    "check",
    "check_report",
    "explain_servers",
    "export",
    "high_precision",
    "load_into",
    "pack",
    "pairs",
    "plan_export",
    "stream",
]

for _verb in (calibrate, check, explain_servers, pairs, stream):  # fp8kernels.export is the function
    setattr(export, _verb.__name__, _verb)
