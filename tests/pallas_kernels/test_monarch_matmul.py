"""monarch_matmul: the operators' suite, the dense matrix, the authors' values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import monarch_matmul
from pallas_kernels.core import testing
from pallas_kernels.core.costs import count_flops
from pallas_kernels.core.dispatch import forced
from pallas_kernels.monarch_matmul.arg_specs import SPECS, named

SQUARE, RECTANGULAR, BLOCKS = map(named, ("square_36", "rectangular", "blocks"))
SMALL = [spec for spec in SPECS if "test" in spec.tags]


def op(x, w1, w2=None, *, initial_state=None, segment_ids=None, **how):
    """The operator as the suite calls one: with documents, which tokens alone do not know, and a
    state, which is empty."""
    del initial_state, segment_ids
    return monarch_matmul(x, w1, w2, **how), ()


op.axes = monarch_matmul.axes


@pytest.mark.parametrize("spec", SMALL, ids=lambda s: s.name)
def test_agrees(spec):
    testing.check_agrees(op, spec, 5)


@pytest.mark.parametrize("length", testing.FAST_LENGTHS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_agrees_in_other_precisions(dtype, length):
    testing.check_agrees(op, RECTANGULAR, length, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("length", testing.SLOW_LENGTHS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("spec", SMALL, ids=lambda s: s.name)
def test_agrees_at_more_lengths(spec, dtype, length):
    testing.check_agrees(op, spec, length, dtype=dtype)


def test_dtypes():
    testing.check_state_dtypes(op, SQUARE)


@pytest.mark.parametrize("spec", [RECTANGULAR, BLOCKS], ids=lambda s: s.name)
def test_vmap(spec):
    testing.check_vmap(op, spec, 3)


def test_deterministic():
    testing.check_deterministic(op, RECTANGULAR, 7)


def test_program_size():
    testing.check_program_size(op, SQUARE, 130, 20_001)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("spec", SMALL, ids=lambda s: s.name)
def test_is_its_dense_matrix(spec, implementation):
    """The identity pushed through is P^T L P R, and x times it is y."""
    arrays = testing.draw_case(op, spec, 3, dtype="float64").arrays
    x, factors = arrays["x"], [arrays[n] for n in ("w1", *spec.given)]
    with jax.enable_x64(True):
        call = jax.jit(functools.partial(monarch_matmul, implementation=implementation))
        pushed = np.asarray(call(np.eye(x.shape[-1])[None], *factors)[0]).T
        y = np.asarray(call(x, *factors))
    dense = block_diagonal(factors[0])
    if len(factors) == 2:
        n_blocks, s, r = factors[1].shape
        dense = turn(n_blocks, s) @ block_diagonal(factors[1]) @ turn(r, n_blocks) @ dense
    np.testing.assert_allclose(pushed, dense, atol=1e-14)
    np.testing.assert_allclose(y, x @ dense.T, atol=1e-13)


def block_diagonal(w):
    k, q, p = w.shape
    dense = np.zeros((k * q, k * p))
    for i in range(k):
        dense[i * q : (i + 1) * q, i * p : (i + 1) * p] = w[i]
    return dense


def turn(rows, columns):
    """The permutation matrix that turns an axis, as a matrix `[rows columns]`, round."""
    place = np.arange(rows * columns).reshape(rows, columns).T.reshape(-1)
    return np.eye(rows * columns)[place]


@pytest.mark.parametrize(
    "name", ["square_n16", "square_n64", "rect_24_to_35", "rect_12_to_20", "blocks"]
)
def test_golden(golden, name):
    """The authors' values, forward and every gradient."""
    blocks = name == "blocks"
    file = golden(f"monarch_mixer/{'blockdiag_24_48_nb4_nobias' if blocks else 'monarch_' + name}")
    names = dict(x="x", w1="w.weight") if blocks else dict(x="x", w1="w1", w2="w2")
    arrays = {n: file[f"in.{theirs}"] for n, theirs in names.items()}
    lead = (1,) * (3 - arrays["x"].ndim)
    arrays["x"] = arrays["x"].reshape(lead + arrays["x"].shape)
    y, pull = jax.vjp(jax.jit(lambda a: monarch_matmul(**a)), arrays)
    (grads,) = pull(file["ct.y"].reshape(y.shape))
    assert_near(y, file["out64.y"], 1e-5)
    for n, theirs in names.items():
        assert_near(grads[n], file[f"grad64.{theirs}"], 1e-4)
    if not blocks:
        identity = np.eye(arrays["x"].shape[-1], dtype=np.float32)[None]
        dense = monarch_matmul(identity, arrays["w1"], arrays["w2"])[0].T
        assert_near(dense, file["out64.dense"], 1e-5)


def assert_near(got, want, tolerance):
    got = np.asarray(got).reshape(want.shape)
    assert np.max(np.abs(got - want)) <= tolerance * max(np.max(np.abs(want)), 1e-5)


def test_keeps_nothing_but_what_stands_between():
    """Residuals: the arguments, and Z' where there are two factors."""
    for spec in (RECTANGULAR, BLOCKS):
        arrays = testing.draw_case(op, spec, 6).arrays
        _, pull = jax.vjp(lambda a: monarch_matmul(**a), arrays)
        kept = sum(leaf.size for leaf in jax.tree.leaves(pull) if hasattr(leaf, "size"))
        given = sum(a.size for a in arrays.values())
        between = arrays["x"].shape[0] * 6 * spec.sizes["k"] * spec.sizes["q"]
        assert kept <= given + between * bool(spec.given)


def test_cost_counts_what_the_reference_does():
    spec = named("square_64")
    arrays = testing.draw_case(op, spec, 5).arrays
    sizes = {x: n for x, n in spec.sizes.items() if x != "n"}
    with forced("reference"):
        found = count_flops(monarch_matmul, *arrays.values())
    assert found.flops == monarch_matmul.cost(t=5, **sizes).flops
    assert found.flops == 4 * 64**1.5 * 4 * 5


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((2, 3, 10), (4, 5, 3)), "x has 10 channels and w1 .* takes k \\* p = 12"),
        (((2, 3, 12), (4, 5, 3), (6, 2, 3)), "gives k \\* q = 20 channels .* l \\* r = 18"),
        (((3, 12), (4, 5, 3)), r"x has shape \(3, 12\); it must be \[b t n\]"),
        (((2, 3, 12), (4, 15)), r"w1 has shape \(4, 15\); it must be \[k q p\]"),
    ],
)
def test_bad_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        monarch_matmul(*map(jnp.ones, shapes))


def test_integers():
    with pytest.raises(TypeError, match="x has dtype int32"):
        monarch_matmul(jnp.ones((1, 2, 4), jnp.int32), jnp.ones((2, 2, 2)))
