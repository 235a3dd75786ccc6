"""A memory that learns by gradient descent while it reads; see README.md for the maths."""

from pallas_kernels.neural_memory.api import (
    AXES,
    LIMITS,
    NeuralMemoryState,
    cost,
    neural_memory,
)
from pallas_kernels.neural_memory.memory import ACTIVATIONS, Weights, recall

__all__ = [
    "ACTIVATIONS",
    "AXES",
    "LIMITS",
    "NeuralMemoryState",
    "Weights",
    "cost",
    "neural_memory",
    "recall",
]
