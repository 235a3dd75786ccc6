"""The gated delta rule of Gated DeltaNet; see README.md for the maths."""

from pallas_kernels.gated_delta_rule.api import (
    AXES,
    GatedDeltaRuleState,
    cost,
    gated_delta_rule,
)

__all__ = ["AXES", "GatedDeltaRuleState", "cost", "gated_delta_rule"]
