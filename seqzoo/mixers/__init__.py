"""Sequence mixers, one per file: each maps `[b t d] -> [b t d]` and keeps contract 2.

The contract (docs/add_a_mixer.md) is tested for every one by seqzoo/testing/mixer_suite.py.
"""

from seqzoo.mixers.attention import Attention
from seqzoo.mixers.identity import Identity
from seqzoo.mixers.mamba import Mamba

__all__ = ["Attention", "Identity", "Mamba"]
