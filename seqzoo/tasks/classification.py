"""One label per row."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax

from seqzoo.data.source import Dataset
from seqzoo.tasks import task
from seqzoo.tasks.task import Mode, Sums


@dataclasses.dataclass(frozen=True)
class Classification:
    """Cross entropy and accuracy of a row's label; rows whose label is IGNORE do not count.

    Attributes:
      metric: accuracy, loss, or accuracy/GROUP; the best checkpoint is chosen by it.
      target: a value of the metric at which a run may stop early.
      groups: names of the groups of rows; filled in from the data.
    """

    metric: str = "accuracy"
    target: float | None = None
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        task.check_metric(self.metric, ("accuracy", "loss"))
        object.__setattr__(self, "groups", tuple(self.groups))

    @property
    def mode(self) -> Mode:
        return "min" if self.metric == "loss" else "max"

    def for_data(self, dataset: Dataset) -> Self:
        task.check_data(dataset, "classification")
        return dataclasses.replace(self, groups=tuple(dataset.group_names))

    def sums(
        self, model: Any, batch: Mapping[str, jax.Array], *, key: jax.Array | None = None
    ) -> Sums:
        """Runs the classifier on a batch, of `tokens` or of vectors (`inputs`), and adds up what it
        got right.

        Raises:
          ConfigError: rows have no label, or the model answers elsewhere.
        """
        task.check_rows(batch, "task=classification", "label")
        read = batch["inputs"] if "inputs" in batch else batch["tokens"]
        out = model.run(read, segment_ids=batch.get("segment_ids"), key=key)
        scores = task.score(out.logits, batch["label"])
        return Sums(
            loss=scores.loss.sum(),
            weight=scores.asked.sum(),
            metrics=task.by_group(
                "accuracy", scores.right, scores.asked, batch.get("group"), self.groups
            ),
            reports=out.reports,
        )

    def finish(self, totals: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
        """Turns added-up sums into what is shown: loss, accuracy, accuracy/GROUP."""
        return task.averages(totals)
