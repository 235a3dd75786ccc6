"""Costs: counting a jaxpr, what operators state, rooflines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import selective_scan, short_conv
from pallas_kernels.core import costs, dispatch
from pallas_kernels.core.costs import Cost, count_flops


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_products_and_elementwise():
    count = count_flops(lambda a, b: a @ b, struct(3, 4), struct(4, 5))
    assert count == Cost(flops=2 * 3 * 4 * 5, bytes=4 * (12 + 20 + 15))
    batched = count_flops(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), struct(7, 3, 4), struct(7, 4, 5)
    )
    assert batched.flops == 7 * 2 * 3 * 4 * 5
    assert count_flops(lambda a: a + 2 * a, struct(10)).flops == 20
    assert count_flops(jnp.exp, struct(10))[::2] == (10, 10)
    assert count_flops(jnp.sum, struct(10, 3)).flops == 30
    assert count_flops(lambda a: a + a, struct(10, dtype=jnp.bfloat16)).flops == 10
    assert count_flops(lambda a: a + a, struct(10, dtype=jnp.int32)).flops == 0
    conv = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    assert count_flops(conv, struct(2, 10, 3), struct(4, 3, 6)).flops == 2 * (2 * 7 * 6) * 4 * 3


def test_fourier_transforms():
    real, spectrum = struct(3, 16), struct(3, 9, dtype=jnp.complex64)
    assert count_flops(jnp.fft.rfft, real).flops == 3 * 2.5 * 16 * 4
    assert count_flops(jnp.fft.irfft, spectrum).flops == 3 * 2.5 * 16 * 4
    assert count_flops(jnp.fft.fft, struct(3, 16, dtype=jnp.complex64)).flops == 3 * 5 * 16 * 4


def test_through_structure():
    body = lambda c, _: (c * 2, None)
    assert count_flops(lambda c: jax.lax.scan(body, c, None, length=9)[0], struct(5)).flops == 45
    assert count_flops(jax.jit(lambda a: a * 2), struct(5)).flops == 5
    assert count_flops(jax.checkpoint(lambda a: a * 2), struct(5)).flops == 5
    branches = lambda a: jax.lax.cond(a[0] > 0, lambda a: a, lambda a: a * 2 + a, a)
    assert count_flops(branches, struct(5)).flops == 10
    assert count_flops(lambda a: jax.nn.relu(a), struct(5)).flops == 5  # custom_jvp

    @jax.custom_vjp
    def twice(a):
        return 2 * a

    twice.defvjp(lambda a: (2 * a, ()), lambda _, d: (2 * d,))
    assert count_flops(twice, struct(5)).flops == 5
    assert count_flops(jax.grad(lambda a: twice(a).sum()), struct(5)).flops == 5 + 5 + 5
    two = lambda a: jax.lax.reduce(
        (a, a), (0.0, 0.0), lambda x, y: (x[0] + y[0], x[1] + y[1]), (0,)
    )
    assert count_flops(two, struct(50)).flops == pytest.approx(100, abs=2)


def test_shard_map_counts_every_device():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(
        lambda a: a * 2, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    assert count_flops(spread, struct(8)).flops == 8


SIZES = dict(b=2, t=64, e=32, n=16)


@pytest.mark.parametrize("backward", [False, True])
def test_selective_scan_states_what_the_reference_does(backward):
    b, t, e, n = SIZES.values()
    arrays = [struct(b, t, e), struct(b, t, e), struct(e, n), struct(b, t, n), struct(b, t, n)]
    run = lambda *a: selective_scan(*a)[0].sum()
    with dispatch.forced("reference"):
        forward = count_flops(run, *arrays)
        whole = count_flops(jax.grad(run, argnums=tuple(range(5))), *arrays)
    stated = selective_scan.cost(**SIZES)
    counted = forward
    if backward:
        stated = selective_scan.cost(**SIZES, backward=True)
        counted = Cost(*(w - f for w, f in zip(whole, forward, strict=True)))
    # The reference keeps its states, so its backward pass does not compute them again.
    assert 0.35 < counted.flops / stated.flops < 1.5
    if not backward:
        assert forward.transcendentals == stated.transcendentals == b * t * e * n


def test_short_conv_states_what_the_reference_does():
    arrays = [struct(2, 64, 32), struct(4, 32), struct(32)]
    run = lambda *a: short_conv(*a, activation="silu")[0]
    with dispatch.forced("reference"):
        counted = count_flops(run, *arrays)
    stated = short_conv.cost(b=2, t=64, e=32, w=4)
    assert 0.5 < counted.flops / stated.flops < 1.7  # the reference also chooses and copies
    assert counted.bytes == pytest.approx(stated.bytes, rel=0.1)


def test_roofline_is_what_binds():
    sheet = costs.device("NVIDIA H200")
    assert costs.device("cpu") is None
    assert costs.roofline(Cost(flops=989e12), sheet) == pytest.approx(1)
    assert costs.roofline(Cost(flops=494e12), sheet, dtype="float32") == pytest.approx(1)
    assert costs.roofline(Cost(flops=1, bytes=4.8e12), sheet) == pytest.approx(1)
    # A scan in bfloat16 on an H200 is bound by its exponentials, not by memory.
    scan = selective_scan.cost(b=8, t=2048, e=1536, n=16, itemsize=2)
    seconds = costs.roofline(scan, sheet, matrix_units=False)
    assert seconds == pytest.approx(scan.transcendentals / sheet.transcendentals)
    assert seconds > scan.bytes / sheet.bandwidth


def test_a_kernel_counts_once_per_program():
    from jax.experimental import pallas as pl

    def double(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    block = pl.BlockSpec((8,), lambda i: (i,))
    kernel = pl.pallas_call(
        double,
        grid=(4,),
        in_specs=[block],
        out_specs=block,
        out_shape=struct(32),
        interpret=True,
    )
    assert count_flops(kernel, struct(32)).flops == 32


def test_costs_add():
    assert Cost(1, 2, 3) + Cost(1, 1, 1) == Cost(2, 3, 4)
    assert np.array_equal(Cost(1, 2, 3).times(2), (2, 4, 6))
