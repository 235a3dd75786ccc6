"""Tasks: what is asked of a model and how the answer is scored. See seqzoo.tasks.task."""

from seqzoo.tasks.classification import Classification
from seqzoo.tasks.masked_answers import MaskedAnswers
from seqzoo.tasks.masked_tokens import MaskedTokens
from seqzoo.tasks.next_token import NextToken
from seqzoo.tasks.task import Sums, Task

__all__ = ["Classification", "MaskedAnswers", "MaskedTokens", "NextToken", "Sums", "Task"]
