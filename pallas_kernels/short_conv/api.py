"""short_conv: what users call. The forms behind it are modules of this folder."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch
from pallas_kernels.core.axes import axes
from pallas_kernels.core.numerics import check_documents, check_shapes, state_dtype
from pallas_kernels.short_conv import pallas_gpu, pallas_tpu, reference, xla
from pallas_kernels.short_conv.cost import cost

FORMS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
AXES = axes("b t e, w e, e -> b t e", state="b w e, b", independent="b e")
ACTIVATIONS = (None, "silu")


class ShortConvState(NamedTuple):
    """What the convolution keeps.

    Attributes:
        x: `[b w-1 e]`, the last inputs of the document it is in, the newest last, zeros before its
            start; float32 (float64 for float64 inputs).
        last_id: int32 `[b]`, id of that document; 0 = none yet, or not tracked.
    """

    x: jax.Array
    last_id: jax.Array


def short_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    initial_state: ShortConvState | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    config: Any = None,
) -> tuple[jax.Array, ShortConvState]:
    """A causal convolution of few taps, channel by channel.

        y_t = activation(sum_{i=0}^{w-1} weight_i x_{t-w+1+i} + bias)

    Args:
        x: `[b t e]`, float32, bfloat16 or float64.
        weight: `[w e]`; the last tap falls on the current token.
        bias: `[e]`; None = 0.
        activation: None or "silu".
        initial_state: where the stream stopped; None = zeros.
        segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding (before, between or after
            documents, never inside one); None = one document.
        implementation: None = the best that serves, or "reference", "xla", "pallas_tpu",
            "pallas_gpu".
        config: tile sizes and `interpret` of that form; None = its own choice.

    Returns:
        y `[b t e]` in the dtype of x (0 at padding) and the state after the last token. Sums are in
        float32 (float64 for float64 inputs). Differentiable in every argument, in initial_state and
        through the state.

    Raises:
        ValueError: shapes do not fit together, or there is no such activation or implementation.
        TypeError: an array is of the wrong kind.
        NotImplementedError: the implementation that was named does not serve this call.

    Source: the `causal_conv1d` of Mamba (arXiv 2312.00752, section 3.4).

    Differs from source: time is the second axis; packed documents and streams.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"short_conv: activation={activation!r}; allowed are {ACTIVATIONS}")
    sizes: dict[str, int] = {}
    check_shapes(
        "short_conv",
        sizes,
        x=("b t e", x),
        weight=("w e", weight),
        bias=("e", bias),
    )
    if sizes["w"] < 1:
        raise ValueError("short_conv: weight has no taps; it must be [w e] with w at least 1")
    dtype = state_dtype(x, weight, bias)
    sizes["w-1"] = sizes["w"] - 1
    if initial_state is None:
        before = jnp.zeros((sizes["b"], sizes["w-1"], sizes["e"]), dtype)
        initial_state = ShortConvState(before, jnp.zeros((sizes["b"],), jnp.int32))
    check_shapes("short_conv", sizes, initial_state_x=("b w-1 e", initial_state.x))
    before, last_id = initial_state
    segment_ids, last_id = check_documents("short_conv", sizes, segment_ids, last_id)
    if 0 in (sizes["b"], sizes["t"]):
        return x, ShortConvState(before.astype(dtype), last_id)
    y, before, last_id = dispatch.call(
        "short_conv",
        FORMS,
        (x, weight, bias, before.astype(dtype), last_id, segment_ids),
        implementation=implementation,
        config=config,
        activation=activation,
    )
    return y, ShortConvState(before, last_id)


short_conv.axes = AXES  # type: ignore[attr-defined]
short_conv.forms = FORMS  # type: ignore[attr-defined]
short_conv.cost = cost  # type: ignore[attr-defined]
