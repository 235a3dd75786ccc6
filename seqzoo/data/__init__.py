"""Data sets: sources of rows, each a pure function of its number, and the pipeline over them.

Imports numpy and grain, never jax, models or train.
"""

from seqzoo.data.mqar import MQAR
from seqzoo.data.source import ENDLESS, IGNORE, SPLITS, Batch, Dataset, Source, Split

__all__ = ["ENDLESS", "IGNORE", "MQAR", "SPLITS", "Batch", "Dataset", "Source", "Split"]
