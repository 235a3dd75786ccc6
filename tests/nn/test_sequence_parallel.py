"""Operators over rows that are cut over devices: results, states and gradients of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.chunk_attention import chunk_attention
from pallas_kernels.dilated_conv import dilated_conv
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gla import gla
from pallas_kernels.long_conv import long_conv
from pallas_kernels.neural_memory import neural_memory
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.short_conv import short_conv
from pallas_kernels.simple_gla import simple_gla
from pallas_kernels.taylor_attention import taylor_attention
from seqzoo.nn.ring_attention import full_attention
from seqzoo.nn.sharded import sharded
from seqzoo.nn.sharding import MESH_AXES, use_mesh

B, T, SHARDS = 2, 32, 4
# A document that the state is in, others, padding between and behind; one that ends long before the
# row does.
IDS = np.array([[2] * 5 + [3] * 9 + [0] * 2 + [5] * 13 + [0] * 3, [2] * 12 + [0] * 20], np.int32)
LAST = np.array([2, 1], np.int32)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def gates(*shape, seed=0):
    return jax.nn.log_sigmoid(normal(*shape, seed=seed) + 2)


E, N, H, K, V = 4, 3, 2, 4, 5
QK = (normal(B, T, H, K, seed=1), unit(normal(B, T, H, K, seed=2)))
VALUES = normal(B, T, H, V, seed=3)
GATE = gates(B, T, H, seed=4)
SHARES = [jax.nn.sigmoid(normal(B, T, H, seed=s) - 1) for s in (5, 6, 7)]
MEMORY = (normal(H, K, 6), 0.5 * normal(H, 6, K))  # w_out, w_in
LONG = (normal(B, T, 8, seed=8), normal(8, T, seed=9) / T)

CASES = {
    "selective_scan": (
        selective_scan,
        (normal(B, T, E), normal(B, T, E, seed=1), -jnp.exp(normal(E, N)), normal(B, T, N, seed=2),
         normal(B, T, N, seed=3), normal(E), normal(B, T, E, seed=4), normal(E, seed=5)),
        dict(delta_softplus=True),
    ),
    "simple_gla": (simple_gla, (*(x[:, :, :1] for x in QK), VALUES, GATE), {}),
    "gla": (gla, (*QK, VALUES, gates(B, T, H, K)), {}),
    "gated_delta_rule": (gated_delta_rule, (*QK, VALUES, GATE, SHARES[0]), {}),
    "taylor_attention": (taylor_attention, (*QK, VALUES), {}),
    "short_conv": (short_conv, (normal(B, T, E), normal(4, E), normal(E)), dict(activation="silu")),
    "short_conv, one tap": (short_conv, (normal(B, T, E), normal(1, E), None), {}),
    "dilated_conv": (
        dilated_conv, (normal(B, T, E), 0.5 * normal(2, 3, E), normal(2, E)), dict(dilations=(1, 3))
    ),
    "dilated_conv, further": (
        dilated_conv, (normal(B, T, E), 0.5 * normal(2, 3, E), normal(2, E)), dict(dilations=(2, 7))
    ),
    "dilated_conv, both ways": (
        dilated_conv, (normal(B, T, E), 0.5 * normal(2, 3, E), normal(2, E)),
        dict(dilations=(1, 3), symmetric=True),
    ),
    "window": (chunk_attention, (*QK, VALUES), dict(window=6)),
    "window, further": (chunk_attention, (*QK, VALUES), dict(window=11)),
    "chunk": (chunk_attention, (*QK, VALUES, normal(H, 9)), dict(chunk=5)),
    "chunk, both ways": (chunk_attention, (*QK, VALUES), dict(chunk=4, causal=False)),
    "neural_memory": (
        neural_memory, (QK[0], QK[1], VALUES[..., :K], *SHARES[:2], 0.1 * SHARES[2], *MEMORY),
        dict(chunk=3),
    ),
    "attention, no state": (full_attention, (normal(B, T, 4, K), *QK), dict(causal=True)),
    "attention, both ways, no state": (
        full_attention, (normal(B, T, 4, K), *QK), dict(causal=False)
    ),
    "long_conv": (long_conv, (*LONG, normal(8)), {}),
    "long_conv, both ways": (long_conv, (*LONG, normal(8), LONG[1][:, ::-1]), {}),
}  # fmt: skip
QUICK = {("gated_delta_rule", True), ("window, further", True), ("long_conv", False)}
NAMED = [
    pytest.param(name, ids, marks=() if (name, ids) in QUICK else pytest.mark.slow)
    for name in CASES
    for ids in (False, True)
]


def mesh_of(**sizes):
    shape = [sizes.get(name, 1) for name in MESH_AXES]
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def results(op, options, weights, args, state, ids):
    """y, the state, and the gradients of a sum of both by arguments and state."""

    def total(args, state):
        found = sharded(op, *args, initial_state=state, segment_ids=ids, **options)
        y, after = found if op.axes.state else (found, None)
        leaves = [y, *(x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating))]
        scored = [jnp.sum(x * w) for x, w in zip(leaves, weights, strict=True)]
        return sum(scored), (y, after)

    (_, found), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True, allow_int=True)(
        args, state
    )
    return found, [g for g in jax.tree.leaves(grads) if g.dtype != jax.dtypes.float0]


def state_of(op, args, options):
    """A state that was reached by other tokens, in documents 2 and 1."""
    flipped = [x[:, ::-1] if x is not None and x.shape[:2] == (B, T) else x for x in args]
    ids = jnp.broadcast_to(jnp.asarray(LAST)[:, None], (B, T))
    return op(*flipped, segment_ids=ids, **options)[1]


@pytest.mark.parametrize(("name", "with_ids"), NAMED)
def test_rows_over_devices_are_rows_on_one(name, with_ids):
    op, args, options = CASES[name]
    options = options | dict(implementation="xla")
    stateless = "both ways" in name or "no state" in name
    state = None if stateless or not with_ids else state_of(op, args, options)
    ids = jnp.asarray(IDS) if with_ids else None
    given = {} if stateless else dict(initial_state=state)
    shapes = jax.eval_shape(lambda: op(*args, segment_ids=ids, **given, **options))
    weights = [
        normal(*x.shape, seed=i)
        for i, x in enumerate(jax.tree.leaves(shapes))
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    run = functools.partial(results, op, options, weights)
    want = jax.jit(run)(args, state, ids)
    mesh = mesh_of(data=2, sequence=SHARDS)
    everywhere = jax.device_put((args, state, ids), NamedSharding(mesh, PartitionSpec()))
    with use_mesh(mesh):
        # a function of its own: what was traced without a mesh is not taken again
        got = jax.jit(lambda *a: run(*a))(*everywhere)
    assert jax.tree.structure(want) == jax.tree.structure(got)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * max(1.0, np.abs(a).max(initial=0)))
