"""gla as a Mosaic GPU kernel: refused yet (dispatch falls to xla).

gpu_rule.py has it whole, and interpreted it is right; on jax 0.11 its first kernel does not get
through the compiler's search for layouts in minutes, so nobody is given it. README.md says more.
"""

from pallas_kernels.core.unwritten import refuses, run

__all__ = ["refuses", "run"]
