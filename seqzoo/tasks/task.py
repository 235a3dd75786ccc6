"""What all tasks share: sums that may be added up, and a loss that ignores what is not asked.

A task is a frozen dataclass with

    metric, target, mode     what a run is judged by, and whether more or less of it is better
    task.for_data(dataset)   the task with what it must know of the data filled in
    task.sums(model, batch, key=None) -> Sums
    task.finish(totals) -> {name: float}

Sums of microbatches, devices and evaluation batches are added before `finish` divides, so that
each answer counts the same wherever it stood.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

from seqzoo.data.source import IGNORE, Dataset
from seqzoo.errors import ConfigError, suggest

Mode = Literal["max", "min"]
Pair = tuple[jax.Array, jax.Array]


class Sums(NamedTuple):
    """What one batch adds.

    Attributes:
      loss: float32 [], the sum of losses over all that counts.
      weight: float32 [], how many of them.
      metrics: per name the sum and the weight that it must be divided by, float32 [] each.
      reports: what the model said beside its logits (ModelOutput.reports).
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, Pair]
    reports: Any = None


class Task(Protocol):
    """A node of configs/task/; see the module."""

    metric: str
    target: float | None

    @property
    def mode(self) -> Mode: ...

    def for_data(self, dataset: Dataset) -> Self: ...

    def sums(
        self, model: Any, batch: Mapping[str, jax.Array], *, key: jax.Array | None = None
    ) -> Sums: ...

    def finish(self, totals: Mapping[str, tuple[Any, Any]]) -> dict[str, float]: ...


class Scores(NamedTuple):
    """Per position: loss, whether it is right, and whether it was asked; float32 [...] each.

    Where nothing was asked all three are 0.
    """

    loss: jax.Array
    right: jax.Array
    asked: jax.Array


def score(logits: jax.Array, targets: jax.Array) -> Scores:
    """Scores logits [... o] against targets int32 [...] in float32.

    What is not asked is cut out before any arithmetic: NaN in a logit there reaches neither the
    loss nor a gradient. Of n equal highest logits each is right by 1 / n.

    Raises:
      ConfigError: the model answers at other places than those that are asked.
    """
    if logits.shape[:-1] != targets.shape:  # in a batch of one row they would be stretched to fit
        raise ConfigError(
            f"the model gives logits {list(logits.shape)}, and the task asks at "
            f"{list(targets.shape)}: a language model answers at every token, a classifier "
            "(model=lssl_small, mega_lra_text, ...) once per row; choose the model that fits the "
            "task"
        )
    asked = targets != IGNORE
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    logits = jnp.where(asked[..., None], logits, 0.0)
    # A comparison rather than an index: its gradient is no scatter.
    is_target = targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)
    top = jax.lax.stop_gradient(logits.max(-1))
    normaliser = jnp.log(jnp.exp(logits - top[..., None]).sum(-1)) + top
    picked = jnp.where(is_target, logits, 0.0).sum(-1)
    ties = (logits == top[..., None]).sum(-1)
    right = (picked == top) / jnp.maximum(ties, 1)
    zero = jnp.zeros((), logits.dtype)
    return Scores(
        loss=jnp.where(asked, normaliser - picked, zero),
        right=jnp.where(asked, right.astype(logits.dtype), zero),
        asked=asked.astype(logits.dtype),
    )


def by_group(
    name: str,
    values: jax.Array,
    weights: jax.Array,
    group: jax.Array | None,
    names: tuple[str, ...],
) -> dict[str, Pair]:
    """Returns ``name`` over all rows and ``name/GROUP`` over the rows of each group.

    Args:
      name: of the metric.
      values: [b], already multiplied by their weights.
      weights: [b].
      group: int32 [b], or None.
      names: of the groups; one group or none adds nothing.
    """
    found = {name: (values.sum(), weights.sum())}
    if group is not None and len(names) > 1:
        for number, one in enumerate(names):
            inside = (group == number).astype(values.dtype)
            found[f"{name}/{one}"] = ((values * inside).sum(), (weights * inside).sum())
    return found


def averages(totals: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Divides sums by weights; a group without rows is left out, a total without any is NaN."""
    found = {}
    for name, (total, weight) in totals.items():
        total, weight = float(total), float(weight)
        if weight:
            found[name] = total / weight
        elif "/" not in name:
            found[name] = float("nan")
    return found


def made_for(dataset: Dataset) -> tuple[str, str] | None:
    """The task that data says it is made for, and why; None = it says nothing.

    Args:
      dataset: see seqzoo.data.source.Dataset.
    """
    if getattr(dataset, "mask_token", None) is not None:
        return "masked_tokens", "hides tokens, which are what is asked"
    if getattr(dataset, "n_classes", None) is not None:
        return "classification", "has a label per row"
    if getattr(dataset, "asks_everywhere", False):
        return "next_token", "asks for the next token everywhere"
    return None


def check_data(dataset: Dataset, task: str) -> None:
    """Refuses data that is made for another task than `task`, a file of configs/task/.

    Raises:
      ConfigError: names the task that fits.
    """
    fits, why = made_for(dataset) or (task, "")
    if fits != task:
        default = " (the default)" if task == "masked_answers" else ""
        raise ConfigError(
            f"task={task}{default}, but {type(dataset).__name__} {why}: set task={fits}, or take "
            "other data"
        )


def check_rows(batch: Mapping[str, Any], asked: str, name: str) -> None:
    """Refuses rows of data that another task is made for.

    Args:
      batch: the rows.
      asked: the setting that asks.
      name: what it needs of each row, "targets" or "label".

    Raises:
      ConfigError: it is not there.
    """
    if name not in batch:
        other = "classification" if "label" in batch else "masked_answers or next_token"
        raise ConfigError(
            f"{asked} needs rows with {name}, and rows of this data have {', '.join(batch)}; take "
            f"task={other}, or other data"
        )


def check_causal(model: Any, asked: str, seen: str, instead: str) -> None:
    """Refuses a model that could copy what it is asked for.

    Args:
      model: any; one without a stack of mixers is not looked at.
      asked: the setting that asks.
      seen: what a mixer that looks both ways sees.
      instead: what else could be done.

    Raises:
      ConfigError: a mixer looks both ways.
    """
    stack = getattr(model, "stack", None)
    for run, blocks in zip(stack.plan, stack.runs, strict=True) if stack is not None else ():
        for name, block in zip(run.period, blocks, strict=True):
            if getattr(block.mixer, "causality", "exact") == "none":
                raise ConfigError(
                    f"{asked}, but the mixer {name} looks both ways and sees {seen}; "
                    f"set model.mixers.{name}.causal=true, or {instead}"
                )


def check_metric(metric: str, known: tuple[str, ...]) -> None:
    """Refuses a metric that the task will not report."""
    if metric.partition("/")[0] not in known:
        raise ConfigError(
            f"task.metric={metric}; it must be one of {', '.join(known)}{suggest(metric, known)}"
        )
