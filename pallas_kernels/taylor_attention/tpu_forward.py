"""taylor_attention's forward kernel for TPUs: features and states never leave the chip.

Tokens lie on lanes. For each chunk of c tokens, with v1 = [v, 1] and S `[v1 f]` before the chunk,

    o1 = v1 tril(w)^T + S phi(scale q)          S <- S + v1 phi(k)^T
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu import kernel_call
from pallas_kernels.core.tpu_places import Seen, only, seen
from pallas_kernels.core.tpu_tokens import product_dtype
from pallas_kernels.taylor_attention.cost import cost
from pallas_kernels.taylor_attention.tpu_features import phi, rows_of
from pallas_kernels.taylor_attention.tpu_layout import state_rows

NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


class How(NamedTuple):
    """Static settings: see `taylor_attention` and PallasTpuConfig."""

    scale: float
    normalize: bool
    eps: float
    config: Any


def dot(a: jax.Array, b: jax.Array, dims: tuple) -> jax.Array:
    """A product summed in float32, of bfloat16 as they are, of float32 in full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def with_ones(v: jax.Array, there: jax.Array | None, rows: int) -> jax.Array:
    """`[v c]` with two rows of ones behind it (0 where no token is), up to so many rows.

    Two, because the gradient of the sum of weights comes in two parts.
    """
    c = v.shape[1]
    ones = jax.lax.broadcasted_iota(jnp.int32, (rows - v.shape[0], c), 0) < 2
    ones = ones if there is None else ones & there
    return jnp.concatenate([only(there, v), ones.astype(v.dtype)], axis=0)


def weights(r: jax.Array, pairs: jax.Array, scale: float) -> jax.Array:
    """Weights of pairs from undivided scores r = q.k."""
    return jnp.where(pairs, 1 + r * (scale + (0.5 * scale * scale) * r), 0)


def forward(arrays, state, places, how: How, *, save: bool):
    """The kernel's call.

    Args:
        arrays: q and k `[b h k t]`, v `[b h v t]`; k and v multiples of 16, t of the block.
        state: `[b h v1 f]` float32, or None for zeros.
        places: `[b 1 t]` or None.
        how: settings.
        save: whether the backward pass will want states and divisors.

    Returns:
        y `[b h v t]`, the state after, and if `save` the state before each block
        `[b h n v1 f]` (None for a single one) and 1 / (z + eps) `[b h 1 t]` (None if not
        normalized).
    """
    q, k, v = arrays
    (b, h, width, t), v_width, config = q.shape, v.shape[2], how.config
    heads, block = config.heads, config.block
    steps, dtype = t // block, product_dtype(q, k, v)
    rows, f = state_rows(v_width), rows_of(width)

    along = lambda size: pl.BlockSpec((1, heads, size, block), lambda i, j, s: (i, j, 0, s))
    states = pl.BlockSpec((1, heads, rows, f), lambda i, j, s: (i, j, 0, 0))
    inputs: dict[str, tuple] = dict(
        q=(q, along(width)),
        k=(k, along(width)),
        v=(v, along(v_width)),
        places=(places, pl.BlockSpec((1, 1, block), lambda i, j, s: (i, 0, s))),
        initial=(state, states),
    )
    inputs = {name: pair for name, pair in inputs.items() if pair[0] is not None}
    outputs = dict(
        y=(jax.ShapeDtypeStruct(v.shape, v.dtype), along(v_width)),
        last=(jax.ShapeDtypeStruct((b, h, rows, f), jnp.float32), states),
    )
    if save and steps > 1:
        outputs["saved"] = (
            jax.ShapeDtypeStruct((b, h, steps, rows, f), jnp.float32),
            pl.BlockSpec((1, heads, 1, rows, f), lambda i, j, s: (i, j, s, 0, 0)),
        )
    if save and how.normalize:
        outputs["inverse"] = (jax.ShapeDtypeStruct((b, h, 1, t), jnp.float32), along(1))
    names = (*inputs, *outputs, "state")
    body = functools.partial(_body, names=names, how=how, steps=steps, dtype=dtype)
    work = cost(b, t, h, width, v_width, itemsize=v.dtype.itemsize)
    results = kernel_call(
        body,
        name="taylor_attention_forward",
        config=config,
        grid=(b, h // heads, steps),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        semantics=("parallel", "parallel", "arbitrary"),
        scratch_shapes=[pltpu.VMEM((heads, rows, f), jnp.float32)],
        cost=pl.CostEstimate(int(work.flops), 0, int(work.bytes)),
    )(*(x for x, _ in inputs.values()))
    found = dict(zip(outputs, results, strict=True))
    return tuple(found.get(name) for name in ("y", "last", "saved", "inverse"))


def _body(*refs, names, how: How, steps: int, dtype):
    at = dict(zip(names, refs, strict=True))
    step, chunk, state = pl.program_id(2), how.config.chunk, at["state"]

    @pl.when(step == 0)
    def _():
        state[...] = at["initial"][0] if "initial" in at else jnp.zeros_like(state)

    if "saved" in at:
        at["saved"][0, :, 0] = state[...]

    def one_chunk(i, carry):
        here = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
        masks = seen(at["places"][0, :, here] if "places" in at else None, chunk)
        for head in range(how.config.heads):
            _one_head(at, head, here, masks, how, dtype)
        return carry

    jax.lax.fori_loop(0, how.config.block // chunk, one_chunk, 0)

    @pl.when(step == steps - 1)
    def _():
        at["last"][0] = state[...]


def _one_head(at, head: int, here, masks: Seen, how: How, dtype):
    state, v_width = at["state"], at["v"].shape[2]
    q = only(masks.valid, at["q"][0, head, :, here].astype(dtype))
    k = only(masks.valid, at["k"][0, head, :, here].astype(dtype))
    v1 = with_ones(at["v"][0, head, :, here].astype(dtype), masks.valid, state.shape[1])

    read = dot(state[head].astype(dtype), phi(how.scale * q.astype(jnp.float32)).astype(dtype), NN)
    w = weights(dot(k, q, TN), masks.pairs, how.scale)
    o1 = only(masks.head, read) + dot(v1, w.astype(dtype), NN)
    new = dot(only(masks.tail, v1), phi(k.astype(jnp.float32)).astype(dtype), NT)
    state[head] = only(masks.kept, state[head]) + new

    o = o1[:v_width]
    if how.normalize:
        inverse = only(masks.valid, 1 / (o1[v_width : v_width + 1] + how.eps))
        if "inverse" in at:
            at["inverse"][0, head, :, here] = inverse
        o = o * inverse
    y = at["y"]
    y[0, head, :, here] = only(masks.valid, o).astype(y.dtype)
