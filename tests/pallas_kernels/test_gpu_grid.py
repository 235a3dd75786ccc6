"""Grids that CUDA starts: only one of their axes may be longer than 65,535."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import monarch_matmul
from pallas_kernels.core import dispatch, gpu


@pytest.mark.parametrize(
    "grid, started",
    [
        ((70_000,), (70_000,)),
        ((2, 70_000), (2, 70_000)),
        ((70_000, 8), (8, 70_000)),
        ((65_535, 3, 2), (65_535, 3, 2)),
        ((70_000, 3, 2), (2, 3, 70_000)),
        ((9_000, 8, 4, 2), (2, 4, 8, 9_000)),  # the first two are one axis of CUDA's
    ],
)
def test_the_longest_axis_goes_last_where_it_must(grid, started):
    names = tuple("abcd"[: len(grid)])
    found, ordered = gpu.startable(grid, names)
    assert found == started
    assert dict(zip(ordered, found, strict=True)) == dict(zip(names, grid, strict=True))


def test_two_axes_that_are_too_long():
    with pytest.raises(ValueError, match="rows 70,000, heads 80,000; .* 65,535"):
        gpu.startable((70_000, 80_000), ("rows", "heads"))


def test_many_tokens():
    """8 million of them are 65,536 blocks of 128: more than z has."""
    x, w = jax.ShapeDtypeStruct((64, 131_072, 256), jnp.bfloat16), jnp.zeros((2, 128, 128))
    with dispatch.compiling_for("NVIDIA H200"):
        jaxpr = jax.make_jaxpr(lambda x: monarch_matmul(x, w, implementation="pallas_gpu"))(x)
    assert "grid=(1, 2, 65536)" in str(jaxpr)
