"""selective_scan: what users call. The forms behind it are modules of this folder."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch
from pallas_kernels.core.axes import axes
from pallas_kernels.core.numerics import check_documents, check_shapes, state_dtype
from pallas_kernels.selective_scan import pallas_gpu, pallas_tpu, reference, xla
from pallas_kernels.selective_scan.cost import cost

FORMS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
AXES = axes(
    "b t e, b t e, e n, b t n, b t n, e, b t e, e -> b t e",
    state="b e n, b",
    independent="b e",
)


class SelectiveScanState(NamedTuple):
    """What the recurrence keeps.

    Attributes:
        h: `[b e n]`, float32 (float64 for float64 inputs).
        last_id: int32 `[b]`, id of the document it is in; 0 = none yet, or not tracked.
    """

    h: jax.Array
    last_id: jax.Array


def selective_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: SelectiveScanState | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    config: Any = None,
) -> tuple[jax.Array, SelectiveScanState]:
    """A diagonal recurrence whose step size, input and output depend on the token.

        d_t = delta_t + delta_bias,  through softplus if delta_softplus          seconds, > 0
        h_t = exp(d_t A) h_{t-1} + d_t B_t u_t
        y_t = (sum_n C_t h_t + D u_t) silu(z_t)

    Args:
        u: `[b t e]`, float32, bfloat16 or float64.
        delta: `[b t e]`.
        A: `[e n]`, negative: rates of decay per second.
        B: `[b t n]`.
        C: `[b t n]`.
        D: `[e]`, what of u goes straight to y; None = nothing.
        z: `[b t e]`, gate; None = none.
        delta_bias: `[e]`; None = 0.
        delta_softplus: whether delta goes through softplus.
        initial_state: where the stream stopped; None = zeros.
        segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document.
        implementation: None = the best that serves, or "reference", "xla", "pallas_tpu",
            "pallas_gpu".
        config: tile sizes and `interpret` of that form; None = its own choice.

    Returns:
        y `[b t e]` in the dtype of u (0 at padding) and the state after the last token. Sums and
        the state are in float32 (float64 for float64 inputs). Differentiable in every argument, in
        initial_state and through the state.

    Raises:
        ValueError: shapes do not fit together, or there is no such implementation.
        TypeError: an array is of the wrong kind.
        NotImplementedError: the implementation that was named does not serve this call.

    Source: Gu and Dao, "Mamba" (arXiv 2312.00752), algorithm 2; `selective_scan_ref` of
    state-spaces/mamba.

    Differs from source: time is the second axis; packed documents and streams; the gradient of the
    last state is propagated; real A, one group of B and C.
    """
    sizes: dict[str, int] = {}
    check_shapes(
        "selective_scan",
        sizes,
        u=("b t e", u),
        delta=("b t e", delta),
        A=("e n", A),
        B=("b t n", B),
        C=("b t n", C),
        D=("e", D),
        z=("b t e", z),
        delta_bias=("e", delta_bias),
    )
    dtype = state_dtype(u, delta, A, B, C, D, z, delta_bias)
    if initial_state is None:
        h = jnp.zeros((sizes["b"], sizes["e"], sizes["n"]), dtype)
        initial_state = SelectiveScanState(h, jnp.zeros((sizes["b"],), jnp.int32))
    check_shapes("selective_scan", sizes, initial_state_h=("b e n", initial_state.h))
    h, last_id = initial_state
    segment_ids, last_id = check_documents("selective_scan", sizes, segment_ids, last_id)
    if 0 in (sizes["b"], sizes["t"]):
        return u, SelectiveScanState(h.astype(dtype), last_id)
    y, h, last_id = dispatch.call(
        "selective_scan",
        FORMS,
        (u, delta, A, B, C, D, z, delta_bias, h.astype(dtype), last_id, segment_ids),
        implementation=implementation,
        config=config,
        delta_softplus=delta_softplus,
    )
    return y, SelectiveScanState(h, last_id)


selective_scan.axes = AXES  # type: ignore[attr-defined]
selective_scan.forms = FORMS  # type: ignore[attr-defined]
selective_scan.cost = cost  # type: ignore[attr-defined]
