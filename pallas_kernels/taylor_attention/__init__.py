"""Linear attention by second-order Taylor features; see README.md for the maths."""

from pallas_kernels.taylor_attention.api import (
    AXES,
    TaylorAttentionState,
    cost,
    taylor_attention,
)

__all__ = ["AXES", "TaylorAttentionState", "cost", "taylor_attention"]
