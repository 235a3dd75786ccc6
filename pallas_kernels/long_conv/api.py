"""long_conv: what users call. The forms behind it are modules of this folder."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch
from pallas_kernels.core.axes import axes
from pallas_kernels.core.costs import Cost
from pallas_kernels.core.numerics import check_documents, check_shapes, state_dtype
from pallas_kernels.long_conv import pallas_gpu, pallas_tpu, reference, xla

FORMS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
AXES = axes(
    "b t e, e l, e, e l, e, b t e, b t e -> b t e",
    state="b l e, b",
    independent="b e",
)


class LongConvState(NamedTuple):
    """What the causal convolution keeps: as many inputs as the kernel reaches back.

    Attributes:
        v: `[b l-1 e]`, the last gated inputs of the document it is in, the newest last, zeros
            before its start; float32 (float64 for float64 inputs).
        last_id: int32 `[b]`, id of that document; 0 = none yet, or not tracked.
    """

    v: jax.Array
    last_id: jax.Array


def long_conv(
    u: jax.Array,
    kernel: jax.Array,
    skip: jax.Array | None = None,
    reverse_kernel: jax.Array | None = None,
    bias: jax.Array | None = None,
    pre_gate: jax.Array | None = None,
    post_gate: jax.Array | None = None,
    *,
    initial_state: LongConvState | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    config: Any = None,
) -> tuple[jax.Array, LongConvState | None]:
    """A convolution with a kernel of any length, channel by channel, gated on both sides.

        v_t = pre_gate_t u_t
        z_t = sum_{s<=t} kernel[t-s] v_s + sum_{s>t} reverse_kernel[s-t-1] v_s
        y_t = post_gate_t (z_t + skip v_t + bias)

    Causal without a reverse kernel. Lag 0 is the kernel's alone: reverse_kernel[0] falls on the
    next token. What a kernel has beyond the sequence is cut; beyond its end it is 0.

    Args:
        u: `[b t e]`, float32, bfloat16 or float64.
        kernel: `[e l]`, lag 0 first.
        skip: `[e]`; None = 0.
        reverse_kernel: `[e l]`; None = causal.
        bias: `[e]`; None = 0.
        pre_gate: `[b t e]`; None = 1.
        post_gate: `[b t e]`; None = 1.
        initial_state: where the stream stopped; None = zeros. Not with a reverse kernel.
        segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding (before, between or after
            documents, never inside one); None = one document.
        implementation: None = the best that serves, or "reference", "xla", "pallas_tpu",
            "pallas_gpu".
        config: the form's own, `XlaConfig(form="auto" | "direct" | "fft" | "monarch")` for one;
            None = its own choice.

    Returns:
        y `[b t e]` in the dtype of u (0 at padding) and the state after the last token, None with a
        reverse kernel. Everything is computed in float32 (float64 for float64 inputs).
        Differentiable in every argument, in initial_state and through the state.

    Raises:
        ValueError: shapes do not fit together, a state comes with a reverse kernel, the Fourier
            transform would be too long, or there is no such implementation.
        TypeError: an array is of the wrong kind.
        NotImplementedError: the implementation that was named does not serve this call.

    Source: the `fftconv_ref` of M2 (HazyResearch/m2, bert/src/mm/hyena_utils.py, commit 7d359e8);
    arXiv 2310.12109.

    Differs from source: time is the second axis; packed documents and streams; kernels shorter or
    longer than the sequence; the gates are part of it. `fftconv_ref` has a branch, which M2 never
    takes, that puts reverse_kernel[0] on lag 0 too: not here.
    """
    sizes: dict[str, int] = {}
    check_shapes(
        "long_conv",
        sizes,
        u=("b t e", u),
        kernel=("e l", kernel),
        skip=("e", skip),
        reverse_kernel=("e l", reverse_kernel),
        bias=("e", bias),
        pre_gate=("b t e", pre_gate),
        post_gate=("b t e", post_gate),
    )
    if sizes["l"] < 1:
        raise ValueError("long_conv: kernel has no lags; it must be [e l] with l at least 1")
    dtype = state_dtype(u, kernel, skip, reverse_kernel, bias, pre_gate, post_gate)
    before, last_id = None, jnp.zeros((sizes["b"],), jnp.int32)
    if initial_state is not None:
        if reverse_kernel is not None:
            raise ValueError(
                "long_conv: initial_state is given with a reverse kernel; a convolution that looks "
                "ahead has no state: call it on whole sequences, without one"
            )
        before, last_id = initial_state
        sizes["l-1"] = sizes["l"] - 1
        check_shapes("long_conv", sizes, initial_state_v=("b l-1 e", before))
        before = before.astype(dtype)
    segment_ids, last_id = check_documents("long_conv", sizes, segment_ids, last_id)
    if 0 in (sizes["b"], sizes["t"]):
        if before is None:
            before = jnp.zeros((sizes["b"], sizes["l"] - 1, sizes["e"]), dtype)
        return u, None if reverse_kernel is not None else LongConvState(before, last_id)
    y, *state = dispatch.call(
        "long_conv",
        FORMS,
        (
            *(u, kernel, skip, reverse_kernel, bias, pre_gate, post_gate),
            *(before, last_id, segment_ids),
        ),
        implementation=implementation,
        config=config,
    )
    return y, None if reverse_kernel is not None else LongConvState(*state)


def cost(b: int, t: int, e: int, l: int, *, itemsize: int = 4, backward: bool = False) -> Cost:
    """What a call with both gates costs at least: by Fourier transforms, each array moving once.

    A transform of n real numbers takes 2.5 n log2 n operations, n = t + min(l, t). Forward: one of
    each sequence, one back, and one of each kernel; backward: the forward's, and three more.
    """
    n = t + min(l, t)
    transform = 2.5 * n * math.log2(n)
    tokens, kernels = b * t * e, itemsize * e * min(l, t)
    if not backward:
        flops = (2 * b + 1) * e * transform + 3 * b * e * n + 5 * tokens
        return Cost(flops=flops, bytes=4 * itemsize * tokens + kernels)
    flops = (4 * b + 2) * e * transform + 10 * b * e * n + 12 * tokens
    return Cost(flops=flops, bytes=7 * itemsize * tokens + 2 * kernels)


long_conv.axes = AXES  # type: ignore[attr-defined]
long_conv.forms = FORMS  # type: ignore[attr-defined]
long_conv.sizes = dict(l=1024)  # type: ignore[attr-defined]  # of a typical call
long_conv.cost = cost  # type: ignore[attr-defined]
