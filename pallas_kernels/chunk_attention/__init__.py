"""Attention over a limited past, or inside chunks; see README.md for the maths."""

from pallas_kernels.chunk_attention.api import AXES, chunk_attention
from pallas_kernels.chunk_attention.cost import cost
from pallas_kernels.chunk_attention.state import ChunkAttentionState

__all__ = ["AXES", "ChunkAttentionState", "chunk_attention", "cost"]
