"""Linear attention with one decay per head; see README.md for the maths."""

from pallas_kernels.simple_gla.api import AXES, SimpleGLAState, cost, simple_gla

__all__ = ["AXES", "SimpleGLAState", "cost", "simple_gla"]
