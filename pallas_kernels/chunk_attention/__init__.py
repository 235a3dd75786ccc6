"""Attention over a limited past; see README.md for the maths."""

from pallas_kernels.chunk_attention.api import AXES, ChunkAttentionState, chunk_attention, cost

__all__ = ["AXES", "ChunkAttentionState", "chunk_attention", "cost"]
