"""What language models, classifiers and encoders share: embedding, stack, final norm."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.nn.checks import at_least
from seqzoo.nn.dropout import dropout
from seqzoo.nn.linear import NORMS, linear
from seqzoo.nn.param import metadata
from seqzoo.nn.positions import LearnedPositions, PositionState
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


class TrunkState(NamedTuple):
    """The state of a model with learned positions; without them it is that of the stack alone.

    Attributes:
        stack: of the layers.
        positions: where the stream stands in its document.
    """

    stack: Any
    positions: PositionState


class Trunk(nnx.Module):
    """h = norm(stack(embedding(tokens))): everything of a model but its head.

    The embedding of token x at place p of its document is
    dropout(norm(embed_scale * table[x] + positions[p])), where positions and norm are optional.
    With `input_dim` there is no table: what comes in are vectors, and a linear layer embeds them.

    Args:
        vocab_size: tokens are 0 .. vocab_size - 1; of no matter with input_dim.
        d_model: width of the residual stream.
        n_layers: layers in all.
        pattern: mixers by name, repeated to n_layers.
        mixers: what makes each of them.
        channel_mixer: what makes the channel mixer after each; None = there is none.
        norm: "rmsnorm", "layernorm" or "scalenorm".
        norm_place: "pre" = what a mixer reads is normalised; "post" = the sum behind it.
        norm_eps: added under the root of the norms.
        final_norm: a norm after the last layer; post-norm stacks have none.
        positions: "none", or "learned" = a row per place in the document is added to embeddings.
        max_positions: rows of that table, the longest document; needed with learned positions.
        embed_norm: a norm of the embeddings, positions included.
        embed_std: standard deviation that embeddings start with. Small ones are soon overwritten
            by what the first mixer adds; recall of rare tokens is learnt faster from large ones.
        embed_scale: embeddings are multiplied by it.
        embed_decay: whether weight decay applies to the table of embeddings.
        input_dim: width of the vectors that come in place of tokens; None = tokens.
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
        norm_place: str = "pre",
        norm_eps: float = 1e-5,
        final_norm: bool = True,
        positions: str = "none",
        max_positions: int | None = None,
        embed_norm: bool = False,
        embed_std: float = 0.02,
        embed_scale: float = 1.0,
        embed_decay: bool = True,
        input_dim: int | None = None,
        pad_vocab_multiple: int = 8,
        dropout: float = 0.0,
        embed_dropout: float = 0.0,
        remat: str = "none",
        residual_dtype: str = "float32",
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        read = dict(vocab_size=vocab_size) if input_dim is None else dict(input_dim=input_dim)
        at_least(1, d_model=d_model, **read)
        if pad_vocab_multiple < 1:
            raise ValueError(f"pad_vocab_multiple is {pad_vocab_multiple}; it must be at least 1")
        for name, rate in dict(dropout=dropout, embed_dropout=embed_dropout).items():
            if not 0 <= rate < 1:
                raise ValueError(f"{name} is {rate}; it must lie in [0, 1)")
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; allowed: {', '.join(NORMS)}")
        if positions not in POSITIONS:
            raise ValueError(f"positions is {positions!r}; allowed: {', '.join(POSITIONS)}")
        if positions == "learned" and max_positions is None:
            raise ValueError("positions is 'learned'; set max_positions, the longest document")
        if embed_std <= 0:
            raise ValueError(f"embed_std is {embed_std}; it must be above 0")
        for name, value in dict(dtype=dtype, residual_dtype=residual_dtype).items():
            if value == "float16":
                raise ValueError(
                    f"{name} is 'float16', which is not served: what exceeds 65504 is infinite, "
                    "and no loss is scaled for it; set bfloat16"
                )
            if value not in ("float32", "bfloat16", "float64"):
                raise ValueError(
                    f"{name} is {value!r}; allowed: float32, bfloat16 (float64 with jax_enable_x64)"
                )

        self.vocab_size, self.d_model = vocab_size, d_model
        self.embed_dropout, self.residual_dtype = embed_dropout, residual_dtype
        self.embed_scale, self.input_dim = embed_scale, input_dim
        # Each assigned once: an attribute that was None first would be static.
        if input_dim is None:
            rows = -(-vocab_size // pad_vocab_multiple) * pad_vocab_multiple
            self.embed = nnx.Embed(
                rows,
                d_model,
                embedding_init=nnx.initializers.normal(embed_std),
                embedding_metadata=metadata("vocab", "embed", decay=embed_decay),
                rngs=rngs,
            )
        else:
            self.embed = linear(input_dim, d_model, axes=(None, "embed"), use_bias=True, rngs=rngs)
        self.stack = Stack(
            d_model,
            n_layers=n_layers,
            pattern=pattern,
            mixers=mixers,
            channel_mixer=channel_mixer,
            norm=norm,
            norm_place=norm_place,
            norm_eps=norm_eps,
            dropout=dropout,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )
        make_norm = lambda dtype: NORMS[norm](d_model, eps=norm_eps, dtype=dtype, rngs=rngs)
        self.norm = make_norm(dtype) if final_norm else None
        self.embed_norm = make_norm(residual_dtype) if embed_norm else None
        if positions == "learned":
            self.positions = LearnedPositions(d_model, max_positions=max_positions, rngs=rngs)
        else:
            self.positions = None

    def embedded(self, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Embeds whole sequences, int32 `[b t]` (vectors: `[b t c]`), as `[b t d]` in the dtype of
        the residual stream."""
        return self._embedded(tokens, self._places(tokens, None, None)[0], key)

    def hidden(
        self, tokens: jax.Array, *, segment_ids=None, state=None, return_state=False, key=None
    ) -> tuple[jax.Array, Any, Reports]:
        """Maps int32 `[b t]` to `[b t d]` after the final norm, with state and reports."""
        places, positions = self._places(tokens, segment_ids, state)
        x = constrain(self._embedded(tokens, places, key), "batch", "length", None)
        out = self.stack(
            x,
            segment_ids=segment_ids,
            state=state if self.positions is None or state is None else state.stack,
            return_state=return_state,
            key=key,
        )
        new = TrunkState(out.state, positions) if positions is not None else out.state
        return self._normed(out.x), new if return_state else None, out.reports

    def hidden_step(self, token: jax.Array, state) -> tuple[jax.Array, Any]:
        """One token int32 `[b]`: `[b d]` after the final norm, and the state after it."""
        if self.positions is None:
            x, state = self.stack.step(self._embedded(token, None), state)
            return self._normed(x), state
        place, positions = self.positions.step(state.positions)
        x, stack = self.stack.step(self._embedded(token, place), state.stack)
        return self._normed(x), TrunkState(stack, positions)

    def _places(self, tokens, segment_ids, state):
        """What positions add, `[b t d]`, and their state after the last token; (None, None)."""
        if self.positions is None:
            return None, None
        b, t = tokens.shape[:2]
        state = None if state is None else state.positions
        return self.positions(t, segment_ids=segment_ids, state=state, batch=b)

    def _embedded(self, tokens, places, key=None):
        vectors = jnp.issubdtype(tokens.dtype, jnp.floating)
        if vectors != (self.input_dim is not None):
            raise ValueError(
                f"the model was given {tokens.dtype} {tokens.shape}, and model.input_dim is "
                f"{self.input_dim}; vectors [b t c] need input_dim=c, tokens [b t] need null"
            )
        x = self.embed(tokens) if vectors else self.embed.embedding[...][tokens]
        if self.embed_scale != 1:
            x = x * self.embed_scale
        x = x if places is None else x + places
        x = x if self.embed_norm is None else self.embed_norm(x)
        key = None if key is None else jax.random.fold_in(key, _EMBED_KEY)
        return dropout(x.astype(self.residual_dtype), self.embed_dropout, key)

    def _normed(self, x):
        return x if self.norm is None else self.norm(x)

    def init_state(self, batch_size: int, *, max_length: int | None = None):
        """The state before the first token; max_length sizes caches (attention needs it)."""
        state = self.stack.init_state(batch_size, max_length=max_length)
        if self.positions is None:
            return state
        return TrunkState(state, self.positions.init_state(batch_size))

    def prepared(self):
        """The same model with what follows from its parameters alone computed.

        Kernels of convolutions, say, which a call else makes anew. For many forward passes with
        the same parameters: what is computed is not trained.
        """
        ready = copy.copy(self)
        ready.stack = self.stack.prepared()
        return ready

    def unrolled(self):
        """The same model with arrays of its own for each layer: what writes fastest."""
        apart = copy.copy(self)
        apart.stack = self.stack.unrolled()
        return apart

    def unrolled_state(self, state):
        """A state of this model as one of `unrolled()`."""
        if self.positions is None:
            return self.stack.unrolled_state(state)
        return state._replace(stack=self.stack.unrolled_state(state.stack))

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence while decoding: {recurrent, total}, all layers together."""
        found = self.stack.state_bytes(context_length)
        counters = 0 if self.positions is None else 8  # a count and an id
        return found | {"total": found["total"] + counters}


POSITIONS = ("none", "learned")

# The standard deviation of GPT-2 and of Mamba.
EMBEDDING_INIT = nnx.initializers.normal(0.02)


def logits_of(h: jax.Array, weight: jax.Array, n: int) -> jax.Array:
    """Products of `[... d]` with the first n rows of `[rows d]`, added up in float32 or wider."""
    weight = weight[:n].astype(h.dtype)
    dtype = jnp.promote_types(h.dtype, jnp.float32)
    return jnp.einsum("...d,od->...o", h, weight, preferred_element_type=dtype)
