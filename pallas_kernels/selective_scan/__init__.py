"""The selective scan of Mamba; see README.md for the maths."""

from pallas_kernels.selective_scan.api import AXES, SelectiveScanState, selective_scan
from pallas_kernels.selective_scan.cost import cost

__all__ = ["AXES", "SelectiveScanState", "cost", "selective_scan"]
