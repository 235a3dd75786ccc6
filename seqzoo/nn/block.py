"""One layer of a stack: a sequence mixer and perhaps a channel mixer, each behind a norm."""

import jax
from flax import nnx

from seqzoo.nn.dropout import dropout
from seqzoo.nn.linear import NORMS


class Block(nnx.Module):
    """x <- x + mixer(norm(x)),  then  x <- x + channel_mixer(norm(x)) where there is one.

    Args:
        d_model: width of the residual stream.
        mixer: `mixer(rngs=...)` makes the sequence mixer.
        channel_mixer: `channel_mixer(rngs=...)` makes the channel mixer; None = there is none.
        norm: "rmsnorm" or "layernorm".
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
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        make_norm = lambda: NORMS[norm](d_model, eps=norm_eps, dtype=dtype, rngs=rngs)
        self.dropout = dropout
        self.mixer_norm, self.mixer = make_norm(), mixer(rngs=rngs)
        self.channel_norm = None if channel_mixer is None else make_norm()
        self.channel_mixer = None if channel_mixer is None else channel_mixer(rngs=rngs)

    def __call__(self, x: jax.Array, *, segment_ids=None, state=None, key=None):
        """Maps `[b t d]` to `[b t d]`; returns it with the mixer's state after the last token."""
        keys = (None, None) if key is None else jax.random.split(key)
        y, state = self.mixer(self.mixer_norm(x), segment_ids=segment_ids, state=state)
        x = x + dropout(y, self.dropout, keys[0]).astype(x.dtype)
        return self._mix_channels(x, keys[1]), state

    def step(self, x_t: jax.Array, state):
        """One token `[b d]`."""
        y, state = self.mixer.step(self.mixer_norm(x_t), state)
        return self._mix_channels(x_t + y.astype(x_t.dtype), None), state

    def _mix_channels(self, x, key):
        if self.channel_mixer is None:
            return x
        y = self.channel_mixer(self.channel_norm(x))
        return x + dropout(y, self.dropout, key).astype(x.dtype)
