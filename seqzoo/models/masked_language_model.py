"""An encoder that says what stood where tokens were hidden, over any pattern of mixers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.models.trunk import ModelOutput, Trunk, logits_of
from seqzoo.nn import inits
from seqzoo.nn.linear import NORMS, linear
from seqzoo.nn.param import param

_NO_STATE = "a masked language model reads whole sequences: there is nothing to decode from"


class MaskedLanguageModel(Trunk):
    """logits_t = E norm(gelu(W h_t + b)) + c,   h = stack(embedding(tokens)),   E the embedding.

    A distribution over what stands at each place; those places count that the data has hidden
    (seqzoo.data.masked). With mixers that look both ways (`causal: false`) it is BERT with another
    mixer. It has no state and no step.

    Args:
        vocab_size: tokens are 0 .. vocab_size - 1, the mask among them.
        head_init_std: standard deviation that W starts with; None = 1 / sqrt(d_model).
        rngs: source of the initial values.
        **trunk: d_model, n_layers, pattern, mixers and the other keywords of `Trunk`.

    Raises:
        ValueError: a setting is out of range.

    Source: Devlin et al., "BERT" (arXiv 1810.04805), appendix A.2 and its released code (the head);
    M2-BERT (arXiv 2310.12109) has the same. Differs from source: no embedding of token types, a
    constant there.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        head_init_std: float | None = None,
        rngs: nnx.Rngs,
        **trunk: Any,
    ):
        if trunk.get("input_dim") is not None:
            raise ValueError("input_dim is set: a masked language model reads tokens, no vectors")
        super().__init__(vocab_size, rngs=rngs, **trunk)
        self.head = MaskedTokenHead(
            self.d_model,
            self.embed.num_embeddings,
            init_std=head_init_std,
            norm=trunk.get("norm", "rmsnorm"),
            norm_eps=trunk.get("norm_eps", 1e-5),
            dtype=trunk.get("dtype", "float32"),
            rngs=rngs,
        )

    def __call__(self, tokens: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """Logits `[b t o]` float32 of what stands at each place of int32 `[b t]`."""
        return self.run(tokens, segment_ids=segment_ids).logits

    def run(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> ModelOutput:
        """Reads whole sequences.

        Args:
            tokens: int32 `[b t]`, hidden ones replaced.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document.
            key: a PRNG key turns dropout on.
        """
        h, _, reports = self.hidden(tokens, segment_ids=segment_ids, key=key)
        logits = logits_of(self.head(h), self.embed.embedding[...], self.vocab_size)
        return ModelOutput(logits + self.head.bias[...][: self.vocab_size], None, reports)

    def init_state(self, batch_size: int, *, max_length: int | None = None):
        """There is none."""
        raise NotImplementedError(_NO_STATE)

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """There is none."""
        raise NotImplementedError(_NO_STATE)


class MaskedTokenHead(nnx.Module):
    """norm(gelu(W h + b)), with the exact GELU, and the bias of the logits.

    Args:
        d_model: width.
        rows: of the embedding: the length of the bias.
        init_std: standard deviation that W starts with; None = 1 / sqrt(d_model).
        norm: name of the norm.
        norm_eps: added under its root.
        dtype: what to compute in.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        d_model: int,
        rows: int,
        *,
        init_std: float | None,
        norm: str,
        norm_eps: float,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.dense = linear(
            d_model,
            d_model,
            axes=("embed", None),
            use_bias=True,
            kernel_init=inits.normal(1, init_std),
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = NORMS[norm](d_model, eps=norm_eps, dtype=dtype, rngs=rngs)
        self.bias = param(jnp.zeros((rows,)), axes=("vocab",), decay=False)

    def __call__(self, h: jax.Array) -> jax.Array:
        """Maps `[b t d]` to `[b t d]`."""
        return self.norm(jax.nn.gelu(self.dense(h), approximate=False))
