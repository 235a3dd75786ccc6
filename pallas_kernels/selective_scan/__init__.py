"""The selective scan of Mamba; see README.md for the maths."""

from pallas_kernels.selective_scan.api import AXES, SelectiveScanState, cost, selective_scan

__all__ = ["AXES", "SelectiveScanState", "cost", "selective_scan"]
