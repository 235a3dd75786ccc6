"""What language models, classifiers and encoders share: embedding, stack, final norm."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.nn.checks import at_least
from seqzoo.nn.dropout import dropout
from seqzoo.nn.linear import NORMS
from seqzoo.nn.param import metadata
from seqzoo.nn.report import Reports
from seqzoo.nn.sharding import constrain
from seqzoo.nn.stack import Stack

_EMBED_KEY = 2**31 - 1  # of dropout on embeddings: no layer has this number


class ModelOutput(NamedTuple):
    """What a model gives.

    Attributes:
        logits: float32, `[b t o]` of a language model, `[b o]` of a classifier.
        state: after the last token, where it was asked for, else None.
        reports: auxiliary losses and diagnostics of all layers.
    """

    logits: jax.Array
    state: Any
    reports: Reports


class Trunk(nnx.Module):
    """h = norm(stack(embedding(tokens))): everything of a model but its head.

    Args:
        vocab_size: tokens are 0 .. vocab_size - 1.
        d_model: width of the residual stream.
        n_layers: layers in all.
        pattern: mixers by name, repeated to n_layers.
        mixers: what makes each of them.
        channel_mixer: what makes the channel mixer after each; None = there is none.
        norm: "rmsnorm" or "layernorm".
        norm_eps: added under the root of the norms.
        pad_vocab_multiple: rows of the embedding are padded to a multiple of it.
        dropout: rate, on what each mixer adds.
        embed_dropout: rate, on the embeddings.
        remat: what a layer keeps for the backward pass: none, full, dots, dots_no_batch.
        residual_dtype: of the residual stream.
        dtype: what layers compute in.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        d_model: int,
        n_layers: int,
        pattern: Sequence[str],
        mixers: Mapping[str, Any],
        channel_mixer: Any = None,
        norm: str = "rmsnorm",
        norm_eps: float = 1e-5,
        pad_vocab_multiple: int = 8,
        dropout: float = 0.0,
        embed_dropout: float = 0.0,
        remat: str = "none",
        residual_dtype: str = "float32",
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        at_least(1, vocab_size=vocab_size, d_model=d_model)
        if pad_vocab_multiple < 1:
            raise ValueError(f"pad_vocab_multiple is {pad_vocab_multiple}; it must be at least 1")
        for name, rate in dict(dropout=dropout, embed_dropout=embed_dropout).items():
            if not 0 <= rate < 1:
                raise ValueError(f"{name} is {rate}; it must lie in [0, 1)")
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; allowed: {', '.join(NORMS)}")
        for name, value in dict(dtype=dtype, residual_dtype=residual_dtype).items():
            if value not in ("float32", "bfloat16", "float16", "float64"):
                raise ValueError(f"{name} is {value!r}; allowed: float32, bfloat16, float16")

        self.vocab_size, self.d_model = vocab_size, d_model
        self.embed_dropout, self.residual_dtype = embed_dropout, residual_dtype
        rows = -(-vocab_size // pad_vocab_multiple) * pad_vocab_multiple
        self.embed = nnx.Embed(
            rows,
            d_model,
            embedding_init=EMBEDDING_INIT,
            embedding_metadata=metadata("vocab", "embed"),
            rngs=rngs,
        )
        self.stack = Stack(
            d_model,
            n_layers=n_layers,
            pattern=pattern,
            mixers=mixers,
            channel_mixer=channel_mixer,
            norm=norm,
            norm_eps=norm_eps,
            dropout=dropout,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = NORMS[norm](d_model, eps=norm_eps, dtype=dtype, rngs=rngs)

    def embedded(self, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Looks up int32 `[b ...]` as `[b ... d]` in the dtype of the residual stream."""
        x = self.embed.embedding[...][tokens].astype(self.residual_dtype)
        key = None if key is None else jax.random.fold_in(key, _EMBED_KEY)
        return dropout(x, self.embed_dropout, key)

    def hidden(
        self, tokens: jax.Array, *, segment_ids=None, state=None, return_state=False, key=None
    ) -> tuple[jax.Array, Any, Reports]:
        """Maps int32 `[b t]` to `[b t d]` after the final norm, with state and reports."""
        x = constrain(self.embedded(tokens, key), "batch", "length", None)
        out = self.stack(
            x, segment_ids=segment_ids, state=state, return_state=return_state, key=key
        )
        return self.norm(out.x), out.state, out.reports

    def init_state(self, batch_size: int, *, max_length: int | None = None):
        """The state before the first token; max_length sizes caches (attention needs it)."""
        return self.stack.init_state(batch_size, max_length=max_length)

    def unrolled(self):
        """The same model with arrays of its own for each layer: what writes fastest."""
        apart = copy.copy(self)
        apart.stack = self.stack.unrolled()
        return apart

    def unrolled_state(self, state):
        """A state of this model as one of `unrolled()`."""
        return self.stack.unrolled_state(state)

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence while decoding: {recurrent, total}, all layers together."""
        return self.stack.state_bytes(context_length)


# The standard deviation of GPT-2 and of Mamba.
EMBEDDING_INIT = nnx.initializers.normal(0.02)


def logits_of(h: jax.Array, weight: jax.Array, n: int) -> jax.Array:
    """Products of `[... d]` with the first n rows of `[rows d]`, added up in float32 or wider."""
    weight = weight[:n].astype(h.dtype)
    dtype = jnp.promote_types(h.dtype, jnp.float32)
    return jnp.einsum("...d,od->...o", h, weight, preferred_element_type=dtype)
