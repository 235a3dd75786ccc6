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

    With documents=2 a row holds two sequences, which go through the same layers apart; with x and y
    pooled, W_out reads [x, y, x * y, x - y], as in the Retrieval task of the Long Range Arena.

    Args:
        vocab_size: tokens are 0 .. vocab_size - 1; of no matter with input_dim.
        n_classes: classes.
        pool: "mean", "last" or "first" of the tokens that are not padding.
        documents: sequences per row, 1 or 2.
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
        documents: int = 1,
        rngs: nnx.Rngs,
        **trunk: Any,
    ):
        if n_classes < 2:
            raise ValueError(f"n_classes is {n_classes}; it must be at least 2")
        if pool not in POOLS:
            raise ValueError(f"pool is {pool!r}; allowed: {', '.join(POOLS)}")
        if documents not in (1, 2):
            raise ValueError(f"documents is {documents}; allowed: 1, 2")
        super().__init__(vocab_size, rngs=rngs, **trunk)
        self.n_classes, self.pool, self.documents = n_classes, pool, documents
        width = self.d_model * (1 if documents == 1 else 4)
        self.head = linear(width, n_classes, axes=("embed", None), use_bias=True, rngs=rngs)

    def __call__(self, tokens: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """Logits `[b o]` float32 of int32 `[b t]` (or what else `run` takes)."""
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
            tokens: int32 `[b t]`; with documents=2 `[b 2 t]`; with input_dim float32 `[b t c]`
                (`[b 2 t c]`).
            segment_ids: int32 `[b t]` (`[b 2 t]`), 1 where there is a token and 0 = padding; None =
                no padding.
            key: a PRNG key turns dropout on.

        Raises:
            ValueError: tokens have another number of axes.
        """
        tokens, segment_ids = self._apart(tokens, segment_ids)
        h, _, reports = self.hidden(tokens, segment_ids=segment_ids, key=key)
        pooled = pool(h.astype(jnp.float32), segment_ids, self.pool)
        if self.documents == 2:
            x, y = pooled[0::2], pooled[1::2]
            pooled = jnp.concatenate([x, y, x * y, x - y], axis=-1)
        return ModelOutput(self.head(pooled), None, reports)

    def _apart(self, tokens, segment_ids):
        """Gives each document a row of its own: both of a row one after the other."""
        axes = [*"bt"] if self.documents == 1 else [*"b2t"]
        axes += [] if self.input_dim is None else ["c"]
        if tokens.ndim != len(axes) or (self.documents == 2 and tokens.shape[1] != 2):
            raise ValueError(
                f"the classifier was given {tokens.dtype} {tokens.shape}; with documents="
                f"{self.documents} and input_dim={self.input_dim} it reads [{' '.join(axes)}]"
            )
        if self.documents == 1:
            return tokens, segment_ids
        rows = lambda a: None if a is None else a.reshape(-1, *a.shape[2:])
        return rows(tokens), rows(segment_ids)


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
