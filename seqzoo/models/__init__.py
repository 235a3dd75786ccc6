"""Whole models: embedding, stack, head. Nothing of one architecture; the config names mixers."""

from seqzoo.models.classifier import Classifier
from seqzoo.models.language_model import LanguageModel
from seqzoo.models.masked_language_model import MaskedLanguageModel

__all__ = ["Classifier", "LanguageModel", "MaskedLanguageModel"]
