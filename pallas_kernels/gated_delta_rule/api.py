"""gated_delta_rule: what users call. The forms behind it are modules of this folder."""

from typing import Any, NamedTuple

import jax

from pallas_kernels.core import chunks, dispatch
from pallas_kernels.core.axes import axes
from pallas_kernels.core.costs import Cost
from pallas_kernels.core.numerics import check_shapes, state_dtype
from pallas_kernels.gated_delta_rule import pallas_gpu, pallas_tpu, reference, xla

FORMS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
AXES = axes(
    "b t h k, b t h k, b t h v, b t h, b t h -> b t h v",
    state="b h k v, b",
    independent="b h",
)


class GatedDeltaRuleState(NamedTuple):
    """What the recurrence keeps.

    Attributes:
        s: `[b h k v]`, with memories `[b m h k v]`; float32 (float64 for float64 inputs).
        last_id: int32 `[b]`, with memories `[b m]`: id of the document it is in; 0 = none yet, or
            not tracked.
    """

    s: jax.Array
    last_id: jax.Array


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    scale: float | None = None,
    block_memory: jax.Array | None = None,
    initial_state: GatedDeltaRuleState | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    config: Any = None,
) -> tuple[jax.Array, GatedDeltaRuleState]:
    """A memory that decays, and writes only what it does not hold yet under a key.

        S   <- exp(g_t) S_{t-1}
        S_t  = S + k_t (beta_t (v_t - S^T k_t))^T
        y_t  = scale S_t^T q_t

    With keys of length 1 and beta in (0, 1) a write replaces the share beta of what stands under
    k_t by that of v_t. Keys are normalised by the caller.

    Args:
        q: `[b t h k]`, float32, bfloat16 or float64.
        k: `[b t h k]`, of length 1 (at most) along the last axis.
        v: `[b t h v]`.
        g: `[b t h]`, natural logarithms of the decays, <= 0.
        beta: `[b t h]`, share that is replaced, in (0, 1); up to 2 with keys of length 1.
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

    Source: Yang et al., "Gated Delta Networks" (arXiv 2412.06464), equation 10;
    `naive_recurrent_gated_delta_rule` of fla-org/flash-linear-attention.

    Differs from source: packed documents, streams and memories; sums of log decays hold only the
    terms between two tokens.
    """
    sizes: dict[str, int] = {}
    check_shapes(
        "gated_delta_rule",
        sizes,
        q=("b t h k", q),
        k=("b t h k", k),
        v=("b t h v", v),
        g=("b t h", g),
        beta=("b t h", beta),
    )
    dtype = state_dtype(q, k, v, g, beta)
    s, last_id, segment_ids, block_memory = chunks.open_call(
        "gated_delta_rule", sizes, initial_state, segment_ids, block_memory, dtype
    )
    if 0 in (sizes["b"], sizes["t"]):
        return v, GatedDeltaRuleState(s, last_id)
    y, s, last_id = dispatch.call(
        "gated_delta_rule",
        FORMS,
        (q, k, v, g, beta, s, last_id, segment_ids, block_memory),
        implementation=implementation,
        config=config,
        scale=sizes["k"] ** -0.5 if scale is None else scale,
        fresh=initial_state is None,
    )
    return y, GatedDeltaRuleState(s, last_id)


def cost(
    b: int, t: int, h: int, k: int, v: int, *, itemsize: int = 4, backward: bool = False
) -> Cost:
    """What a call costs at least: operations, and bytes if every array moves once.

    Per token and state entry, forward: decay 1, what stands under the key 2, write 2, read 2.
    Backward: the states again 5, their gradient 5, the gradients of q, k and v 6.
    """
    states, keys, values, gates = b * t * h * k * v, b * t * h * k, b * t * h * v, b * t * h
    ends = 4 * b * h * k * v
    if not backward:
        moved = itemsize * (2 * keys + 2 * values + 2 * gates) + 2 * ends
        return Cost(flops=7 * states, bytes=moved, transcendentals=gates)
    moved = itemsize * (4 * keys + 3 * values + 4 * gates) + 3 * ends
    return Cost(flops=16 * states, bytes=moved, transcendentals=gates)


gated_delta_rule.axes = AXES  # type: ignore[attr-defined]
gated_delta_rule.forms = FORMS  # type: ignore[attr-defined]
gated_delta_rule.cost = cost  # type: ignore[attr-defined]
