"""Data sets: sources of rows, each a pure function of its number, and the pipeline over them.

Imports numpy and grain, never jax, models or train.
"""

from seqzoo.data.associative_recall import AssociativeRecall
from seqzoo.data.induction_heads import InductionHeads
from seqzoo.data.listops import ListOps
from seqzoo.data.mqar import MQAR
from seqzoo.data.mqar_segments import MQARSegments
from seqzoo.data.selective_copying import SelectiveCopying
from seqzoo.data.source import ENDLESS, IGNORE, SPLITS, Batch, Dataset, Source, Split
from seqzoo.data.stdlib import StdlibText
from seqzoo.data.text import Text
from seqzoo.data.tokens import Tokens

__all__ = [
    "ENDLESS",
    "IGNORE",
    "MQAR",
    "SPLITS",
    "AssociativeRecall",
    "Batch",
    "Dataset",
    "InductionHeads",
    "ListOps",
    "MQARSegments",
    "SelectiveCopying",
    "Source",
    "Split",
    "StdlibText",
    "Text",
    "Tokens",
]
