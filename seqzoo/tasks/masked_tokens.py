"""Say what stood where tokens were hidden: masked language modelling."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import jax

from seqzoo.data.source import Dataset
from seqzoo.errors import ConfigError
from seqzoo.tasks import task
from seqzoo.tasks.task import Mode, Sums


@dataclasses.dataclass(frozen=True)
class MaskedTokens:
    """Cross entropy of each hidden token, and whether it is the likeliest.

    Which tokens are hidden belongs to the data (seqzoo.data.masked). Reports loss (nats),
    bits_per_masked_token and accuracy, all means over the hidden tokens, wherever they stand.

    Attributes:
      metric: loss, bits_per_masked_token or accuracy; the best checkpoint is chosen by it.
      target: a value of the metric at which a run may stop early.
    """

    metric: str = "bits_per_masked_token"
    target: float | None = None

    def __post_init__(self) -> None:
        task.check_metric(self.metric, ("loss", "bits_per_masked_token", "accuracy"))

    @property
    def mode(self) -> Mode:
        return "max" if self.metric == "accuracy" else "min"

    def for_data(self, dataset: Dataset) -> Self:
        fits, _ = task.made_for(dataset) or ("masked_answers", "")
        if fits != "masked_tokens":
            raise ConfigError(
                f"task=masked_tokens, but {type(dataset).__name__} hides no tokens: a model that "
                "looks both ways would read what it is asked for; take data=masked_text or "
                f"masked_stdlib_text, or task={fits}"
            )
        return self

    def sums(
        self, model: Any, batch: Mapping[str, jax.Array], *, key: jax.Array | None = None
    ) -> Sums:
        """Runs the model on a batch and adds up the losses.

        Raises:
          ConfigError: rows have no targets, or the model answers elsewhere.
        """
        task.check_rows(batch, "task=masked_tokens", "targets")
        out = model.run(batch["tokens"], segment_ids=batch.get("segment_ids"), key=key)
        scores = task.score(out.logits, batch["targets"])
        weight = scores.asked.sum()
        return Sums(
            loss=scores.loss.sum(),
            weight=weight,
            metrics={"accuracy": (scores.right.sum(), weight)},
            reports=out.reports,
        )

    def finish(self, totals: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
        """Turns added-up sums into what is shown."""
        found = task.averages(totals)
        return found | {"bits_per_masked_token": found["loss"] / math.log(2)}
