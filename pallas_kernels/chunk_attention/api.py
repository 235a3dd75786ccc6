"""chunk_attention: what users call. The forms behind it are modules of this folder."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_attention import pallas_gpu, pallas_tpu, reference, xla
from pallas_kernels.core import dispatch
from pallas_kernels.core.axes import axes
from pallas_kernels.core.costs import Cost
from pallas_kernels.core.numerics import check_documents, check_shapes, state_dtype

FORMS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
AXES = axes(
    "b t h k, b t g k, b t g v -> b t h v",
    state="b g l k, b g l v, b, b",
    independent="b h g",
)


class ChunkAttentionState(NamedTuple):
    """The keys and values in sight of the last token, in a ring: a token overwrites the oldest one.

    Token n of a document (from 0) lies in slot n mod l, so that a step writes one slot and moves
    nothing, and a prompt, chunks and steps leave the same ring behind. A step then reads the ring
    as it lies, its own token included: that is why there are as many slots as a query sees keys,
    although the next token will not see the oldest one any more. Slots that the document has not
    reached yet are never looked at.

    Attributes:
        k: keys `[b g l k]`, l = window; float32 (float64 for float64 inputs). The slots of a head
            lie side by side, as a product with them wants it.
        v: values `[b g l v]`.
        count: int32 `[b]`, tokens of the current document so far: the position of the next one.
        last_id: int32 `[b]`, id of that document; 0 = none yet, or not tracked.
    """

    k: jax.Array
    v: jax.Array
    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    last_id: jax.Array


def chunk_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int,
    scale: float | None = None,
    initial_state: ChunkAttentionState | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    config: Any = None,
) -> tuple[jax.Array, ChunkAttentionState]:
    """Softmax attention to the last `window` tokens of the document, the current one included.

        y_i = sum_j w_ij v_j,    w_i = softmax_j(scale q_i . k_j),    i - window < j <= i

    Several query heads may share one key-value head: head i looks at key-value head i // (h / g).

    Args:
        q: `[b t h k]`, float32, bfloat16 or float64.
        k: `[b t g k]`; g divides h.
        v: `[b t g v]`.
        window: keys that a query sees, at least 1 (itself alone).
        scale: factor of the scores; None = k^-1/2.
        initial_state: where the stream stopped; None = nothing read.
        segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding (before, between or after
            documents, never inside one); None = one document.
        implementation: None = the best that serves, or "reference", "xla", "pallas_tpu",
            "pallas_gpu".
        config: tile sizes and `interpret` of that form; None = its own choice.

    Returns:
        y `[b t h v]` in the dtype of q (0 at padding) and the state after the last token. The
        softmax and sums are in float32 (float64 for float64 inputs). Differentiable in every
        argument, in initial_state and through the state.

    Raises:
        ValueError: shapes do not fit together, window is below 1, or there is no such
            implementation.
        TypeError: an array is of the wrong kind.
        NotImplementedError: the implementation that was named does not serve this call.

    Source: Beltagy et al., "Longformer" (arXiv 2004.05150), section 3.1, causal; the `window` of
    Mistral (arXiv 2310.06825). FlashAttention's `window_size=(left, 0)` is window = left + 1.

    Differs from source: packed documents and streams; the gradient of the last state is propagated.
    """
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"chunk_attention: window is {window!r}; it must be an integer")
    if window < 1:
        raise ValueError(
            f"chunk_attention: window={window}; it must be at least 1 (a token sees itself)"
        )
    sizes: dict[str, int] = {}
    check_shapes("chunk_attention", sizes, q=("b t h k", q), k=("b t g k", k), v=("b t g v", v))
    if sizes["g"] < 1 or sizes["h"] % sizes["g"]:
        raise ValueError(
            f"chunk_attention: q has {sizes['h']} heads and k {sizes['g']}; "
            "the heads of q must be a multiple of those of k and v"
        )
    dtype = state_dtype(q, k, v)
    sizes["l"] = window
    if initial_state is None:
        ring = lambda width: jnp.zeros((sizes["b"], sizes["g"], window, width), dtype)
        zero = jnp.zeros((sizes["b"],), jnp.int32)
        initial_state = ChunkAttentionState(ring(sizes["k"]), ring(sizes["v"]), zero, zero)
    old_k, old_v, count, last_id = initial_state
    check_shapes(
        "chunk_attention",
        sizes,
        initial_state_k=("b g l k", old_k),
        initial_state_v=("b g l v", old_v),
    )
    if count.shape != (sizes["b"],) or not jnp.issubdtype(count.dtype, jnp.integer):
        raise ValueError(
            f"chunk_attention: count of initial_state is {count.dtype} {count.shape}; "
            f"it must be int32 {(sizes['b'],)}"
        )
    segment_ids, last_id = check_documents("chunk_attention", sizes, segment_ids, last_id)
    old_k, old_v, count = old_k.astype(dtype), old_v.astype(dtype), jnp.asarray(count, jnp.int32)
    if sizes["t"] == 0:
        y = jnp.zeros((sizes["b"], 0, sizes["h"], sizes["v"]), q.dtype)
        return y, ChunkAttentionState(old_k, old_v, count, last_id)
    y, *state = dispatch.call(
        "chunk_attention",
        FORMS,
        (q, k, v, old_k, old_v, count, last_id, segment_ids),
        implementation=implementation,
        config=config,
        window=window,
        scale=sizes["k"] ** -0.5 if scale is None else float(scale),
    )
    return y, ChunkAttentionState(*state)


def cost(
    b: int,
    t: int,
    h: int,
    g: int,
    k: int,
    v: int,
    window: int,
    *,
    itemsize: int = 4,
    backward: bool = False,
) -> Cost:
    """What a call costs at least: operations on the pairs in sight, and bytes if arrays move once.

    Forward 2 k + 2 v per pair for the products and 5 for the softmax; backward computes the scores
    again and makes four products more.
    """
    seen = min(window, t)
    pairs = b * h * (t * seen - seen * (seen - 1) // 2)
    moved = itemsize * b * t * (h * k + h * v + g * k + g * v)
    if not backward:
        return Cost(flops=(2 * k + 2 * v + 5) * pairs, bytes=moved, transcendentals=pairs)
    return Cost(flops=(6 * k + 4 * v + 8) * pairs, bytes=2 * moved, transcendentals=pairs)


chunk_attention.axes = AXES  # type: ignore[attr-defined]
chunk_attention.forms = FORMS  # type: ignore[attr-defined]
chunk_attention.options = dict(window=128)  # type: ignore[attr-defined]  # of a typical call
chunk_attention.cost = cost  # type: ignore[attr-defined]
