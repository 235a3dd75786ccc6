"""neural_memory as a Mosaic GPU kernel: its place, not written yet (dispatch falls to xla)."""

from pallas_kernels.core.unwritten import refuses, run

__all__ = ["refuses", "run"]
