"""Whole models: embedding, stack, head. Nothing of one architecture; mixers come from the config."""

from seqzoo.models.classifier import Classifier
from seqzoo.models.language_model import LanguageModel

__all__ = ["Classifier", "LanguageModel"]
