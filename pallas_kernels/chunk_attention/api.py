"""chunk_attention: what users call. The forms behind it are modules of this folder."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_attention import pallas_gpu, pallas_tpu, reference, xla
from pallas_kernels.chunk_attention.cost import cost
from pallas_kernels.chunk_attention.forms import form_of
from pallas_kernels.chunk_attention.state import ChunkAttentionState, empty
from pallas_kernels.core import dispatch
from pallas_kernels.core.axes import axes
from pallas_kernels.core.numerics import check_documents, check_shapes, state_dtype

FORMS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
AXES = axes(
    "b t h k, b t g k, b t g v, h p -> b t h v",
    state="b g l k, b g l v, b, b",
    independent="b h g",
)


def chunk_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    *,
    window: int | None = None,
    chunk: int | None = None,
    score: str = "softmax",
    causal: bool = True,
    scale: float | None = None,
    initial_state: ChunkAttentionState | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    config: Any = None,
) -> tuple[jax.Array, ChunkAttentionState | None]:
    """Attention to the last `window` tokens of the document, or to those of the same chunk of it.

        y_i = sum_j w_ij v_j
        window:  w_ij = softmax_j(scale q_i . k_j),          i - window < j <= i
        chunk:   w_ij = f(scale q_i . k_j + b_{j-i}),        i and j in one chunk, j <= i if causal

    i and j count from the start of the document. f is a softmax, or element by element Laplace's or
    the squared relu (scores.py). Several query heads may share one key-value head: head i looks at
    key-value head i // (h / g).

    Args:
        q: `[b t h k]`, float32, bfloat16 or float64.
        k: `[b t g k]`; g divides h.
        v: `[b t g v]`.
        bias: `[h 2 chunk - 1]`, added to the scores by distance j - i, -(chunk - 1) first; None =
            none. For chunks alone.
        window: keys that a query sees, at least 1 (itself alone).
        chunk: tokens that see each other, at least 1; give this or window.
        score: "softmax"; for chunks also "laplace" or "relu2", which divide q . k by the number of
            keys that the query sees.
        causal: a query sees no later key; False (for chunks alone) = the whole chunk, without a
            state.
        scale: factor of q . k; None = k^-1/2 in a softmax, else 1.
        initial_state: where the stream stopped; None = nothing read.
        segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding (before, between or after
            documents, never inside one); None = one document.
        implementation: None = the best that serves, or "reference", "xla", "pallas_tpu",
            "pallas_gpu".
        config: tile sizes and `interpret` of that form; None = its own choice.

    Returns:
        y `[b t h v]` in the dtype of q (0 at padding) and the state after the last token (None
        where it is not causal). Weights and sums are in float32 (float64 for float64 inputs).
        Differentiable in every argument, in initial_state and through the state.

    Raises:
        ValueError: shapes or keywords do not fit together, a size is below 1, or there is no such
            score or implementation.
        TypeError: an array or a size is of the wrong kind.
        NotImplementedError: the implementation that was named does not serve this call.

    Source: Beltagy et al., "Longformer" (arXiv 2004.05150), section 3.1, causal; the `window` of
    Mistral (arXiv 2310.06825). FlashAttention's `window_size=(left, 0)` is window = left + 1.
    Chunks, Laplace and the bias: Ma et al., "Mega" (arXiv 2209.10655); facebookresearch/mega.

    Differs from source: packed documents and streams; the gradient of the last state is propagated;
    a chunk may be short, and laplace and relu2 then divide by the keys that are there.
    """
    sizes: dict[str, int] = {}
    check_shapes(
        "chunk_attention",
        sizes,
        q=("b t h k", q),
        k=("b t g k", k),
        v=("b t g v", v),
        bias=("h p", bias),
    )
    b, t, h, g = (sizes[x] for x in "bthg")
    if g < 1 or h % g:
        raise ValueError(
            f"chunk_attention: q has {h} heads and k {g}; "
            "the heads of q must be a multiple of those of k and v"
        )
    form = form_of(
        window,
        chunk,
        score,
        causal,
        scale,
        width=sizes["k"],
        bias=bias is not None,
        fresh=initial_state is None,
    )
    if bias is not None and sizes["p"] != 2 * form.slots - 1:
        raise ValueError(
            f"chunk_attention: bias has {sizes['p']} distances; chunk={chunk} has "
            f"2 * {chunk} - 1 = {2 * form.slots - 1}"
        )
    dtype = state_dtype(q, k, v, bias)
    sizes["l"] = form.slots if causal else 0
    if initial_state is None:
        initial_state = empty(b, g, sizes["l"], sizes["k"], sizes["v"], dtype)
    old_k, old_v, count, last_id = initial_state
    check_shapes(
        "chunk_attention",
        sizes,
        initial_state_k=("b g l k", old_k),
        initial_state_v=("b g l v", old_v),
    )
    if count.shape != (b,) or not jnp.issubdtype(count.dtype, jnp.integer):
        raise ValueError(
            f"chunk_attention: count of initial_state is {count.dtype} {count.shape}; "
            f"it must be int32 {(b,)}"
        )
    segment_ids, last_id = check_documents("chunk_attention", sizes, segment_ids, last_id)
    before = (old_k.astype(dtype), old_v.astype(dtype), jnp.asarray(count, jnp.int32), last_id)
    if 0 in (b, t):
        y, after = jnp.zeros((b, t, h, sizes["v"]), q.dtype), list(before)
    else:
        y, *after = dispatch.call(
            "chunk_attention",
            FORMS,
            (q, k, v, bias, *before, segment_ids),
            implementation=implementation,
            config=config,
            form=form,
        )
    return y, ChunkAttentionState(*after) if causal else None


chunk_attention.axes = AXES  # type: ignore[attr-defined]
chunk_attention.forms = FORMS  # type: ignore[attr-defined]
chunk_attention.options = dict(window=128)  # type: ignore[attr-defined]  # of a typical call
chunk_attention.left_out = ("bias",)  # type: ignore[attr-defined]
chunk_attention.cost = cost  # type: ignore[attr-defined]
