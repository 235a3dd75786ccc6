"""Data sets: sources of rows, each a pure function of its number, and the pipeline over them.

Imports numpy and grain, never jax, models or train.
"""

from seqzoo.data.associative_recall import AssociativeRecall
from seqzoo.data.cifar import CIFAR10
from seqzoo.data.enwik8 import Enwik8
from seqzoo.data.idx_images import IdxImages
from seqzoo.data.imdb import IMDB
from seqzoo.data.induction_heads import InductionHeads
from seqzoo.data.listops import ListOps
from seqzoo.data.listops_tsv import ListOpsTSV
from seqzoo.data.masked import Masked
from seqzoo.data.mqar import MQAR
from seqzoo.data.mqar_segments import MQARSegments
from seqzoo.data.needles import Needles
from seqzoo.data.passkey import Passkey, PasskeyTokens
from seqzoo.data.pathfinder import Pathfinder
from seqzoo.data.retrieval import Retrieval
from seqzoo.data.selective_copying import SelectiveCopying
from seqzoo.data.source import ENDLESS, IGNORE, SPLITS, Batch, Dataset, Source, Split
from seqzoo.data.speech_commands import SpeechCommands
from seqzoo.data.stdlib import StdlibText
from seqzoo.data.text import Text
from seqzoo.data.tokens import Tokens

__all__ = [
    "CIFAR10",
    "ENDLESS",
    "IGNORE",
    "IMDB",
    "MQAR",
    "SPLITS",
    "AssociativeRecall",
    "Batch",
    "Dataset",
    "Enwik8",
    "IdxImages",
    "InductionHeads",
    "ListOps",
    "ListOpsTSV",
    "MQARSegments",
    "Masked",
    "Needles",
    "Passkey",
    "PasskeyTokens",
    "Pathfinder",
    "Retrieval",
    "SelectiveCopying",
    "Source",
    "SpeechCommands",
    "Split",
    "StdlibText",
    "Text",
    "Tokens",
]
