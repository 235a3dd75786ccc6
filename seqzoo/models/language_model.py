"""A causal language model over any pattern of mixers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.models.trunk import EMBEDDING_INIT, ModelOutput, Trunk, logits_of
from seqzoo.nn.param import metadata


class LanguageModel(Trunk):
    """logits_t = W_out norm(stack(embedding(tokens)))_t, a distribution over the next token.

    Args:
        vocab_size: tokens are 0 .. vocab_size - 1.
        tie_embeddings: the output reuses the embedding.
        rngs: source of the initial values.
        **trunk: d_model, n_layers, pattern, mixers and the other keywords of `Trunk`.

    Raises:
        ValueError: a setting is out of range.
    """

    logits_at = True  # `run` takes `at`

    def __init__(
        self, vocab_size: int, *, tie_embeddings: bool = True, rngs: nnx.Rngs, **trunk: Any
    ):
        super().__init__(vocab_size, rngs=rngs, **trunk)
        # Assigned once: an attribute that was None first would be static.
        if tie_embeddings:
            self.head = None
        else:
            self.head = nnx.Embed(
                self.embed.num_embeddings,
                self.d_model,
                embedding_init=EMBEDDING_INIT,
                embedding_metadata=metadata("vocab", "embed"),
                rngs=rngs,
            )

    def __call__(self, tokens: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """Logits `[b t o]` float32 of the token after each of int32 `[b t]`."""
        return self.run(tokens, segment_ids=segment_ids).logits

    def run(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state=None,
        return_state: bool = False,
        key: jax.Array | None = None,
        at: jax.Array | None = None,
    ) -> ModelOutput:
        """Reads whole sequences, or the next chunk of a stream.

        Args:
            tokens: int32 `[b t]`.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document.
            state: where the stream stopped; None = a fresh one.
            return_state: whether to give the state after the last token.
            key: a PRNG key turns dropout on.
            at: int32 `[b n]`, places whose logits are wanted, `[b n o]`; None = all.
        """
        h, state, reports = self.hidden(
            tokens, segment_ids=segment_ids, state=state, return_state=return_state, key=key
        )
        h = h if at is None else jnp.take_along_axis(h, at[..., None], axis=1)
        return ModelOutput(self._logits(h), state, reports)

    def step(self, token: jax.Array, state) -> tuple[jax.Array, Any]:
        """One token int32 `[b]`: logits `[b o]` of the next one, and the state after it."""
        h, state = self.hidden_step(token, state)
        return self._logits(h), state

    def _logits(self, h: jax.Array) -> jax.Array:
        table = self.embed if self.head is None else self.head
        return logits_of(h, table.embedding[...], self.vocab_size)
