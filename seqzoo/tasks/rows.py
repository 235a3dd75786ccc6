"""Runs a model on rows and scores each of them, whole or in chunks that carry the state."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqzoo.data.source import IGNORE
from seqzoo.tasks.task import score


class RowScores(NamedTuple):
    """Per row: the sum of losses, how many answers are right, how many were asked; [b] each."""

    loss: jax.Array
    right: jax.Array
    asked: jax.Array


def score_rows(
    model: Any,
    batch: Mapping[str, jax.Array],
    *,
    key: jax.Array | None = None,
    chunk_length: int | None = None,
    most_asked: int | None = None,
) -> tuple[RowScores, Any]:
    """Scores the targets of each row.

    Args:
        model: with `run`, and `init_state` where rows are read in chunks.
        batch: tokens, targets and, where it has them, segment_ids.
        key: a PRNG key turns dropout on; of no effect in chunks.
        chunk_length: tokens that the model reads at a time. What is held is then its state and the
            activations of one chunk, however long the row. None = whole rows.
        most_asked: targets per row, at most: a whole row's logits are computed there alone, where
            the model can (`logits_at`). None = everywhere.

    Returns:
        The scores, and what the model reported (in chunks: the mean over them).
    """
    names = ("tokens", "targets", "segment_ids")
    parts = {name: batch[name] for name in names if batch.get(name) is not None}
    b, t = parts["tokens"].shape[:2]
    if chunk_length is None or t <= chunk_length:
        where, targets = {}, parts["targets"]
        if most_asked is not None and most_asked < t and getattr(model, "logits_at", False):
            # Stable: places that ask first, in order; a row with fewer goes on with ignored ones.
            where["at"] = jnp.argsort(targets == IGNORE, axis=1, stable=True)[:, :most_asked]
            targets = jnp.take_along_axis(targets, where["at"], axis=1)
        out = model.run(parts["tokens"], segment_ids=parts.get("segment_ids"), key=key, **where)
        return _summed(out.logits, targets), out.reports

    def read(state, part):
        out = model.run(
            part["tokens"], segment_ids=part.get("segment_ids"), state=state, return_state=True
        )
        return out.state, (_summed(out.logits, part["targets"]), out.reports)

    n = t // chunk_length
    cut = lambda x: x[:, : n * chunk_length].reshape(b, n, chunk_length, *x.shape[2:])
    chunks = {name: jnp.moveaxis(cut(x), 1, 0) for name, x in parts.items()}
    state, told = jax.lax.scan(read, model.init_state(b, max_length=t), chunks)
    scores, reports = jax.tree.map(lambda x: x.sum(0), told)
    if n * chunk_length < t:
        last = {name: x[:, n * chunk_length :] for name, x in parts.items()}
        scores, reports = jax.tree.map(jnp.add, (scores, reports), read(state, last)[1])
        n += 1
    return scores, jax.tree.map(lambda x: x / n, reports)


def _summed(logits: jax.Array, targets: jax.Array) -> RowScores:
    return RowScores(*(x.sum(-1) for x in score(logits, targets)))
