"""Operators of subquadratic sequence models: one function each, several forms behind it.

    from pallas_kernels import selective_scan
    y, state = selective_scan(u, delta, A, B, C)

Imports jax and numpy only. `implementation=None` takes the best form for the platform.
"""

from pallas_kernels.chunk_attention import ChunkAttentionState, chunk_attention
from pallas_kernels.dilated_conv import DilatedConvState, dilated_conv
from pallas_kernels.gated_delta_rule import GatedDeltaRuleState, gated_delta_rule
from pallas_kernels.gla import GLAState, gla
from pallas_kernels.long_conv import LongConvState, long_conv
from pallas_kernels.monarch_matmul import monarch_matmul
from pallas_kernels.neural_memory import NeuralMemoryState, neural_memory
from pallas_kernels.selective_scan import SelectiveScanState, selective_scan
from pallas_kernels.short_conv import ShortConvState, short_conv
from pallas_kernels.simple_gla import SimpleGLAState, simple_gla
from pallas_kernels.taylor_attention import TaylorAttentionState, taylor_attention

OPERATORS = {
    "chunk_attention": chunk_attention,
    "dilated_conv": dilated_conv,
    "gated_delta_rule": gated_delta_rule,
    "gla": gla,
    "long_conv": long_conv,
    "monarch_matmul": monarch_matmul,
    "neural_memory": neural_memory,
    "selective_scan": selective_scan,
    "short_conv": short_conv,
    "simple_gla": simple_gla,
    "taylor_attention": taylor_attention,
}

__all__ = [
    "OPERATORS",
    "ChunkAttentionState",
    "DilatedConvState",
    "GLAState",
    "GatedDeltaRuleState",
    "LongConvState",
    "NeuralMemoryState",
    "SelectiveScanState",
    "ShortConvState",
    "SimpleGLAState",
    "TaylorAttentionState",
    "chunk_attention",
    "dilated_conv",
    "gated_delta_rule",
    "gla",
    "long_conv",
    "monarch_matmul",
    "neural_memory",
    "selective_scan",
    "short_conv",
    "simple_gla",
    "taylor_attention",
]
