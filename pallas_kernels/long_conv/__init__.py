"""A convolution as long as the sequence; see README.md for the maths."""

from pallas_kernels.long_conv.api import AXES, LongConvState, cost, long_conv

__all__ = ["AXES", "LongConvState", "cost", "long_conv"]
