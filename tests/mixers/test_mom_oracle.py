"""MoM against its definition in float64: loops over rows, documents, memories and time.

Every rule, with documents and padding. Gradients are compared with differences of the loops, and
one by one with a form that packs nothing: each memory runs over all tokens and skips the others'.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.core.segments import from_lengths
from seqzoo.mixers import MoM
from seqzoo.mixers.mom import _joined

D = 6
KEYWORDS = dict(n_heads=2, head_dim=3, expand_v=4 / 3, num_memories=3, gate_low_rank=2)
CASES = {
    "gated_deltanet": {},
    "gla": dict(d_conv=0),
    "retention": dict(single_kv_proj=True),
    "mamba2": dict(shared_mem=False, use_output_gate=False),
    "linear": dict(d_conv=2, topk=3),
}
# Between documents, before and after them; one row of a single document that goes on and on.
IDS = from_lengths([(9, 3, 15), (37,)], 41)
IDS[0] = np.roll(IDS[0], 3)


def make(rule, **keywords):
    return MoM(D, **{**KEYWORDS, **CASES[rule], **keywords}, rule=rule, rngs=nnx.Rngs(0))


# --- The definition ------------------------------------------------------------------------------


def oracle(w, x, ids, mixer):
    """`[b t d]` by loops; w are the parameters, nested dicts of float64 arrays."""
    y = np.zeros_like(x)
    for row in range(len(x)):
        for number in np.unique(ids[row][ids[row] > 0]):
            places = np.flatnonzero(ids[row] == number)
            y[row, places] = document(w, x[row, places], mixer)
    return y


def document(w, x, mixer):
    h, shared = mixer.n_heads, mixer.num_memories
    logits = x @ w["router"]["kernel"]
    chosen = np.argsort(-logits, axis=-1)[:, : mixer.topk]
    picked = np.exp(np.take_along_axis(logits, chosen, axis=-1))
    weights = picked / picked.sum(-1, keepdims=True)
    total = np.zeros((len(x), h, mixer.value_dim))
    for memory in range(mixer.n_states):
        r = 0 if mixer.single_kv_proj else memory
        mine = np.arange(len(x)) if memory == shared else np.flatnonzero((chosen == memory).any(-1))
        scale = [1.0 if memory == shared else weights[i][chosen[i] == memory][0] for i in mine]
        read = x[mine]
        projections = w["q_proj"]["kernel"], w["k_proj"]["kernel"][r], w["v_proj"]["kernel"][r]
        parts = [(read @ one).reshape(len(mine), h, -1) for one in projections]
        together = np.concatenate(parts, axis=-1)  # head by head
        together = taps(together.reshape(len(mine), -1), w.get("conv")).reshape(together.shape)
        q, k, v = np.split(together, [mixer.head_dim, 2 * mixer.head_dim], axis=-1)
        S = np.zeros((h, mixer.head_dim, mixer.value_dim))
        for n, i in enumerate(mine):
            S, query = RULES[type(mixer.rule).__name__](
                w.get("rule"), r, S, q[n], k[n], v[n], read[n]
            )
            total[i] += scale[n] * np.einsum("hk,hkv->hv", query, S)
    mean = np.mean(total**2, axis=-1, keepdims=True)
    y = total / np.sqrt(mean + mixer.norm.eps) * w["norm"]["scale"]
    y = y.reshape(len(x), -1)
    if "gate" in w:
        y = y * silu(x @ w["gate"]["kernel"])
    return y @ w["out_proj"]["kernel"]


def taps(x, conv):
    if conv is None:
        return x
    weight = conv["weight"]
    before = np.zeros((len(weight) - 1, x.shape[1]))
    padded = np.concatenate([before, x])
    return silu(sum(weight[i] * padded[i : i + len(x)] for i in range(len(weight))))


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def unit(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def write(S, k, v):
    return S + k[:, :, None] * v[:, None, :]


def gated_deltanet(w, r, S, q, k, v, x):
    dt = softplus(x @ w["a_proj"]["kernel"][r] + w["decay"]["dt_bias"])
    S = S * np.exp(-np.exp(w["decay"]["A_log"]) * dt)[:, None, None]
    beta = 1 / (1 + np.exp(-(x @ w["b_proj"]["kernel"][r])))
    q, k = unit(q), unit(k)
    S = write(S, k, beta[:, None] * (v - np.einsum("hk,hkv->hv", k, S)))
    return S, q * q.shape[-1] ** -0.5


def gla(w, r, S, q, k, v, x):
    z = x @ w["down"]["kernel"][r] @ w["up"][r] + w["bias"][r]
    decay = (1 / (1 + np.exp(-z))) ** (1 / 16)
    return write(S * decay.reshape(k.shape)[:, :, None], k, v), q * q.shape[-1] ** -0.5


def retention(w, r, S, q, k, v, x):
    gamma = 1 - 2.0 ** (-5 - np.arange(len(S)))
    return write(S * gamma[:, None, None], k, v), q * q.shape[-1] ** -0.5


def mamba2(w, r, S, q, k, v, x):
    dt = softplus(x @ w["dt_proj"]["kernel"][r] + w["decay"]["dt_bias"])
    decay = np.exp(-np.exp(w["decay"]["A_log"]) * dt)
    return write(S * decay[:, None, None], k, dt[:, None] * v), q


def linear(w, r, S, q, k, v, x):
    phi = lambda w, x: np.prod([x @ w["kernel"][i] + w["bias"][i] for i in range(2)], axis=0)
    return write(S, phi(w["k_map"], k), v), phi(w["q_map"], q) * q.shape[-1] ** -0.5


RULES = {
    "GatedDeltaNet": gated_deltanet,
    "GLA": gla,
    "Retention": retention,
    "Mamba2": mamba2,
    "Linear": linear,
}

# --- The mixer against it ------------------------------------------------------------------------


def wide(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


@pytest.mark.parametrize(
    "rule",
    [r if r == "gla" else pytest.param(r, marks=pytest.mark.slow) for r in CASES],
)
def test_equals_the_loops_in_float64(rule):
    """Outputs, and the slope along a random direction in all parameters and x at once."""
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        mixer = make(rule, dtype="float64")
        graphdef, variables = nnx.split(mixer)
        # Moved, so that what starts at 0 or 1 cannot hide.
        params = jax.tree.map(
            lambda a: a + 0.2 * rng.standard_normal(a.shape), wide(nnx.as_pure(variables))
        )
        x, dy = rng.standard_normal((2, *IDS.shape, D))
        x *= 0.5

        def loss(params, x):
            y, _ = nnx.merge(graphdef, params)(x, segment_ids=jnp.asarray(IDS))
            return jnp.sum(y * dy), y

        with jax.default_matmul_precision("highest"):
            program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
            (_, y), gradients = program(params, x)
    gradients = wide(gradients)
    want = oracle(params, x, IDS, mixer)
    np.testing.assert_allclose(y, want, atol=1e-12 * np.abs(want).max())

    point = (params, x)
    direction = jax.tree.map(lambda a: rng.standard_normal(a.shape), point)
    along = jax.tree.map(lambda a, b: np.sum(a * b), gradients, direction)
    slope = sum(jax.tree.leaves(along))
    at = lambda e: jax.tree.map(lambda a, b: a + e * b, point, direction)
    step = 1e-6
    difference = sum(
        sign * np.sum(oracle(*at(sign * step), IDS, mixer) * dy) / (2 * step) for sign in (1, -1)
    )
    np.testing.assert_allclose(slope, difference, rtol=1e-5)


# --- Nothing packed ------------------------------------------------------------------------------


def unpacked(mixer, x, ids):
    """The layer with each memory run over all tokens, those that did not choose it as padding."""
    visits, weights = mixer._visits(mixer._route(x))
    q, k, v, gates = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x), mixer.rule.gates(x)
    total = 0.0
    for memory in range(mixer.n_states):
        r = 0 if mixer.single_kv_proj else memory
        chosen = visits == memory
        own = jnp.where(jnp.any(chosen, axis=-1), ids, 0)
        earlier = places_before(own, mixer.d_conv)
        parts = mixer._heads(q, k[:, :, r], v[:, :, r])
        if mixer.conv is not None:
            parts = mixer._split(taken(_joined(parts), mixer.conv, earlier))
        arguments = mixer.rule.arguments(*parts, None if gates is None else gates[:, :, r])
        y, _ = mixer.rule.op(*arguments, segment_ids=own, **mixer.rule.options)
        total += y.reshape(*x.shape[:2], -1) * jnp.sum(jnp.where(chosen, weights, 0), -1)[..., None]
    return mixer._output(x, total[:, :, None], jnp.ones((*x.shape[:2], 1)))


def places_before(own, n):
    """int32 `[n b t]`: where the last n tokens of the same memory and document stand, or t."""
    own = np.asarray(own)
    found = np.full((n, *own.shape), own.shape[1])
    for row, i in np.argwhere(own):
        mine = np.flatnonzero(own[row, : i + 1] == own[row, i])[::-1][:n]
        found[: len(mine), row, i] = mine
    return jnp.asarray(found)


def taken(x, conv, earlier):
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))
    rows = jnp.arange(len(x))[:, None]
    taps = conv.weight[...][::-1]
    return jax.nn.silu(sum(taps[i] * padded[rows, at] for i, at in enumerate(earlier)))


@pytest.mark.slow
@pytest.mark.parametrize("rule", CASES)
def test_every_gradient_equals_that_of_a_form_that_packs_nothing(rule):
    rng = np.random.default_rng(2)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        graphdef, variables = nnx.split(make(rule, dtype="float64"))
        params = jax.tree.map(
            lambda a: a + 0.2 * rng.standard_normal(a.shape), wide(nnx.as_pure(variables))
        )
        x, dy = rng.standard_normal((2, *IDS.shape, D))
        packed = lambda mixer, x: mixer(x, segment_ids=jnp.asarray(IDS))[0]
        plain = functools.partial(unpacked, ids=IDS)
        found = []
        for form in (packed, plain):
            loss = lambda p, x, f=form: jnp.sum(jnp.sin(f(nnx.merge(graphdef, p), x)) * dy)
            # Not compiled as one: where tokens go must be known to the plain form.
            found.append(wide(jax.grad(loss, argnums=(0, 1))(params, x)))
    for got, want in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-10 * np.abs(want).max())
