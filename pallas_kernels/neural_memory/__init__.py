"""A memory that learns by gradient descent while it reads; see README.md for the maths."""

from pallas_kernels.neural_memory.api import AXES, NeuralMemoryState, cost, neural_memory
from pallas_kernels.neural_memory.memory import ACTIVATIONS, Weights, recall

__all__ = [
    "ACTIVATIONS",
    "AXES",
    "NeuralMemoryState",
    "Weights",
    "cost",
    "neural_memory",
    "recall",
]
