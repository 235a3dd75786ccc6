"""Convolution kernels as functions of the lag: a small network of sines, faded by exponentials."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import einsum
from seqzoo.nn import inits
from seqzoo.nn.checks import at_least
from seqzoo.nn.param import Prepared, param

# The slowest and the fastest channel fade to _TARGET over these parts of max_length.
_TARGET, _FAST, _SLOW = 1e-2, 0.3, 1.5


class ImplicitFilter(nnx.Module):
    """Kernels `[e l]` of a long convolution, one per channel, out of few parameters.

        tau_s = s / (L - 1),   omega_s = 2 pi s / L,   f_1 .. f_bands from 1e-4 to bands - 1
        z_s   = [tau_s, cos(f omega_s), -sin(f omega_s)]                  then trained itself
        h     = W_4 sin(a * (W_3 sin(a * (W_2 sin(a * (W_1 z + b_1)) + b_2)) + b_3))
        k_s   = h_s exp(-tau_s |delta|)

    L is max_length; a shorter kernel is the first part of the longest. The frequencies a are one
    vector for all sines; with two_sided a second network of the same z and a gives the lags
    -1, -2, .... delta goes from slow to fast over the channels and is not trained. Beside the
    kernels there is `skip`, what the convolution adds of the present token. All in float32.

    Args:
        width: channels (e).
        max_length: lags at most (L).
        two_sided: whether there are kernels of both directions.
        emb_dim: features of a lag, odd: 1 + 2 bands.
        order: width of the network.
        frequency: what a starts at.
        init_std: standard deviation of the matrices at the start, biases 0; None = uniform within
            +- 1 / sqrt(inputs), biases too.
        lr: peak learning rate of the networks and of a; None = the optimizer's.
        pos_lr: the same of z.
        weight_decay: of the networks' matrices; None = the optimizer's.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: `HyenaFilter` of HazyResearch/m2 (bert/src/mm/hyena_utils.py); Poli et al., "Hyena
    Hierarchy" (arXiv 2302.10866).

    Differs from source: both networks have the rates (there the one of negative lags misses them);
    weight decay spares biases and a, and a step takes learning rate times weight_decay of a matrix,
    as everywhere here: the source's optimizer takes weight_decay alone (times the schedule), 0.1
    being a thousand times as much at a rate of 1e-3.
    """

    def __init__(
        self,
        width: int,
        *,
        max_length: int,
        two_sided: bool = False,
        emb_dim: int = 5,
        order: int = 128,
        frequency: float = 10.0,
        init_std: float | None = 0.02,
        lr: float | None = None,
        pos_lr: float | None = None,
        weight_decay: float | None = None,
        rngs: nnx.Rngs,
    ):
        at_least(1, width=width, max_length=max_length, filter_order=order)
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(f"filter_emb_dim is {emb_dim}; it must be odd and at least 3")
        self.width, self.max_length, self.two_sided = width, max_length, two_sided
        self.z = param(positions(max_length, emb_dim), axes=(None, None), lr=pos_lr, decay=False)
        self.frequency = param(
            jnp.full((order,), frequency, jnp.float32), axes=(None,), lr=lr, decay=False
        )
        network = lambda: SineNetwork(
            (emb_dim, order, order, order, width),
            init_std=init_std,
            lr=lr,
            weight_decay=weight_decay,
            rngs=rngs,
        )
        self.forward = network()
        self.reverse = network() if two_sided else None
        self.skip = param(jax.random.normal(rngs.params(), (width,)), axes=("inner",), decay=False)

    def __call__(self, length: int) -> tuple[jax.Array, jax.Array | None]:
        """The first `length` lags: kernel `[e l]` (lag 0 first), reverse kernel (lag -1 first).

        Raises:
            ValueError: there are not as many.
        """
        _check_length(length, self.max_length)
        z, frequency = self.z[...][:length], self.frequency[...]
        fade = jnp.exp(-_fractions(self.max_length)[:length] * fading(self.width)[:, None])
        kernels = (
            None if network is None else network(z, frequency).T * fade
            for network in (self.forward, self.reverse)
        )
        return tuple(kernels)

    def prepared(self) -> "PreparedFilter":
        """This filter with its kernels computed, for many calls with the same parameters."""
        return PreparedFilter(self)


class PreparedFilter(nnx.Module):
    """The kernels of an ImplicitFilter as arrays; called as that is."""

    def __init__(self, source: ImplicitFilter):
        self.max_length, self.skip = source.max_length, source.skip
        kernel, reverse = source(source.max_length)
        self.kernel = Prepared(kernel)
        self.reverse = None if reverse is None else Prepared(reverse)

    def __call__(self, length: int) -> tuple[jax.Array, jax.Array | None]:
        """See ImplicitFilter."""
        _check_length(length, self.max_length)
        kernels = (self.kernel, self.reverse)
        return tuple(None if one is None else one[...][:, :length] for one in kernels)


class SineNetwork(nnx.Module):
    """Layers with sin(a * .) between them; the last one has no bias. See ImplicitFilter."""

    def __init__(self, widths, *, init_std, lr, weight_decay, rngs: nnx.Rngs):
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        rates = dict(lr=lr, weight_decay=weight_decay)
        last = len(pairs) - 1
        self.weights = nnx.List(
            param(
                _matrix(rngs, n, m, init_std), axes=(None, "inner" if i == last else None), **rates
            )
            for i, (n, m) in enumerate(pairs)
        )
        self.biases = nnx.List(
            param(_vector(rngs, n, m, init_std), axes=(None,), decay=False, lr=lr)
            for n, m in pairs[:-1]
        )

    def __call__(self, z: jax.Array, frequency: jax.Array) -> jax.Array:
        """Maps `[l n]` to `[l m]`."""
        for weight, bias in zip(self.weights, self.biases, strict=False):
            z = jnp.sin(frequency * (einsum("ln,nm->lm", z, weight[...]) + bias[...]))
        return einsum("ln,nm->lm", z, self.weights[-1][...])


def positions(length: int, emb_dim: int) -> jax.Array:
    """What z starts as, `[l emb_dim]`: the fraction of the length, cosines, minus sines."""
    bands = (emb_dim - 1) // 2
    omega = 2 * math.pi * jnp.arange(length, dtype=jnp.float32)[:, None] / length
    angle = omega * jnp.linspace(1e-4, bands - 1, bands, dtype=jnp.float32)
    return jnp.concatenate([_fractions(length)[:, None], jnp.cos(angle), -jnp.sin(angle)], axis=1)


def _check_length(length: int, most: int) -> None:
    if length > most:
        raise ValueError(
            f"{length} tokens are more than the filter has lags: max_length is {most}; set the "
            "mixer's max_length to the longest sequence"
        )


def fading(width: int) -> jax.Array:
    """|delta| `[e]`: how fast each channel fades over max_length."""
    slow, fast = (-math.log(_TARGET) / part for part in (_SLOW, _FAST))
    return jnp.linspace(slow, fast, width, dtype=jnp.float32)


def _fractions(length: int) -> jax.Array:
    return jnp.linspace(0, 1, length, dtype=jnp.float32)


def _matrix(rngs: nnx.Rngs, n: int, m: int, std: float | None) -> jax.Array:
    make = inits.uniform() if std is None else inits.normal(std=std)
    return make(rngs.params(), (n, m))


def _vector(rngs: nnx.Rngs, n: int, m: int, std: float | None) -> jax.Array:
    return inits.uniform_values(rngs, (m,), n) if std is None else jnp.zeros((m,))
