"""What goes through device memory, by hand: blocks that share, scratch, order, hidden numbers."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import check_gpu
from pallas_kernels.core import (
    aot_gpu,
    copies,
    gpu,
    gpu_check,
    kernel_table,
    second_cache,
    touches,
)
from pallas_kernels.core.gpu_table import GpuRow, through
from pallas_kernels.core.traffic import traffic

TILE = 8 * 128 * 4  # bytes


def call(body, *given, out, grid=(1,), scratch=(), **more):
    """The traced equation of a kernel; sizes of operands and of `out` are in tiles."""
    shape = lambda n: jax.ShapeDtypeStruct((8 * n, 128), jnp.float32)
    given = [x if isinstance(x, jax.ShapeDtypeStruct) else shape(x) for x in given]
    run = gpu.kernel_call(
        body,
        name="toy_forward",
        config=gpu.GpuConfig(),
        out_type=[shape(n) for n in out],
        scratch_types=[plgpu.SMEM((8, 128), jnp.float32), plgpu.Barrier(), *scratch],
        grid=grid,
        grid_names=("i",),
        **more,
    )
    (kernel,) = traffic(run, *given, platform="cuda").kernels
    return kernel.body


def tile(ref, i):
    return ref.at[pl.ds(8 * i, 8)]


def fetch(ref, i, tile_s, barrier):
    plgpu.copy_gmem_to_smem(tile(ref, i), tile_s, barrier)
    plgpu.barrier_wait(barrier)


def store(ref, i, tile_s):
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile_s, tile(ref, i))
    plgpu.wait_smem_to_gmem(0)


def count(equation, **more):
    """Tiles read and written."""
    found = second_cache.through(touches.of_call(equation), **more)
    return found.read / TILE, found.written / TILE


def all_read_the_same(x_ref, y_ref, tile_s, barrier):
    """Four tiles of x by each block, which writes one of its own."""

    @pl.loop(0, 4)
    def _(i):
        fetch(x_ref, i, tile_s, barrier)

    store(y_ref, jax.lax.axis_index("i"), tile_s)


def test_what_blocks_share_is_fetched_once_as_long_as_it_stays():
    equation = call(all_read_the_same, 4, out=[6], grid=(6,))
    asked = copies.of_call(equation)
    assert (asked.read, asked.written) == (6 * 4 * TILE, 6 * TILE)
    assert count(equation) == (4, 6)
    assert count(equation, at_once=1) == (4, 6)
    # In step, a tile is all that has to stay; one block after the other, all of x and a tile of y.
    assert count(equation, half=TILE) == (4, 6)
    assert count(equation, half=5 * TILE, at_once=1) == (4, 6)
    assert count(equation, half=4 * TILE, at_once=1) == (24, 6)
    # Two at a time, three times: in either half.
    assert count(equation, half=3 * TILE, at_once=2) == (12, 6)


def again(scratch_ref, tile_s, barrier):
    """Four tiles written, and read again in the same order."""

    @pl.loop(0, 4)
    def _(i):
        store(scratch_ref, i, tile_s)

    @pl.loop(0, 4)
    def _(i):
        fetch(scratch_ref, i, tile_s, barrier)


def test_scratch_that_fits_is_stored_once_and_never_fetched():
    equation = call(again, out=[4])
    assert count(equation) == (0, 4)
    assert count(equation, half=4 * TILE) == (0, 4)
    assert count(equation, half=3 * TILE) == (4, 4)


def over_and_over(scratch_ref, tile_s, barrier):
    """Two tiles in turn, each written and read three times."""

    @pl.loop(0, 6)
    def _(i):
        store(scratch_ref, i % 2, tile_s)
        fetch(scratch_ref, i % 2, tile_s, barrier)


def test_what_is_written_over_is_stored_when_it_is_dropped():
    equation = call(over_and_over, out=[2])
    assert count(equation) == (0, 2)
    assert count(equation, half=TILE) == (0, 6)


def test_slices_that_overlap_count_by_what_they_cover():
    def halo(x_ref, y_ref, tile_s, barrier):
        i = jax.lax.axis_index("i")
        plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(4 * i, 8)], tile_s, barrier)
        plgpu.barrier_wait(barrier)
        store(y_ref, i, tile_s)

    assert count(call(halo, 3, out=[4], grid=(4,))) == (2.5, 4)  # rows 0 to 20
    # A slice of a row costs whole sectors: here 4 bytes of 32, by two blocks of the same sector.
    few = jax.ShapeDtypeStruct((16,), jnp.float32)

    def one(x_ref, y_ref, tile_s, barrier):
        i = jax.lax.axis_index("i")
        tile_s[...] = jnp.full((8, 128), x_ref[i])
        store(y_ref, i, tile_s)

    assert count(call(one, few, out=[2], grid=(2,)))[0] * TILE == 32
    assert count(call(one, few, out=[9], grid=(9,)))[0] * TILE == 64


def test_numbers_that_pass_through_scratch_are_followed():
    def hidden(x_ref, y_ref, tile_s, barrier, zero_s):
        zero_s[0] = 0

        @pl.loop(0, 4)
        def _(i):
            fetch(x_ref, zero_s[0] ^ (i % 2), tile_s, barrier)

        store(y_ref, 0, tile_s)

    whole = plgpu.SMEM((1,), jnp.int32)
    assert count(call(hidden, 4, out=[1], scratch=[whole])) == (2, 1)

    def with_data(x_ref, y_ref, tile_s, barrier):
        fetch(x_ref, 1, tile_s, barrier)
        fetch(x_ref, 3 + gpu.hidden_zero(tile_s[0, 0]), tile_s, barrier)
        store(y_ref, 0, tile_s)

    assert count(call(with_data, 4, out=[1])) == (2, 1)


def test_where_a_copy_cannot_be_followed_there_is_no_figure():
    def by_data(x_ref, at_ref, y_ref, tile_s, barrier):
        fetch(x_ref, at_ref[0], tile_s, barrier)
        store(y_ref, 0, tile_s)

    equation = call(by_data, 4, jax.ShapeDtypeStruct((1,), jnp.int32), out=[1])
    assert copies.of_call(equation).bytes == 2 * TILE + 4
    with pytest.raises(touches.UnknownPlace, match="axis 0"):
        touches.of_call(equation)
    assert second_cache.of_call(equation) is None

    # Whether it copies at all may hang on data: then it does.
    def perhaps(x_ref, at_ref, y_ref, tile_s, barrier):
        pl.when(at_ref[0] > 0)(lambda: fetch(x_ref, 3, tile_s, barrier))
        store(y_ref, 0, tile_s)

    equation = call(perhaps, 4, jax.ShapeDtypeStruct((8,), jnp.int32), out=[1])
    assert second_cache.of_call(equation).bytes == 2 * TILE + 32


def test_branches_are_taken_by_the_blocks_that_take_them():
    def body(x_ref, y_ref, tile_s, barrier):
        """One warpgroup fetches a tile; the other stores four, in every second block."""
        i, wg = jax.lax.axis_index("i"), jax.lax.axis_index("wg")
        pl.when(wg == 0)(lambda: fetch(x_ref, 0, tile_s, barrier))

        @pl.when((wg == 1) & (i % 2 == 0))
        def _():
            for j in range(4):
                store(y_ref, 2 * i + j, tile_s)

    equation = call(body, 1, out=[8], grid=(3,), num_threads=2, thread_name="wg")
    found = touches.of_call(equation)
    assert [[t.blocks.tolist() for t in some] for some in found.threads] == [
        [[0, 1, 2]],
        [[0, 2]] * 4,
    ]
    assert count(equation) == (1, 8)


def test_blocks_of_a_cluster_keep_step_though_one_copies_more():
    def body(x_ref, y_ref, tile_s, barrier):
        @pl.loop(0, 4)
        def _(i):
            fetch(x_ref, i, tile_s, barrier)
            pl.when(jax.lax.axis_index("j") == 0)(lambda: store(y_ref, i, tile_s))

    equation = call(body, 4, out=[4], cluster=(2,), cluster_names=("j",))
    assert touches.of_call(equation).cluster == 2
    assert count(equation, half=TILE) == (4, 4)


def test_the_order_of_blocks_and_how_many_there_are_at_once():
    begins, sides = second_cache._begins(jnp.array([3, 1, 2, 2, 5]), 2)
    assert begins.tolist() == [0, 0, 1, 3, 3] and sides.tolist() == [0, 1, 1, 0, 1]
    assert second_cache.residents(128, None, 1000) == 1
    assert second_cache.residents(128, 255, 1000) == 2  # 65,536 registers
    assert second_cache.residents(256, 64, 100_000) == 2  # 228 KiB of shared memory
    assert second_cache.residents(512, 32, 0) == 4  # 2,048 threads
    assert second_cache.residents(512, 255, 230_000) == 1


def test_rows_of_a_pass_and_of_its_kernels():
    def run(x):
        return jax.lax.scan(lambda c, _: (double(c), None), x, length=5)[0]

    def double(x):
        return gpu.kernel_call(
            lambda x_ref, y_ref, tile_s, barrier: all_read_the_same(x_ref, y_ref, tile_s, barrier),
            name="toy_forward",
            config=gpu.GpuConfig(),
            out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
            scratch_types=[plgpu.SMEM((8, 128), jnp.float32), plgpu.Barrier()],
            grid=(4,),
            grid_names=("i",),
        )(x)

    counted = traffic(run, jax.ShapeDtypeStruct((32, 128), jnp.float32), platform="cuda").kernels
    row = GpuRow("stack", "toy", "real", "float32", "h200", "forward", around=100, minimum=TILE)
    kernel = row._replace(kernel="toy_forward", around=None, minimum=None)
    whole, one = gpu_check.with_bytes(row, [kernel], counted)
    assert (one.bytes, one.hbm, one.blocks) == (5 * 20 * TILE, 5 * 8 * TILE, 4)
    assert (whole.bytes, whole.hbm) == (one.bytes + 100, one.hbm + 100)
    assert through(whole) == 40 + 100 / TILE
    assert through(whole._replace(hbm=None)) == 100 + 100 / TILE
    # A kernel that the program has not, or documents, which nobody counts.
    assert gpu_check.with_bytes(row, [], counted)[0].hbm is None
    assert gpu_check.with_bytes(row, [kernel], ()) == [row, kernel]


def test_rows_of_the_table_are_counted_anew_without_compiling(monkeypatch, tmp_path):
    docs = pathlib.Path(__file__).parents[2] / "docs"
    rows = kernel_table.read(docs / "kernels_gpu.csv", GpuRow)
    stack = min(row.stack for row in rows)
    rows = [r for r in rows if (r.stack, r.operator) == (stack, "short_conv")]
    blank = [r._replace(bytes=None, hbm=None, minimum=None, blocks=None) for r in rows]
    assert sum(r.hbm is not None for r in rows) == 12  # three calls, two passes, one kernel each
    path = tmp_path / "kernels_gpu.csv"
    kernel_table.write(path, blank, GpuRow)
    (tmp_path / "kernels.md").write_text((docs / "kernels.md").read_text())
    monkeypatch.setattr(aot_gpu, "missing", lambda: None)
    monkeypatch.setattr(aot_gpu, "stack", lambda: stack)
    assert check_gpu.main(["short_conv", "--count", "--table", str(path)]) == 0
    assert kernel_table.read(path, GpuRow) == rows
