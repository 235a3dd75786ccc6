"""Predict the next token, everywhere: language modelling."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import jax

from seqzoo.data.source import Dataset
from seqzoo.errors import ConfigError
from seqzoo.tasks import task
from seqzoo.tasks.rows import score_rows
from seqzoo.tasks.task import Mode, Sums


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross entropy of each target, in nats, and what is made of it.

    Reports loss, perplexity, accuracy and, where tokens are bytes, bits_per_byte.

    Attributes:
      metric: loss, perplexity, bits_per_byte or accuracy; the best checkpoint is chosen by it.
      target: a value of the metric at which a run may stop early.
      bytes_per_token: for bits_per_byte; filled in from the data.
    """

    metric: str = "loss"
    target: float | None = None
    bytes_per_token: float | None = None

    in_chunks = True  # rows may be read in chunks: trainer.eval_chunk_length

    def __post_init__(self) -> None:
        task.check_metric(self.metric, ("loss", "perplexity", "bits_per_byte", "accuracy"))

    @property
    def mode(self) -> Mode:
        return "max" if self.metric == "accuracy" else "min"

    def for_data(self, dataset: Dataset) -> Self:
        task.check_data(dataset, "next_token")
        known = self.bytes_per_token or dataset.bytes_per_token
        if self.metric == "bits_per_byte" and not known:
            raise ConfigError(
                "task.metric=bits_per_byte, but the tokens of this data are not bytes; use loss, "
                "or set task.bytes_per_token to the mean number of bytes behind a token"
            )
        return dataclasses.replace(self, bytes_per_token=known)

    def sums(
        self,
        model: Any,
        batch: Mapping[str, jax.Array],
        *,
        key: jax.Array | None = None,
        chunk_length: int | None = None,
    ) -> Sums:
        """Runs the model on a batch, whole or in chunks, and adds up the losses.

        Raises:
          ConfigError: a mixer of the model sees the token that it is asked for, rows have no
            targets, or the model answers elsewhere.
        """
        task.check_causal(
            model,
            "task=next_token",
            "the next token",
            "take task=masked_tokens with data=masked_stdlib_text",
        )
        task.check_rows(batch, "task=next_token", "targets")
        rows, reports = score_rows(model, batch, key=key, chunk_length=chunk_length)
        weight = rows.asked.sum()
        return Sums(
            loss=rows.loss.sum(),
            weight=weight,
            metrics={"accuracy": (rows.right.sum(), weight)},
            reports=reports,
        )

    def finish(self, totals: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
        """Turns added-up sums into what is shown."""
        found = task.averages(totals)
        loss = found["loss"]
        found["perplexity"] = math.exp(loss) if loss < 700 else math.inf
        if self.bytes_per_token:
            found["bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        return found
