"""Bytes by BlockSpecs and around kernels, against counts by hand. Nothing here is ever run."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from pallas_kernels.core.blocks import UnknownIndex
from pallas_kernels.core.tpu import TpuConfig, kernel_call
from pallas_kernels.core.traffic import traffic

F32 = 4


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def call(grid, in_specs, out_specs, out_shape, **more):
    def body(*refs):
        refs[-1][...] = jnp.zeros_like(refs[-1])

    return kernel_call(
        functools.partial(body),
        name="toy",
        config=TpuConfig(),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        semantics=("arbitrary",) * len(grid),
        **more,
    )


def double(x):
    """Reads and writes x once: 8 rows at a time."""
    rows, lanes = x.shape
    spec = pl.BlockSpec((8, lanes), lambda i: (i, 0))
    return call((math.ceil(rows / 8),), [spec], spec, shape(rows, lanes))(x)


def test_a_block_counts_once_while_its_index_stays():
    """A product by 2 x 3 x 4 blocks: x is read for each j, w for each i, y written once."""

    def product(x, w):
        return call(
            (2, 3, 4),
            [
                pl.BlockSpec((8, 128), lambda i, j, k: (i, k)),
                pl.BlockSpec((128, 256), lambda i, j, k: (k, j)),
            ],
            pl.BlockSpec((8, 256), lambda i, j, k: (i, j)),
            shape(16, 768),
        )(x, w)

    found = traffic(product, shape(16, 512), shape(512, 768))
    (kernel,) = found.kernels
    assert kernel.name == "toy" and kernel.grid == (2, 3, 4)
    assert kernel.read == F32 * (3 * 16 * 512 + 2 * 512 * 768)
    assert kernel.written == F32 * 16 * 768
    assert found.around == 0


def test_one_that_stays_along_the_inner_axes_is_read_once_per_outer_step():
    """A parameter whose index hangs on the outer axis, and one that never changes."""

    def scan(x, outer, whole):
        return call(
            (3, 5),
            [
                pl.BlockSpec((None, 8, 128), lambda b, i: (b, i, 0)),
                pl.BlockSpec((1, 128), lambda b, i: (b, 0)),
                pl.BlockSpec((16, 128), lambda b, i: (0, 0)),
            ],
            pl.BlockSpec((None, 1, 128), lambda b, i: (b, 0, 0)),
            shape(3, 1, 128),
        )(x, outer, whole)

    (kernel,) = traffic(scan, shape(3, 40, 128), shape(3, 128), shape(16, 128)).kernels
    assert kernel.read == F32 * 128 * (3 * 40 + 3 + 16)
    assert kernel.written == F32 * 128 * 3


def test_backward_order_and_blocks_over_the_end():
    """20 rows by 8, walked backward: the last block moves the 4 rows that are there."""

    def backward(x):
        spec = pl.BlockSpec((8, 128), lambda i: (2 - i, 0))
        return call((3,), [spec], spec, shape(20, 128))(x)

    (kernel,) = traffic(backward, shape(20, 128)).kernels
    assert kernel.read == kernel.written == F32 * 20 * 128


def test_what_is_not_cut_into_blocks_counts_once():
    def whole(x):
        spec = pl.BlockSpec(memory_space=pl.ANY)
        return call((7,), [spec], pl.BlockSpec((8, 128), lambda i: (i, 0)), shape(56, 128))(x)

    (kernel,) = traffic(whole, shape(100, 128, dtype=jnp.bfloat16)).kernels
    assert kernel.read == 2 * 100 * 128


def by_ids(ids, x):
    """Row i of blocks goes through the memory that ids names, computed by a floor division."""
    return call(
        (6,),
        [pl.BlockSpec((None, 8, 128), lambda i, ids: (ids[i] // 2, 0, 0))],
        pl.BlockSpec((8, 128), lambda i, ids: (i, 0)),
        shape(48, 128),
        num_scalar_prefetch=1,
    )(ids, x)


@pytest.mark.parametrize("ids, fetched", [([0, 1, 1, 2, 4, 5], 3), ([0] * 6, 1), ([0, 2] * 3, 6)])
def test_prefetched_ids_are_given_as_numbers(ids, fetched):
    ids = np.array(ids, np.int32)
    (kernel,) = traffic(by_ids, ids, shape(3, 8, 128)).kernels
    assert kernel.read == ids.nbytes + fetched * F32 * 8 * 128

    # Also where they are computed from what is given, behind a jit.
    through = jax.jit(lambda ids, x: by_ids(jnp.cumsum(ids - ids) + ids, x))
    assert traffic(through, ids, shape(3, 8, 128)).kernels == (kernel,)


def test_ids_that_a_loop_reads_stay_known():
    ids = np.array([0, 1, 1, 2, 4, 5], np.int32)

    def looped(ids, x):
        step = lambda x, _: (x + by_ids(ids, x)[:24].reshape(3, 8, 128), None)
        return jax.lax.scan(step, x, length=4)[0]

    (kernel,) = traffic(looped, ids, shape(3, 8, 128)).kernels
    assert kernel.times == 4 and kernel.read == ids.nbytes + 3 * F32 * 8 * 128


def test_ids_that_nobody_gave_are_announced():
    with pytest.raises(UnknownIndex, match="toy, operand 0: .* give them as an array"):
        traffic(by_ids, shape(6, dtype=jnp.int32), shape(3, 8, 128))


def test_through_loops_branches_and_rules():
    once = F32 * 2 * 16 * 128
    x = shape(16, 128)

    @jax.custom_vjp
    def ruled(x):
        return double(x)

    ruled.defvjp(lambda x: (double(x), None), lambda _, dy: (double(double(dy)),))

    assert traffic(jax.jit(ruled), x).by_kernels == once
    _, pull = jax.eval_shape(lambda x: jax.vjp(ruled, x), x)
    assert traffic(lambda pull, dy: pull(dy), pull, x).by_kernels == 2 * once
    assert traffic(jax.checkpoint(double), x).by_kernels == once

    looped = lambda x: jax.lax.scan(lambda x, _: (double(x), None), x, length=5)[0]
    found = traffic(looped, x)
    assert found.by_kernels == 5 * once and found.kernels[0].times == 5

    def either(one, x):
        return jax.lax.cond(one, double, lambda x: double(double(x)), x)

    assert traffic(either, shape(dtype=jnp.bool_), x).by_kernels == 2 * once

    by_platform = lambda x: jax.lax.platform_dependent(x, tpu=double, default=lambda x: x @ x.T @ x)
    found = traffic(by_platform, x)
    assert found.by_kernels == once and found.around == 0
    assert traffic(by_platform, x, platform="cpu").by_kernels == 0


def test_inside_a_shard_map_one_device_counts():
    mesh = jax.make_mesh((2,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("b")
    spread = jax.shard_map(double, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    assert traffic(spread, shape(32, 128)).by_kernels == F32 * 2 * 16 * 128


def test_passes_around_a_kernel():
    """Padding and turning x: read, written; a sum of what the kernel gives: read, written."""

    def program(x, bias):
        padded = jnp.pad(jnp.swapaxes(x, 0, 1) + bias, ((0, 3), (0, 0)))
        return jnp.sum(double(padded).reshape(2, 8, 128), axis=0)

    found = traffic(program, shape(128, 13), shape(128))
    padded = 16 * 128
    assert found.by_kernels == F32 * 2 * padded
    before = 13 * 128 + 128 + padded
    after = padded + 8 * 128
    assert found.around == F32 * (before + after)


def test_what_costs_nothing_and_what_nobody_uses():
    def program(x):
        unused = double(jnp.exp(x)) @ x.T
        del unused
        return double(x.reshape(2, 1, 8, 128).transpose(1, 0, 2, 3).reshape(16, 128))

    found = traffic(program, shape(16, 128))
    assert len(found.kernels) == 1 and found.around == 0


def test_zeros_are_written_and_products_stand_alone():
    def program(x, w):
        def kernel(x, zeros):
            spec = pl.BlockSpec((8, 128), lambda i: (i, 0))
            return call((2,), [spec, spec], spec, shape(16, 128))(x, zeros)

        return jnp.exp(kernel(x, jnp.zeros((16, 128))) @ w)

    found = traffic(program, shape(16, 128), shape(128, 256))
    assert found.by_kernels == F32 * 3 * 16 * 128
    product = 16 * 128 + 128 * 256 + 16 * 256
    assert found.around == F32 * (16 * 128 + product + 2 * 16 * 256)


def test_a_slice_reads_what_it_takes():
    found = traffic(lambda x: double(x[16:32]), shape(1024, 128))
    assert found.around == F32 * 2 * 16 * 128
