"""A short causal depthwise convolution; see README.md for the maths."""

from pallas_kernels.short_conv.api import AXES, ShortConvState, cost, short_conv

__all__ = ["AXES", "ShortConvState", "cost", "short_conv"]
