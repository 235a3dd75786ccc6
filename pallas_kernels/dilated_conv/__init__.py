"""A stack of dilated convolutions, channel by channel (TCN); see README.md for the maths."""

from pallas_kernels.dilated_conv.api import AXES, DilatedConvState, cost, dilated_conv

__all__ = ["AXES", "DilatedConvState", "cost", "dilated_conv"]
