"""simple_gla: what users call. The forms behind it are modules of this folder."""

from typing import Any, NamedTuple

import jax

from pallas_kernels.core import chunks, dispatch
from pallas_kernels.core.axes import axes
from pallas_kernels.core.costs import Cost
from pallas_kernels.core.numerics import check_shapes, state_dtype
from pallas_kernels.simple_gla import pallas_gpu, pallas_tpu, reference, xla

FORMS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
AXES = axes(
    "b t g k, b t g k, b t h v, b t h -> b t h v",
    state="b h k v, b",
    independent="b h g",
)


class SimpleGLAState(NamedTuple):
    """What the recurrence keeps.

    Attributes:
        s: `[b h k v]`, with memories `[b m h k v]`; float32 (float64 for float64 inputs).
        last_id: int32 `[b]`, with memories `[b m]`: id of the document it is in; 0 = none yet, or
            not tracked.
    """

    s: jax.Array
    last_id: jax.Array


def simple_gla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    *,
    scale: float | None = None,
    block_memory: jax.Array | None = None,
    initial_state: SimpleGLAState | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    config: Any = None,
) -> tuple[jax.Array, SimpleGLAState]:
    """Linear attention whose state decays by one number per head and token.

        S_t = exp(g_t) S_{t-1} + k_t v_t^T
        y_t = scale S_t^T q_t

    Retention is the case of a constant g, Mamba-2's SSD that of q = C, k = B, v = dt x, g = dt A,
    scale 1. There B and C are shared by many heads: q and k may have fewer heads than v and g, head
    i then uses their head i // (h / g).

    Args:
        q: `[b t g k]`, float32, bfloat16 or float64; g divides h.
        k: `[b t g k]`.
        v: `[b t h v]`.
        g: `[b t h]`, natural logarithms of the decays, <= 0; -inf is a decay to 0.
        scale: of q; None = k^-1/2.
        block_memory: int32 `[b blocks]`, the memory that each block of t / blocks tokens (a power
            of two) belongs to, ascending along a row; None = there is one memory. Needs
            initial_state.
        initial_state: where the stream stopped; None = zeros. With memories s is `[b m h k v]`:
            each runs through its own blocks, and one without blocks comes back as it was.
        segment_ids: int32 `[b t]`, documents numbered upward (inside each memory), 0 = padding;
            None = one document.
        implementation: None = the best that serves, or "reference", "xla", "pallas_tpu",
            "pallas_gpu".
        config: tile sizes and `interpret` of that form; None = its own choice.

    Returns:
        y `[b t h v]` in the dtype of v (0 at padding) and the state after the last token. Sums and
        the state are in float32 (float64 for float64 inputs). Differentiable in every argument, in
        initial_state and through the state.

    Raises:
        ValueError: shapes do not fit together, or there is no such implementation.
        TypeError: an array is of the wrong kind.
        NotImplementedError: the implementation that was named does not serve this call.

    Source: Sun et al., "Retentive Network" (arXiv 2307.08621), equation 6; Dao and Gu,
    "Transformers are SSMs" (arXiv 2405.21060), section 6; `naive_recurrent_simple_gla` of
    fla-org/flash-linear-attention.

    Differs from source: heads of q and k may be shared; packed documents, streams and memories;
    sums of log decays hold only the terms between two tokens.
    """
    sizes: dict[str, int] = {}
    check_shapes(
        "simple_gla",
        sizes,
        v=("b t h v", v),
        g=("b t h", g),
        q=("b t g k", q),
        k=("b t g k", k),
    )
    if not sizes["g"] or sizes["h"] % sizes["g"]:
        raise ValueError(
            f"simple_gla: q and k have {sizes['g']} heads and v {sizes['h']}; "
            "the heads of q and k must divide those of v"
        )
    s, last_id, segment_ids, block_memory = chunks.open_call(
        "simple_gla", sizes, initial_state, segment_ids, block_memory, state_dtype(q, k, v, g)
    )
    if 0 in (sizes["b"], sizes["t"]):
        return v, SimpleGLAState(s, last_id)
    y, s, last_id = dispatch.call(
        "simple_gla",
        FORMS,
        (q, k, v, g, s, last_id, segment_ids, block_memory),
        implementation=implementation,
        config=config,
        scale=sizes["k"] ** -0.5 if scale is None else scale,
        fresh=initial_state is None,
    )
    return y, SimpleGLAState(s, last_id)


def cost(
    b: int,
    t: int,
    h: int,
    k: int,
    v: int,
    *,
    g: int | None = None,
    itemsize: int = 4,
    backward: bool = False,
) -> Cost:
    """What a call costs at least: operations, and bytes if every array moves once.

    Per token and state entry, forward: decay 1, write 2, read 2. Backward: the states again 3,
    their gradient 3, the gradients of q, k and v 2 each; that of g is a sum over them.
    """
    states, keys, values, gates = b * t * h * k * v, b * t * (g or h) * k, b * t * h * v, b * t * h
    ends = 4 * b * h * k * v
    if not backward:
        moved = itemsize * (2 * keys + 2 * values + gates) + 2 * ends
        return Cost(flops=5 * states, bytes=moved, transcendentals=gates)
    moved = itemsize * (4 * keys + 3 * values + 2 * gates) + 3 * ends
    return Cost(flops=12 * states, bytes=moved, transcendentals=gates)


simple_gla.axes = AXES  # type: ignore[attr-defined]
simple_gla.forms = FORMS  # type: ignore[attr-defined]
simple_gla.cost = cost  # type: ignore[attr-defined]
