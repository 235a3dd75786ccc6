"""Sequence mixers, one per file: each maps `[b t d] -> [b t d]` and keeps contract 2.

The contract (docs/add_a_mixer.md) is tested for every one by seqzoo/testing/mixer_suite.py.
"""

from seqzoo.mixers.attention import Attention
from seqzoo.mixers.base_conv import BaseConv
from seqzoo.mixers.based import Based
from seqzoo.mixers.gated_deltanet import GatedDeltaNet
from seqzoo.mixers.gla import GLA
from seqzoo.mixers.identity import Identity
from seqzoo.mixers.lssl import LSSL
from seqzoo.mixers.mamba import Mamba
from seqzoo.mixers.mamba2 import Mamba2
from seqzoo.mixers.mega import Mega
from seqzoo.mixers.mom import MoM
from seqzoo.mixers.monarch_mixer import MonarchMixer
from seqzoo.mixers.retention import Retention
from seqzoo.mixers.s4d import S4D
from seqzoo.mixers.sliding_window_attention import SlidingWindowAttention
from seqzoo.mixers.tcnca import TCNCA
from seqzoo.mixers.titans_lmm import TitansLMM
from seqzoo.mixers.titans_mac import TitansMAC
from seqzoo.mixers.titans_mag import TitansMAG
from seqzoo.mixers.titans_mal import TitansMAL

__all__ = [
    "Attention",
    "BaseConv",
    "Based",
    "GLA",
    "GatedDeltaNet",
    "Identity",
    "LSSL",
    "Mamba",
    "Mamba2",
    "Mega",
    "MoM",
    "MonarchMixer",
    "Retention",
    "S4D",
    "SlidingWindowAttention",
    "TCNCA",
    "TitansLMM",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
]
