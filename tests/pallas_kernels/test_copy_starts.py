"""Copies that begin within a tile are found when a kernel is lowered, on no GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import launch_context, utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import copy_starts, gpu

TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def moving(x, at, *, step, writes=False):
    """Copies 8 rows of x `[b t e]` from, or to, row `at * step`."""

    def body(x_ref, at_ref, y_ref, x_s, barrier):
        here, first = ((0, pl.ds(row, 8)) for row in (at_ref[0] * step, 0))
        plgpu.copy_gmem_to_smem(x_ref.at[first if writes else here], x_s, barrier)
        plgpu.barrier_wait(barrier)
        plgpu.copy_smem_to_gmem(x_s, y_ref.at[here if writes else first])
        plgpu.wait_smem_to_gmem(0)

    return gpu.kernel_call(
        body,
        name="toy_forward",
        config=gpu.GpuConfig(),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM((8, 64), x.dtype, transforms=TILES), plgpu.Barrier()],
        grid=(1,),
        grid_names=("row",),
        semantics=plgpu.LoweringSemantics.Lane,
    )(x, at)


def lowered(**options):
    x, at = jax.ShapeDtypeStruct((2, 32, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1,), jnp.int32)
    traced = jax.jit(functools.partial(moving, **options)).trace(x, at)
    with copy_starts.checked():
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("writes", [False, True])
def test_a_start_from_data_is_found_and_a_multiple_of_the_tile_is_not(writes):
    before = launch_context.TileTransform.transform_index
    assert "mosaic_gpu" in lowered(step=16, writes=writes)
    found = r"^toy_forward: a copy of \[2, 32, 64\] into tiles of \(8, 64\) begins along "
    found += r"dimension 1 at what may be no multiple of 8: [^;]*; begin at i \* 8, or [^;]*$"
    with pytest.raises(copy_starts.MisplacedCopy, match=found):
        lowered(step=4, writes=writes)
    assert launch_context.TileTransform.transform_index is before


def test_a_jax_whose_copies_cannot_be_seen_breaks_the_check(monkeypatch):
    def unlike(*arguments):
        raise NotImplementedError("another jax")

    monkeypatch.setattr(utils, "is_known_divisible", unlike)
    with pytest.raises(copy_starts.MisplacedCopy, match=r"nobody can see .*another jax"):
        lowered(step=8)
    monkeypatch.delattr(launch_context.LaunchContext, "_prepare_async_copy")
    with pytest.raises(copy_starts.MisplacedCopy, match="jax has no .*nobody can see"):
        lowered(step=8)
