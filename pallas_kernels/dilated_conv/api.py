"""dilated_conv: what users call. The forms behind it are modules of this folder."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch
from pallas_kernels.core.axes import axes
from pallas_kernels.core.costs import Cost
from pallas_kernels.core.numerics import check_documents, check_shapes, state_dtype
from pallas_kernels.dilated_conv import pallas_gpu, pallas_tpu, reference, xla

FORMS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
AXES = axes("b t e, j w e, j e -> b t e", state="b s e, b, b", independent="b e")
ACTIVATIONS = ("relu_res", "linear")


class DilatedConvState(NamedTuple):
    """What the stack keeps: the past of every level, in rings that lie end to end.

    Level i has (w - 1) * dilations[i] slots; token n of a document (from 0) lies in slot n mod
    that, so that a step writes one slot per level and moves nothing. Slots that the document has
    not reached yet are never looked at.

    Attributes:
        x: `[b s e]`, inputs of the levels; float32 (float64 for float64 inputs).
        count: int32 `[b]`, tokens of the current document so far.
        last_id: int32 `[b]`, id of that document; 0 = none yet, or not tracked.
    """

    x: jax.Array
    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    last_id: jax.Array


def dilated_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    dilations: Sequence[int],
    activation: str = "relu_res",
    symmetric: bool = False,
    initial_state: DilatedConvState | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    config: Any = None,
) -> tuple[jax.Array, DilatedConvState | None]:
    """A stack of dilated convolutions, channel by channel: a temporal convolution network.

        a_i[t] = sum_{j<w} weight[i,j] s_i[t - j dilations[i]] + bias[i]        s_0 = x
        s_{i+1} = s_i + relu(a_i)  (relu_res)   or   a_i  (linear);             y = the last one

    Symmetric: tap j looks back (j - (w-1)/2) dilations[i] tokens, so that half of them look ahead.

    Args:
        x: `[b t e]`, float32, bfloat16 or float64.
        weight: `[j w e]`, levels by taps; tap 0 falls on the current token (causal).
        bias: `[j e]`; None = 0.
        dilations: one per level, at least 1.
        activation: "relu_res" or "linear".
        symmetric: taps on both sides; w must be odd, and there is no state.
        initial_state: where the stream stopped; None = nothing read.
        segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding (before, between or after
            documents, never inside one); None = one document.
        implementation: None = the best that serves, or "reference", "xla", "pallas_tpu",
            "pallas_gpu".
        config: tile sizes and `interpret` of that form; None = its own choice.

    Returns:
        y `[b t e]` in the dtype of x (0 at padding) and the state after the last token (symmetric:
        None). Sums and the levels between are in float32 (float64 for float64 inputs).
        Differentiable in every argument, in initial_state and through the state.

    Raises:
        ValueError: shapes do not fit together, a dilation is below 1, w is even with symmetric, a
            state is given to a symmetric stack, or there is no such activation or implementation.
        TypeError: an array is of the wrong kind.
        NotImplementedError: the implementation that was named does not serve this call.

    Source: the convolution of TCNCA (arXiv 2312.05605), of which only the abstract is public; the
    levels are those of Bai et al. (arXiv 1803.01271), depthwise.

    Differs from source: no dropout between levels; one convolution per level; packed documents and
    streams.
    """
    dilations = _dilations(dilations)
    if activation not in ACTIVATIONS:
        raise ValueError(f"dilated_conv: activation={activation!r}; allowed are {ACTIVATIONS}")
    sizes: dict[str, int] = {"j": len(dilations)}
    check_shapes(
        "dilated_conv", sizes, x=("b t e", x), weight=("j w e", weight), bias=("j e", bias)
    )
    b, t, e, taps = (sizes[x] for x in "btew")
    if taps < 1:
        raise ValueError("dilated_conv: weight has no taps; it must be [j w e] with w at least 1")
    if symmetric and taps % 2 == 0:
        raise ValueError(
            f"dilated_conv: weight has {taps} taps with symmetric=True; an even number has no "
            "middle: take an odd one"
        )
    if symmetric and initial_state is not None:
        raise ValueError(
            "dilated_conv: initial_state is given with symmetric=True; a stack that looks ahead "
            "cannot go on from a state"
        )
    dtype = state_dtype(x, weight, bias)
    fresh = initial_state is None
    sizes["s"] = (taps - 1) * sum(dilations)
    if initial_state is None:
        # One array each: a state is donated, and no buffer can be given away twice.
        count, last_id = (jnp.zeros((b,), jnp.int32) for _ in range(2))
        initial_state = DilatedConvState(jnp.zeros((b, sizes["s"], e), dtype), count, last_id)
    ring, count, last_id = initial_state
    check_shapes("dilated_conv", sizes, initial_state_x=("b s e", ring))
    if count.shape != (b,) or not jnp.issubdtype(count.dtype, jnp.integer):
        raise ValueError(
            f"dilated_conv: count of initial_state is {count.dtype} {count.shape}; it must be "
            f"int32 {(b,)}"
        )
    segment_ids, last_id = check_documents("dilated_conv", sizes, segment_ids, last_id)
    ring, count = ring.astype(dtype), jnp.asarray(count, jnp.int32)
    if 0 in (b, t):
        return x, None if symmetric else DilatedConvState(ring, count, last_id)
    found = dispatch.call(
        "dilated_conv",
        FORMS,
        (x, weight, bias, ring, count, last_id, segment_ids),
        implementation=implementation,
        config=config,
        dilations=dilations,
        activation=activation,
        symmetric=symmetric,
        fresh=fresh,
    )
    if symmetric:
        return found, None
    y, *state = found
    return y, DilatedConvState(*state)


def _dilations(dilations: Sequence[int]) -> tuple[int, ...]:
    dilations = tuple(dilations)
    if not dilations or any(isinstance(d, bool) or not isinstance(d, int) for d in dilations):
        raise TypeError(f"dilated_conv: dilations={dilations}; it must be integers, one per level")
    if min(dilations) < 1:
        raise ValueError(f"dilated_conv: dilations={dilations}; each must be at least 1")
    return dilations


def cost(
    b: int, t: int, e: int, j: int, w: int, *, itemsize: int = 4, backward: bool = False
) -> Cost:
    """What a call costs at least: operations of all levels, bytes if every array moves once."""
    tokens = b * t * e
    if not backward:
        return Cost(flops=j * (2 * w + 3) * tokens, bytes=2 * itemsize * tokens)
    return Cost(flops=j * (6 * w + 5) * tokens, bytes=3 * itemsize * tokens)


dilated_conv.axes = AXES  # type: ignore[attr-defined]
dilated_conv.forms = FORMS  # type: ignore[attr-defined]
dilated_conv.options = dict(dilations=(1, 16, 256))  # type: ignore[attr-defined]  # of a typical call
dilated_conv.sizes = dict(j=3)  # type: ignore[attr-defined]
dilated_conv.cost = cost  # type: ignore[attr-defined]
