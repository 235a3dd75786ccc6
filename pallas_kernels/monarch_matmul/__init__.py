"""Products with Monarch and block-diagonal matrices; see README.md for the maths."""

from pallas_kernels.monarch_matmul.api import AXES, cost, monarch_matmul

__all__ = ["AXES", "cost", "monarch_matmul"]
