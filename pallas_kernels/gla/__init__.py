"""Linear attention with one decay per key channel; see README.md for the maths."""

from pallas_kernels.gla.api import AXES, GLAState, cost, gla

__all__ = ["AXES", "GLAState", "cost", "gla"]
