"""taylor_attention: what users call. The forms behind it are modules of this folder."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch
from pallas_kernels.core.axes import axes
from pallas_kernels.core.numerics import check_documents, check_shapes, state_dtype
from pallas_kernels.taylor_attention import pallas_gpu, pallas_tpu, reference, xla
from pallas_kernels.taylor_attention.cost import cost
from pallas_kernels.taylor_attention.features import feature_count

FORMS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
AXES = axes(
    "b t h k, b t h k, b t h v -> b t h v",
    state="b h f v, b h f, b",
    independent="b h",
)


class TaylorAttentionState(NamedTuple):
    """What the recurrence keeps; f = 1 + k + k (k + 1) / 2 features.

    Attributes:
        kv: `[b h f v]`, the sum of phi(k) v^T; float32 (float64 for float64 inputs).
        z: `[b h f]`, the sum of phi(k), of the same type.
        last_id: int32 `[b]`, id of the document it is in; 0 = none yet, or not tracked.
    """

    kv: jax.Array
    z: jax.Array
    last_id: jax.Array


def taylor_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    initial_state: TaylorAttentionState | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    config: Any = None,
) -> tuple[jax.Array, TaylorAttentionState]:
    """Causal linear attention whose weights are the exponential's series up to the second order.

        s_ij = scale q_i . k_j,    w_ij = 1 + s_ij + s_ij^2 / 2 = phi(scale q_i) . phi(k_j)
        y_i  = sum_{j <= i} w_ij v_j / (sum_{j <= i} w_ij + eps)          or undivided

    Every weight is at least 1/2, so the divisor is at least half the number of tokens.

    Args:
        q: `[b t h k]`, float32, bfloat16 or float64; k from 1 to 64.
        k: `[b t h k]`.
        v: `[b t h v]`.
        scale: of q; None = k^-1/2.
        normalize: whether the weights' sum divides.
        eps: added to the divisor.
        initial_state: where the stream stopped; None = nothing read yet (cheaper than zeros).
        segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document.
        implementation: None = the best that serves, or "reference", "xla", "pallas_tpu",
            "pallas_gpu".
        config: form, chunk and `interpret`; None = its own choice.

    Returns:
        y `[b t h v]` in the dtype of v (0 at padding) and the state after the last token. Sums and
        the state are in float32 (float64 for float64 inputs). Differentiable in every argument, in
        initial_state and through the state.

    Raises:
        ValueError: shapes do not fit together, the key width is out of range, or there is no such
            implementation.
        TypeError: an array is of the wrong kind.
        NotImplementedError: the implementation that was named does not serve this call.

    Source: Arora et al., "Simple linear attention language models balance the recall-throughput
    tradeoff" (arXiv 2402.18668); `parallel_based` of fla-org/flash-linear-attention and
    `LinearAttention` of HazyResearch/based.

    Differs from source: the state holds the packed map (153 features at k = 16; the source's full
    map has 273) of keys that are not scaled: scale multiplies q alone; time is the second axis;
    packed documents and streams.
    """
    sizes: dict[str, int] = {}
    check_shapes("taylor_attention", sizes, q=("b t h k", q), k=("b t h k", k), v=("b t h v", v))
    sizes["f"] = feature_count(sizes["k"])
    if eps < 0:
        raise ValueError(f"taylor_attention: eps is {eps}; it must be at least 0")
    dtype = state_dtype(q, k, v)
    kv = z = None
    last_id = jnp.zeros((sizes["b"],), jnp.int32)
    if initial_state is not None:
        kv, z, last_id = initial_state
        check_shapes(
            "taylor_attention",
            sizes,
            initial_state_kv=("b h f v", kv),
            initial_state_z=("b h f", z),
        )
        kv, z = kv.astype(dtype), z.astype(dtype)
    segment_ids, last_id = check_documents("taylor_attention", sizes, segment_ids, last_id)
    if 0 in (sizes["b"], sizes["t"]):
        if kv is None or z is None:
            kv, z = (jnp.zeros([sizes[x] for x in letters], dtype) for letters in ("bhfv", "bhf"))
        return v, TaylorAttentionState(kv, z, last_id)
    y, kv, z, last_id = dispatch.call(
        "taylor_attention",
        FORMS,
        (q, k, v, kv, z, last_id, segment_ids),
        implementation=implementation,
        config=config,
        scale=float(sizes["k"] ** -0.5 if scale is None else scale),
        normalize=normalize,
        eps=float(eps),
    )
    return y, TaylorAttentionState(kv, z, last_id)


taylor_attention.axes = AXES  # type: ignore[attr-defined]
taylor_attention.forms = FORMS  # type: ignore[attr-defined]
taylor_attention.sizes = dict(k=16)  # type: ignore[attr-defined]  # of a typical call
taylor_attention.cost = cost  # type: ignore[attr-defined]
