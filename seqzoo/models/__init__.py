"""Whole models: embedding, stack, head. Nothing of one architecture; the config names mixers."""

from seqzoo.models.classifier import Classifier
from seqzoo.models.language_model import LanguageModel

__all__ = ["Classifier", "LanguageModel"]
