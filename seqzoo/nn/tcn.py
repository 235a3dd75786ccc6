"""A temporal convolution network along time: what TCNCA has where MEGA has a moving average."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.dilated_conv import DilatedConvState, dilated_conv
from seqzoo.nn import inits
from seqzoo.nn.checks import at_least
from seqzoo.nn.linear import linear
from seqzoo.nn.param import param
from seqzoo.nn.sharded import sharded

PRESETS = ("relu_res", "linear", "separable")


class TCN(nnx.Module):
    """A few levels of dilated convolution, channel by channel; K taps, J levels, growth f.

        a_i[t] = sum_{j<K} w_i[j] s_i[t - j f^i] + bias_i                      s_0 = x
        s_{i+1} = s_i + relu(a_i)           relu_res
                = a_i                       linear
                = s_i + relu(a_i W_i)       separable: a matrix over channels per level
        m = silu(s_J + omega x)             without skip: silu(s_J)
        w_i = g_i v_i / |v_i|               with weight_norm, the norm over the taps of a channel

    A token sees 1 + (K-1) (f^J - 1) / (f - 1) tokens, itself included: `receptive_field`. With
    f = K every one of them by exactly one path. Looking both ways it sees half as far to each side.

    The state holds receptive_field - 1 inputs per channel (at R 8,191, width 512: 16 MiB per
    sequence and layer), where a moving average holds a few numbers: the price of a finite response.

    Args:
        d_model: width of the input and output.
        kernel_size: taps of a level (K); odd where it looks both ways.
        dilation_growth: by which the dilation grows from level to level (f), at most kernel_size.
        n_levels: levels (J).
        dilations: one per level, in place of dilation_growth and n_levels; None = those.
        preset: "relu_res", "linear" or "separable".
        causal: looks back only; else both ways.
        weight_norm: size and direction of the taps of a channel are parameters of their own.
        use_bias: whether levels have a bias; it starts at 0.
        skip: add omega x before the last silu.
        max_length: of the longest sequence: levels that could not reach another token of it are
            left out, with a warning; None = leave out nothing.
        implementation: which implementation of the operator ("xla", ...); None = the best.
        dtype: what to compute in; parameters, weight norm, sums and the state are float32.
        rngs: source of the initial values: taps normal with standard deviation 1 / sqrt(K), omega
            normal with 1.

    Raises:
        ValueError: a setting is out of range.

    Source: Terzic et al., "TCNCA" (arXiv 2312.05605), of which only the abstract is public, and Bai
    et al., "An Empirical Evaluation of Generic Convolutional and Recurrent Networks" (arXiv
    1803.01271): weight norm, relu, residual; the last line is that of MEGA's moving average.

    Differs from source: one convolution per level and channel by channel (the second source has two
    dense ones), no dropout between levels; TCNCA's own levels, taps and growth are not known.
    """

    def __init__(
        self,
        d_model: int,
        *,
        kernel_size: int = 16,
        dilation_growth: int = 16,
        n_levels: int = 3,
        dilations: Sequence[int] | None = None,
        preset: str = "relu_res",
        causal: bool = True,
        weight_norm: bool = True,
        use_bias: bool = True,
        skip: bool = True,
        max_length: int | None = None,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        at_least(1, d_model=d_model, kernel_size=kernel_size)
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}; allowed: {', '.join(PRESETS)}")
        if not causal and kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size is {kernel_size} and causal false: an even number of taps has no "
                "middle; take an odd one"
            )
        self.dilations = fitting(
            _dilations(kernel_size, dilation_growth, n_levels, dilations),
            kernel_size,
            max_length,
            causal,
        )
        self.kernel_size, self.preset, self.causal = kernel_size, preset, causal
        self.causality = "exact" if causal else "none"
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))
        self.d_model, levels = d_model, len(self.dilations)

        normal = lambda *shape: jax.random.normal(rngs.params(), shape)
        v = normal(levels, kernel_size, d_model) * kernel_size**-0.5
        # The size of v has no effect under weight norm: what decays is then g.
        self.v = param(v, axes=(None, "conv", "inner"), decay=not weight_norm)
        g = jnp.linalg.norm(v, axis=1)
        self.g = param(g, axes=(None, "inner")) if weight_norm else None
        zero = jnp.zeros((levels, d_model))
        self.bias = param(zero, axes=(None, "inner"), decay=False) if use_bias else None
        self.omega = param(normal(d_model), axes=("inner",), decay=False) if skip else None
        mixing = levels if preset == "separable" else 0
        self.mixes = nnx.List(
            linear(
                d_model,
                d_model,
                axes=("embed", "inner"),
                kernel_init=inits.normal(),
                dtype=self.dtype,
                rngs=rngs,
            )
            for _ in range(mixing)
        )

    @property
    def receptive_field(self) -> int:
        """Tokens that a token sees, itself included."""
        return receptive_field(self.kernel_size, self.dilations)

    @property
    def weight(self) -> jax.Array:
        """The taps `[j w e]`, float32."""
        v = self.v[...]
        if self.g is None:
            return v
        square = jnp.sum(v * v, axis=1, keepdims=True)
        # Taps that are all 0 have no direction: they stay 0, and their gradient is finite.
        size = jnp.sqrt(jnp.where(square > 0, square, 1.0))
        return self.g[...][:, None] * v / size

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: Any = None
    ) -> tuple[jax.Array, Any]:
        """Maps `[b t d]` to `[b t d]` in `dtype`, and gives the state after the last token.

        Args:
            x: `[b t d]`, any float type; 0 at padding.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Raises:
            NotImplementedError: a state for a network that looks both ways.
        """
        if state is not None:
            self._refuse_streams("a state")
        x = x.astype(self.dtype)
        s, state = self._levels(x, segment_ids, state)
        if self.omega is not None:
            s = s + (self.omega[...] * x).astype(s.dtype)
        return jax.nn.silu(s), state

    def step(self, x_t: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        self._refuse_streams("step")
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def init_state(self, batch_size: int) -> Any:
        """The state before the first token: a ring per level."""
        self._refuse_streams("init_state")

        dtype = state_dtype(self.dtype)

        def empty(dilations):
            slots = (self.kernel_size - 1) * sum(dilations)
            count, last_id = (jnp.zeros((batch_size,), jnp.int32) for _ in range(2))
            return DilatedConvState(
                jnp.zeros((batch_size, slots, self.d_model), dtype), count, last_id
            )

        if self.preset == "separable":
            return tuple(empty((d,)) for d in self.dilations)
        return empty(self.dilations)

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: the rings, and with their counts and ids."""
        del context_length
        self._refuse_streams("state_bytes")
        rings = state_dtype(self.dtype).itemsize * self.d_model * (self.receptive_field - 1)
        counts = len(self.dilations) if self.preset == "separable" else 1
        return {"recurrent": rings, "total": rings + 8 * counts}

    def _levels(self, x, segment_ids, state):
        bias = None if self.bias is None else self.bias[...]
        if self.preset != "separable":
            return self._convolve(
                x, self.weight, bias, self.dilations, self.preset, segment_ids, state
            )
        weight, states = self.weight, []
        for i, dilation in enumerate(self.dilations):
            a, after = self._convolve(
                x,
                weight[i : i + 1],
                None if bias is None else bias[i : i + 1],
                (dilation,),
                "linear",
                segment_ids,
                None if state is None else state[i],
            )
            states.append(after)
            x = x + jax.nn.relu(self.mixes[i](a))
        return x, tuple(states) if self.causal else None

    def _convolve(self, x, weight, bias, dilations, activation, segment_ids, state):
        return sharded(
            dilated_conv,
            x,
            weight,
            bias,
            dilations=dilations,
            activation=activation,
            symmetric=not self.causal,
            initial_state=state,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def _refuse_streams(self, what: str) -> None:
        if not self.causal:
            raise NotImplementedError(
                f"{what}: this network looks both ways (causal=false), so a token's output depends "
                "on tokens that a stream has not read yet"
            )


def receptive_field(kernel_size: int, dilations: Sequence[int]) -> int:
    """Tokens that a token sees through levels of these dilations, itself included."""
    return 1 + (kernel_size - 1) * sum(dilations)


def _dilations(kernel_size, growth, n_levels, dilations) -> tuple[int, ...]:
    if dilations is None:
        at_least(1, dilation_growth=growth, n_levels=n_levels)
        if growth > kernel_size:
            raise ValueError(
                f"dilation_growth is {growth} and kernel_size {kernel_size}: growth above the taps "
                "leaves holes that no token sees; take dilation_growth <= kernel_size"
            )
        return tuple(growth**i for i in range(n_levels))
    dilations = tuple(int(d) for d in dilations)
    if not dilations:
        raise ValueError("dilations is []; name one per level, at least one")
    at_least(1, **{f"dilations[{i}]": d for i, d in enumerate(dilations)})
    reach = 1
    for d in sorted(dilations):
        if d > reach:
            warnings.warn(
                f"dilations {list(dilations)} with kernel_size {kernel_size} leave holes: tokens "
                f"between {reach} and {d} back are not all seen",
                stacklevel=4,
            )
            break
        reach += (kernel_size - 1) * d
    return dilations


def fitting(
    dilations: tuple[int, ...], kernel_size: int, max_length: int | None, causal: bool
) -> tuple[int, ...]:
    """The levels that reach another token of a sequence; warns of what is more than is there.

    Args:
        dilations: of all levels.
        kernel_size: taps of a level.
        max_length: tokens of the longest sequence; None = any.
        causal: looks back only.
    """
    if max_length is None:
        return dilations
    at_least(1, max_length=max_length)
    kept = tuple(d for d in dilations if d < max_length) or dilations[:1]
    if len(kept) < len(dilations):
        dead = sorted(set(dilations) - set(kept))
        warnings.warn(
            f"sequences of {max_length} tokens: levels of dilation {dead} reach no other token and "
            "are left out",
            stacklevel=3,
        )
    seen = receptive_field(kernel_size, kept)
    reach = seen if causal else (seen + 1) // 2
    if reach > max_length:
        warnings.warn(
            f"the receptive field is {seen} tokens{'' if causal else ' (half to each side)'}, more "
            f"than sequences of {max_length} have: taps that reach beyond them see zeros",
            stacklevel=3,
        )
    return kept
