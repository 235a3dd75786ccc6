"""What states are kept in: float32 at least, and float64 where a mixer computes in that. And what
comes of them where there is nothing to read, and where they do not fit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from seqzoo import mixers

SETTINGS = {
    "MonarchMixer": dict(max_length=32),
    "TitansLMM": dict(head_dim=16, chunk=8),
    "TitansMAC": dict(head_dim=16, chunk=8, segment=16),
    "TitansMAG": dict(head_dim=16, chunk=8, window=12),
    "TitansMAL": dict(head_dim=16, chunk=8, window=12),
}
# Attention adds nothing to the keys and values that it keeps; Monarch Mixer's kernels are as wide
# as the parameters that they are made of.
KEPT = {
    ("Attention", "bfloat16"): {"bfloat16"},
    ("MonarchMixer", "float64"): {"float32", "float64"},
}


@pytest.mark.parametrize("name", mixers.__all__)
def test_a_state_is_as_wide_as_its_sums(name):
    """What is kept, and how many bytes that is; float64 does not change under way."""
    for dtype, wide in {"bfloat16": "float32", "float64": "float64"}.items():
        with jax.enable_x64(dtype == "float64"):
            mixer, state, run = abstract(name, dtype)
            types = lambda tree: [str(leaf.dtype) for leaf in jax.tree.leaves(tree)]
            assert set(types(state)) - {"int32"} <= KEPT.get((name, dtype), {wide})
            held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            assert mixer.state_bytes(32)["total"] == held
    (y, after), (y_t, stepped), (y_new, opened) = run(state)
    assert y.dtype == y_t.dtype == y_new.dtype == "float64"
    assert types(after) == types(stepped) == types(opened) == types(state)


@pytest.mark.parametrize("name", mixers.__all__)
def test_nothing_to_read(name):
    """An empty chunk of a stream and a batch of no rows come out as they went in."""
    mixer = nnx.eval_shape(lambda: make(name, "bfloat16"))
    graphdef, variables = nnx.split(mixer)
    read = lambda v, x, ids, state: nnx.merge(graphdef, v)(x, segment_ids=ids, state=state)
    for b, t in ((2, 0), (0, 5)):
        new = lambda v, b=b: nnx.merge(graphdef, v).init_state(b, max_length=32)
        state = jax.eval_shape(new, variables)
        x = jax.ShapeDtypeStruct((b, t, 64), "bfloat16")
        documents = jax.ShapeDtypeStruct((b, t), jnp.int32)
        for ids, before in ((documents, state), (None, state), (documents, None)):
            trace = jax.make_jaxpr(read, return_shape=True)
            program, (y, after) = trace(variables, x, ids, before)
            kept = program.jaxpr.outvars[1:]
            assert len(set(map(id, kept))) == len(kept)  # a state is donated: no buffer twice
            assert (y.shape, y.dtype) == (x.shape, x.dtype)
            assert before is None or after == before


class Other(NamedTuple):
    """A state of another mixer."""

    h: jax.Array


@pytest.mark.parametrize("name", mixers.__all__)
def test_what_does_not_fit_is_refused(name):
    """Other ranks, types, rows and states: much of it would broadcast, and give numbers."""
    graphdef, variables = nnx.split(nnx.eval_shape(lambda: make(name, "float32")))
    new = lambda v: nnx.merge(graphdef, v).init_state(3, max_length=32)
    three = jax.eval_shape(new, variables)
    of = jax.ShapeDtypeStruct
    x, other = of((2, 5, 64), "float32"), Other(of((2, 64), "float32"))
    read = lambda x, ids=None, state=None: jax.eval_shape(
        lambda v, *args: nnx.merge(graphdef, v)(args[0], segment_ids=args[1], state=args[2]),
        *(variables, x, ids, state),
    )
    step = lambda x_t, state: jax.eval_shape(
        lambda v, *args: nnx.merge(graphdef, v).step(*args), variables, x_t, state
    )
    x_t = of((2, 64), "float32")
    for message, attempt in (
        (r"x has shape \(5, 64\); it must be \[b t d\]", lambda: read(of((5, 64), "float32"))),
        ("x has dtype int32; it must be a float", lambda: read(of((2, 5, 64), "int32"))),
        (r"segment_ids has shape \(1, 5\)", lambda: read(x, of((1, 5), "int32"))),
        (r"segment_ids has shape \(2, 1\)", lambda: read(x, of((2, 1), "int32"))),
        ("segment_ids has dtype float32", lambda: read(x, of((2, 5), "float32"))),
        (r"state has 3 rows and x 2; init_state\(2\)", lambda: read(x, None, three)),
        (r"state has 3 rows and x 2; init_state\(2\)", lambda: step(x_t, three)),
        ("state is a Other; this mixer takes the", lambda: read(x, None, other)),
        ("state is a Other; this mixer takes the", lambda: step(x_t, other)),
        (r"x has shape \(2, 1, 5, 64\); .* \[b d\] for step", lambda: step(x, three)),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            attempt()


def make(name, dtype):
    return getattr(mixers, name)(64, **SETTINGS.get(name, {}), dtype=dtype, rngs=nnx.Rngs(0))


def abstract(name, dtype):
    """A mixer without memory, the state of a row, and what makes the next of it."""
    mixer = nnx.eval_shape(lambda: make(name, dtype))
    graphdef, variables = nnx.split(mixer)
    new = lambda v: nnx.merge(graphdef, v).init_state(1, max_length=32)

    def run(state):
        x = jax.ShapeDtypeStruct((1, 24, 64), dtype)
        ids = jax.ShapeDtypeStruct((1, 24), jnp.int32)
        read = lambda v, x, ids, state: (
            nnx.merge(graphdef, v)(x, segment_ids=ids, state=state),
            nnx.merge(graphdef, v).step(x[:, 0], state),
            nnx.merge(graphdef, v)(x),
        )
        with jax.enable_x64(True):
            return jax.eval_shape(read, variables, x, ids, state)

    return mixer, jax.eval_shape(new, variables), run
