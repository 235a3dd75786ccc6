"""A short causal depthwise convolution; see README.md for the maths."""

from pallas_kernels.short_conv.api import AXES, ShortConvState, short_conv
from pallas_kernels.short_conv.cost import cost

__all__ = ["AXES", "ShortConvState", "cost", "short_conv"]
