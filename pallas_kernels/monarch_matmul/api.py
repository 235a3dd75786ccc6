"""monarch_matmul: what users call. The forms behind it are modules of this folder."""

from typing import Any

import jax

from pallas_kernels.core import dispatch
from pallas_kernels.core.axes import axes
from pallas_kernels.core.costs import Cost
from pallas_kernels.core.numerics import check_shapes
from pallas_kernels.monarch_matmul import pallas_gpu, pallas_tpu, reference, xla

FORMS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
AXES = axes("b t n, k q p, l s r -> b t m", independent="b")


def monarch_matmul(
    x: jax.Array,
    w1: jax.Array,
    w2: jax.Array | None = None,
    *,
    implementation: str | None = None,
    config: Any = None,
) -> jax.Array:
    """x M^T for a Monarch matrix M of order 2, or a block-diagonal one.

        Z[k,q]  = sum_p w1[k,q,p] X[k,p]          X = x as [k p]
        Z'[l,r] = Z as [r l], turned round        with w2; without it y = Z
        Y[s,l]  = sum_r w2[l,s,r] Z'[l,r]         y = Y as one axis: l runs fastest

    Args:
        x: `[b t n]` with n = k p, float32, bfloat16 or float64.
        w1: `[k q p]`, k blocks that map p numbers to q.
        w2: `[l s r]`, l blocks that map r numbers to s, with l r = k q; None = block-diagonal.
        implementation: None = the best that serves, or "reference", "xla", "pallas_tpu",
            "pallas_gpu".
        config: tile sizes and `interpret` of that form; None = its own choice.

    Returns:
        y `[b t m]` in the dtype of x, m = l s (k q without w2). Factors and what stands between
        them are rounded to the dtype of x; sums are in float32 (float64 for float64 inputs).
        Differentiable in every argument. It has no state and takes each token alone.

    Raises:
        ValueError: shapes do not fit together, or there is no such implementation.
        TypeError: an array is of the wrong kind.
        NotImplementedError: the implementation that was named does not serve this call.

    Source: Dao et al., "Monarch" (arXiv 2204.00595); Fu et al., "Monarch Mixer" (arXiv 2310.12109);
    `blockdiag_butterfly_multiply` and `blockdiag_multiply` of HazyResearch/m2.

    Differs from source: the backward pass keeps Z' (without w2 nothing) beside the arguments.
    """
    sizes: dict[str, int] = {}
    arguments = dict(x=("b t n", x), w1=("k q p", w1), w2=("l s r", w2))
    check_shapes("monarch_matmul", sizes, **arguments)
    if sizes["k"] * sizes["p"] != sizes["n"]:
        raise ValueError(
            f"monarch_matmul: x has {sizes['n']} channels and w1 {w1.shape} takes k * p = "
            f"{sizes['k'] * sizes['p']}; fill x up with zeros, or change w1"
        )
    if w2 is not None and sizes["l"] * sizes["r"] != sizes["k"] * sizes["q"]:
        raise ValueError(
            f"monarch_matmul: w1 {w1.shape} gives k * q = {sizes['k'] * sizes['q']} channels and "
            f"w2 {w2.shape} takes l * r = {sizes['l'] * sizes['r']}; they must be equal"
        )
    return dispatch.call(
        "monarch_matmul", FORMS, (x, w1, w2), implementation=implementation, config=config
    )


def cost(
    b: int,
    t: int,
    k: int,
    q: int,
    p: int,
    l: int = 0,  # the axis letter
    s: int = 0,
    r: int = 0,
    *,
    itemsize: int = 4,
    backward: bool = False,
) -> Cost:
    """What a call costs at least: operations, and bytes if every array moves once.

    Without a second factor l, s and r are 0. Backward: both factors transposed, and their
    gradients.
    """
    weights = k * q * p + l * s * r
    x, y = b * t * k * p, b * t * (l * s or k * q)
    if not backward:
        return Cost(flops=2.0 * b * t * weights, bytes=itemsize * (x + y + weights))
    moved = 2 * x + y + 2 * weights  # x and dy read, dx written
    return Cost(flops=4.0 * b * t * weights, bytes=itemsize * moved)


monarch_matmul.axes = AXES  # type: ignore[attr-defined]
monarch_matmul.forms = FORMS  # type: ignore[attr-defined]
# Of a typical call: M2-BERT's.
monarch_matmul.sizes = dict(n=768, k=4, q=192, p=192, l=4, s=1536, r=192)  # type: ignore[attr-defined]
monarch_matmul.cost = cost  # type: ignore[attr-defined]
