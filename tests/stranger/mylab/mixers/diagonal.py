"""S4D-Real, as a stranger would add it: written from docs/add_a_mixer.md alone.

h_t = exp(dt A) h_{t-1} + dt B x_t,    y_t = C h_t + D x_t,    A_n = -(n + 1), per channel.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.segments import boundaries
from seqzoo.nn.linear import linear
from seqzoo.nn.param import param


class Diagonal(nnx.Module):
    """A diagonal linear state space with fixed real decays, gated by nothing.

    Args:
        d_model: width of the input and output.
        d_state: states per channel, at least 1.
        dtype: what to compute the output projection in.
        rngs: source of the initial values.
    """

    def __init__(self, d_model: int, *, d_state: int = 16, dtype: str = "float32", rngs: nnx.Rngs):
        if d_state < 1:
            raise ValueError(f"d_state is {d_state}; it must be at least 1")
        self.d_model, self.d_state, self.dtype = d_model, d_state, dtype
        span = jnp.exp(jax.random.uniform(rngs.params(), (d_model,), minval=-6.9, maxval=-2.3))
        self.log_dt = param(jnp.log(span), axes=("embed",), decay=False)
        self.B = param(jnp.ones((d_model, d_state)), axes=("embed", "state"), decay=False)
        self.C = param(
            jax.random.normal(rngs.params(), (d_model, d_state)) / d_state**0.5,
            axes=("embed", "state"),
        )
        self.D = param(jnp.ones((d_model,)), axes=("embed",), decay=False)
        self.out = linear(d_model, d_model, axes=("embed", "embed"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, *, max_length: int | None = None):
        del max_length  # what it keeps does not grow with the length
        h = jnp.zeros((batch_size, self.d_model, self.d_state), jnp.float32)
        return {"h": h, "last_id": jnp.zeros((batch_size,), jnp.int32)}

    def __call__(self, x, *, segment_ids=None, state=None):
        if state is None:
            state = self.init_state(x.shape[0])
        if segment_ids is None:
            reset = jnp.zeros(x.shape[:2], bool)
            valid, last_id = jnp.ones(x.shape[:2], bool), state["last_id"]
        else:
            reset, valid, last_id = boundaries(segment_ids, state["last_id"])
        dt = jnp.exp(self.log_dt[...])[:, None]
        decay = jnp.exp(-dt * jnp.arange(1, self.d_state + 1))
        gain, readout, skip = dt * self.B[...], self.C[...], self.D[...]

        def one(h, token):
            x_t, reset_t, valid_t = token
            x_t = x_t.astype(jnp.float32)
            fresh = jnp.where(reset_t[:, None, None], 0.0, h)
            new = decay * fresh + gain * x_t[..., None]
            h = jnp.where(valid_t[:, None, None], new, h)
            y = jnp.sum(readout * h, -1) + skip * x_t
            return h, jnp.where(valid_t[:, None], y, 0.0)

        swap = lambda a: jnp.swapaxes(a, 0, 1)
        h, y = jax.lax.scan(one, state["h"], (swap(x), swap(reset), swap(valid)))
        y = self.out(jax.nn.gelu(swap(y)).astype(self.dtype))
        return y, {"h": h, "last_id": last_id}

    def step(self, x_t, state):
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def state_bytes(self, context_length: int) -> dict[str, int]:
        del context_length
        recurrent = 4 * self.d_model * self.d_state
        return {"recurrent": recurrent, "total": recurrent + 4}
