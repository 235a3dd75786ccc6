"""One layer of a stack: a sequence mixer and perhaps a channel mixer, each behind a norm."""

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.nn.dropout import dropout
from seqzoo.nn.linear import NORMS

NORM_PLACES = ("pre", "post")


class Block(nnx.Module):
    """x <- x + mixer(norm(x)),  then  x <- x + channel_mixer(norm(x)) where there is one.

    With norm_place = "post":  x <- norm(x + mixer(x)),  then  x <- norm(x + channel_mixer(x)).

    A mixer whose attribute `owns_residual` is true takes the stream as it is and gives the new one:
    x <- mixer(x), without a norm and without an addition of the block's. Such are MEGA (a gated
    residual behind a norm of its own) and the mixer of M2-BERT (a second convolution of its input).

    Args:
        d_model: width of the residual stream.
        mixer: `mixer(rngs=...)` makes the sequence mixer.
        channel_mixer: `channel_mixer(rngs=...)` makes the channel mixer; None = there is none.
        norm: "rmsnorm", "layernorm" or "scalenorm".
        norm_place: "pre" = what a mixer reads is normalised; "post" = the sum behind it.
        norm_eps: added under the root of the norms.
        dropout: rate, on what each mixer adds.
        dtype: what the mixers compute in; the residual stream keeps the dtype it comes in.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        d_model: int,
        *,
        mixer,
        channel_mixer=None,
        norm: str = "rmsnorm",
        norm_place: str = "pre",
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        # Behind a sum the norm gives the stream itself, which does not narrow to `dtype`.
        norm_dtype = dtype if norm_place == "pre" else str(jnp.promote_types(dtype, jnp.float32))
        make_norm = lambda: NORMS[norm](d_model, eps=norm_eps, dtype=norm_dtype, rngs=rngs)
        self.dropout, self.norm_place = dropout, norm_place
        mixer_norm, self.mixer = make_norm(), mixer(rngs=rngs)
        self.owns_residual = bool(getattr(self.mixer, "owns_residual", False))
        self.mixer_norm = None if self.owns_residual else mixer_norm
        self.channel_norm = None if channel_mixer is None else make_norm()
        self.channel_mixer = None if channel_mixer is None else channel_mixer(rngs=rngs)

    def __call__(self, x: jax.Array, *, segment_ids=None, state=None, key=None):
        """Maps `[b t d]` to `[b t d]`; returns it with the mixer's state after the last token."""
        keys = (None, None) if key is None else jax.random.split(key)
        mix = lambda x: self.mixer(x, segment_ids=segment_ids, state=state)
        x, state = self._mix_tokens(mix, x, keys[0])
        return self._mix_channels(x, keys[1]), state

    def step(self, x_t: jax.Array, state):
        """One token `[b d]`."""
        x_t, state = self._mix_tokens(lambda x_t: self.mixer.step(x_t, state), x_t, None)
        return self._mix_channels(x_t, None), state

    def _mix_tokens(self, mix, x, key):
        if self.owns_residual:
            y, state = mix(x)
            return y.astype(x.dtype), state
        y, state = mix(self._before(self.mixer_norm, x))
        return self._added(self.mixer_norm, x, y, key), state

    def _mix_channels(self, x, key):
        if self.channel_mixer is None:
            return x
        y = self.channel_mixer(self._before(self.channel_norm, x))
        return self._added(self.channel_norm, x, y, key)

    def _before(self, norm, x):
        return norm(x) if self.norm_place == "pre" else x

    def _added(self, norm, x, y, key):
        x = x + dropout(y, self.dropout, key).astype(x.dtype)
        return x if self.norm_place == "pre" else norm(x).astype(x.dtype)
