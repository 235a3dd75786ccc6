"""A classifier of whole sequences over any pattern of mixers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.models.trunk import ModelOutput, Trunk
from seqzoo.nn.linear import linear

POOLS = ("mean", "last", "first")


class Classifier(Trunk):
    """logits = W_out pool(norm(stack(embedding(tokens)))) + b, one distribution per sequence.

    Args:
        vocab_size: tokens are 0 .. vocab_size - 1.
        n_classes: classes.
        pool: "mean", "last" or "first" of the tokens that are not padding.
        rngs: source of the initial values.
        **trunk: d_model, n_layers, pattern, mixers and the other keywords of `Trunk`.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        n_classes: int,
        pool: str = "mean",
        rngs: nnx.Rngs,
        **trunk: Any,
    ):
        if n_classes < 2:
            raise ValueError(f"n_classes is {n_classes}; it must be at least 2")
        if pool not in POOLS:
            raise ValueError(f"pool is {pool!r}; allowed: {', '.join(POOLS)}")
        super().__init__(vocab_size, rngs=rngs, **trunk)
        self.n_classes, self.pool = n_classes, pool
        self.head = linear(self.d_model, n_classes, axes=("embed", None), use_bias=True, rngs=rngs)

    def __call__(self, tokens: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """Logits `[b o]` float32 of int32 `[b t]`."""
        return self.run(tokens, segment_ids=segment_ids).logits

    def run(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> ModelOutput:
        """Classifies sequences.

        Args:
            tokens: int32 `[b t]`.
            segment_ids: int32 `[b t]`, 1 where there is a token and 0 = padding; None = no padding.
            key: a PRNG key turns dropout on.
        """
        h, _, reports = self.hidden(tokens, segment_ids=segment_ids, key=key)
        pooled = pool(h.astype(jnp.float32), segment_ids, self.pool)
        return ModelOutput(self.head(pooled), None, reports)


def pool(h: jax.Array, segment_ids: jax.Array | None, how: str) -> jax.Array:
    """Pools `[b t d]` over the tokens that are not padding; a row without any gives zeros.

    Args:
        h: `[b t d]`.
        segment_ids: int32 `[b t]`, 0 = padding; None = no padding.
        how: "mean", "last" or "first".

    Returns:
        `[b d]`.
    """
    valid = jnp.ones(h.shape[:2], bool) if segment_ids is None else segment_ids > 0
    if how == "mean":
        weight = valid
    else:
        count = jnp.cumsum(valid, axis=1)
        wanted = jnp.ones_like(count[:, :1]) if how == "first" else count[:, -1:]
        weight = valid & (count == wanted)
    kept = jnp.where(weight[..., None], h, 0)
    total = jnp.maximum(jnp.sum(weight, axis=1), 1)
    return jnp.sum(kept, axis=1) / total[:, None]
