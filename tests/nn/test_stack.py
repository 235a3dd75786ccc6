"""Layers cut into runs and scanned: the same as one after the other, compiled once per kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.nn.linear import linear
from seqzoo.nn.mlp import SwiGLU
from seqzoo.nn.param import axes_of, decays
from seqzoo.nn.report import report, report_loss
from seqzoo.nn.stack import Stack, cut

D = 8


class Toy(nnx.Module):
    """y_t = W sum_{s<=t} x_s: has a state, reports, and a parameter that declares nothing."""

    def __init__(self, d_model, *, dtype="float32", rngs):
        self.w = linear(d_model, d_model, axes=("embed", "inner"), dtype=dtype, rngs=rngs)
        self.plain = nnx.Param(jnp.ones(d_model))

    def __call__(self, x, *, segment_ids=None, state=None):
        report(self, "mean", jnp.mean(x))
        report_loss(self, "size", jnp.mean(x**2))
        state = self.init_state(x.shape[0]) if state is None else state
        total = jnp.cumsum(x, 1) + state[:, None]
        return self.w(total) * self.plain[...], total[:, -1]

    def init_state(self, batch_size, *, max_length=None):
        return jnp.zeros((batch_size, D))

    def step(self, x_t, state):
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def state_bytes(self, context_length):
        return {"recurrent": 4 * D, "total": 4 * D}


def make(n_layers, pattern=("a",), **keywords):
    toy = functools.partial(Toy, D)
    return Stack(
        D,
        n_layers=n_layers,
        pattern=pattern,
        mixers={"a": toy, "b": toy},
        rngs=nnx.Rngs(keywords.pop("seed", 0)),
        **keywords,
    )


@pytest.mark.parametrize(
    "layers, runs",
    [
        ("m", [("m", 1)]),
        ("mmmm", [("m", 4)]),
        ("mma" * 2 + "m", [("mma", 2), ("m", 1)]),
        ("ma" * 5, [("ma", 5)]),
        ("mmmammmm", [("m", 3), ("a", 1), ("m", 4)]),
        ("m" * 31 + "a", [("m", 31), ("a", 1)]),
        ("abc", [("abc", 1)]),
    ],
)
def test_cut(layers, runs):
    assert [("".join(run.period), run.repeats) for run in cut(layers)] == runs
    starts = [run.start for run in cut(layers)]
    assert starts == list(np.cumsum([0] + [len(p) * r for p, r in runs])[:-1])


def test_equals_one_layer_after_the_other():
    stack = make(5, ("a", "a", "b"), channel_mixer=functools.partial(SwiGLU, D))
    x = jax.random.normal(jax.random.key(0), (2, 6, D))
    want = x
    for run, blocks in zip(stack.plan, stack.runs, strict=True):
        graphdef, variables = nnx.split(blocks)
        for repeat in range(run.repeats):
            for block in nnx.merge(graphdef, jax.tree.map(lambda a, i=repeat: a[i], variables)):
                want, _ = block(want)
    np.testing.assert_allclose(stack(x).x, want, rtol=1e-5, atol=1e-6)


def test_layers_start_differently():
    stack = make(4)
    kernel = nnx.as_pure(nnx.state(stack))["runs"][0][0]["mixer"]["w"]["kernel"]
    assert kernel.shape == (4, D, D)
    assert len({float(k[0, 0]) for k in kernel}) == 4


def test_the_same_seed_gives_the_same_layer_whatever_stands_around_it():
    """Layer i draws from its own key: a deeper model shares the first layers of a shallow one."""
    first, deeper = (nnx.as_pure(nnx.state(make(n)))["runs"][0][0] for n in (2, 6))
    np.testing.assert_array_equal(first["mixer"]["w"]["kernel"], deeper["mixer"]["w"]["kernel"][:2])


def test_steps_and_chunks():
    stack = make(5, ("a", "b", "b"))
    x = jax.random.normal(jax.random.key(1), (2, 7, D))
    whole = stack(x, return_state=True)
    state, outputs = stack.init_state(2), []
    for t in range(3):
        y, state = stack.step(x[:, t], state)
        outputs.append(y[:, None])
    rest = stack(x[:, 3:], state=state, return_state=True)
    np.testing.assert_allclose(
        jnp.concatenate([*outputs, rest.x], 1), whole.x, rtol=1e-5, atol=1e-6
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), rest.state, whole.state)
    assert stack.state_bytes(10) == {"recurrent": 5 * 4 * D, "total": 5 * 4 * D}
    assert stack(x).state is None


def test_unrolled_is_the_same_layer_by_layer():
    """For steps: no layer shares an array, and a state that was read with goes on."""
    stack = make(5, pattern=("a", "a", "b"))
    apart = stack.unrolled()
    assert [run.repeats for run in apart.plan] == [1] * len(apart.plan)
    assert apart.layers == stack.layers
    x = jax.random.normal(jax.random.key(0), (2, 4, D))
    state = stack(x[:, :3], return_state=True).state
    want, after = stack.step(x[:, 3], state)
    got, apart_after = apart.step(x[:, 3], stack.unrolled_state(state))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, stack.unrolled_state(after), apart_after)
    fresh = jax.tree.map(jnp.shape, apart.init_state(2))
    assert fresh == jax.tree.map(jnp.shape, stack.unrolled_state(state))


def test_reports_come_per_layer():
    stack = make(7, ("a", "a", "b"))
    assert [(run.period, run.repeats) for run in stack.plan] == [(tuple("aab"), 2), (("a",), 1)]
    x = jax.random.normal(jax.random.key(1), (2, 7, D))
    told, in_order = (jax.jit(lambda x, s=s: s(x).reports)(x) for s in (stack, stack.unrolled()))
    assert told.values["mean"].shape == (7,)
    np.testing.assert_allclose(told.values["mean"], in_order.values["mean"], atol=1e-6)
    assert told.losses["size"].shape == () and told.losses["size"] > 0
    gradient = jax.grad(lambda x: stack(x).reports.losses["size"])(x)
    assert float(jnp.max(jnp.abs(gradient))) > 0


@pytest.mark.parametrize("remat", ["full", "dots", "dots_no_batch"])
def test_remat_changes_nothing(remat):
    x = jax.random.normal(jax.random.key(1), (2, 7, D))
    mlp = functools.partial(SwiGLU, D)
    gradients = []
    for how in ("none", remat):
        stack = make(4, remat=how, channel_mixer=mlp, dropout=0.3)
        graphdef, variables = nnx.split(stack)
        loss = lambda v, g=graphdef: jnp.sum(nnx.merge(g, v)(x, key=jax.random.key(3)).x ** 2)
        gradients.append(nnx.as_pure(jax.grad(loss)(variables)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *gradients)


def test_dropout_follows_its_key_alone():
    stack = make(3, dropout=0.5)
    x = jnp.ones((2, 4, D))
    outputs = [stack(x, key=None if n is None else jax.random.key(n)).x for n in (1, 1, 2, None)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])
    np.testing.assert_array_equal(outputs[3], make(3, dropout=0.0)(x).x)


def test_what_layers_declare_outlives_stacking():
    """A vector stacked over layers is still a vector: no weight decay."""
    found = {path[-1]: v for path, v in nnx.to_flat_state(nnx.state(make(3), nnx.Param))}
    assert axes_of(found["kernel"]) == (None, "embed", "inner") and decays(found["kernel"])
    assert found["plain"].shape == (3, D)
    assert axes_of(found["plain"]) == (None, None) and not decays(found["plain"])
    assert not decays(found["scale"])


def test_compiles_the_same_for_any_depth():
    texts = []
    for n_layers in (4, 32):
        graphdef, variables = nnx.split(nnx.eval_shape(lambda n=n_layers: make(n, ("a", "b"))))
        run = lambda v, x, g=graphdef: nnx.merge(g, v)(x).x
        texts.append(jax.jit(run).lower(variables, jnp.ones((1, 4, D))).as_text())
    assert len(texts[0].splitlines()) == len(texts[1].splitlines())


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(n_layers=0), "n_layers is 0"),
        (dict(pattern=()), "no layers"),
        (dict(pattern=("c",)), "pattern names 'c'; mixers has"),
        (dict(remat="some"), "remat is 'some'; allowed: none, full"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        make(**{"n_layers": 2, **keywords})
