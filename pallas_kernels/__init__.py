"""Operators of subquadratic sequence models: one function each, several forms behind it.

    from pallas_kernels import selective_scan
    y, state = selective_scan(u, delta, A, B, C)

Imports jax and numpy only. `implementation=None` takes the best form for the platform.
"""

from pallas_kernels.selective_scan import SelectiveScanState, selective_scan
from pallas_kernels.short_conv import ShortConvState, short_conv

OPERATORS = {"selective_scan": selective_scan, "short_conv": short_conv}

__all__ = [
    "OPERATORS",
    "SelectiveScanState",
    "ShortConvState",
    "selective_scan",
    "short_conv",
]
