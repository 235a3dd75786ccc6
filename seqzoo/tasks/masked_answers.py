"""Some positions ask and only they are scored: recall, copying, induction."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp

from seqzoo.data.source import Dataset
from seqzoo.tasks import task
from seqzoo.tasks.rows import score_rows
from seqzoo.tasks.task import Mode, Sums


@dataclasses.dataclass(frozen=True)
class MaskedAnswers:
    """Cross entropy and accuracy where a target is given.

    The loss is the mean over all answers. Accuracy is the mean over rows of the fraction of the
    row's answers that are right (Zoology's measure), exact the fraction of rows whose answers are
    all right; both also for each group of rows.

    Attributes:
      metric: accuracy, exact, loss, accuracy/GROUP or exact/GROUP; the best checkpoint is
        chosen by it.
      target: a value of the metric at which a run may stop early.
      groups: names of the groups of rows; filled in from the data.
      most_asked: targets per row, at most: logits are computed there alone; filled in from the
        data, null = everywhere.
      answers_in_input: whether later tokens of a row hold answers, so that no mixer may look both
        ways; filled in from the data.
    """

    metric: str = "accuracy"
    target: float | None = None
    groups: tuple[str, ...] = ()
    most_asked: int | None = None
    answers_in_input: bool = False

    in_chunks = True  # rows may be read in chunks: trainer.eval_chunk_length

    def __post_init__(self) -> None:
        task.check_metric(self.metric, ("accuracy", "exact", "loss"))
        object.__setattr__(self, "groups", tuple(self.groups))

    @property
    def mode(self) -> Mode:
        return "min" if self.metric == "loss" else "max"

    def for_data(self, dataset: Dataset) -> Self:
        task.check_data(dataset, "masked_answers")
        return dataclasses.replace(
            self,
            groups=tuple(dataset.group_names),
            most_asked=getattr(dataset, "most_asked", None),
            answers_in_input=getattr(dataset, "answers_in_input", False),
        )

    def sums(
        self,
        model: Any,
        batch: Mapping[str, jax.Array],
        *,
        key: jax.Array | None = None,
        chunk_length: int | None = None,
    ) -> Sums:
        """Runs the model on a batch, whole or in chunks, and adds up what it got right.

        Raises:
          ConfigError: a mixer of the model sees answers that it is asked for, rows have no targets,
            or the model answers elsewhere.
        """
        if self.answers_in_input:
            task.check_causal(
                model,
                "task=masked_answers on rows that hold answers",
                "them",
                "take data whose rows hold none, as data=mqar",
            )
        task.check_rows(batch, "task=masked_answers", "targets")
        rows, reports = score_rows(
            model, batch, key=key, chunk_length=chunk_length, most_asked=self.most_asked
        )
        fraction = rows.right / jnp.maximum(rows.asked, 1.0)
        counts = (rows.asked > 0).astype(fraction.dtype)
        exact = counts * (rows.right == rows.asked)
        group = batch.get("group")
        return Sums(
            loss=rows.loss.sum(),
            weight=rows.asked.sum(),
            metrics=task.by_group("accuracy", fraction, counts, group, self.groups)
            | task.by_group("exact", exact, counts, group, self.groups),
            reports=reports,
        )

    def finish(self, totals: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
        """Turns added-up sums into what is shown: loss, accuracy, exact, and by GROUP."""
        return task.averages(totals)
