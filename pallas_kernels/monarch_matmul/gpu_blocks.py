"""The kernels of one factor: a block's product with its channels, and the gradient of a factor."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu
from pallas_kernels.core.gpu_parts import multiply, tiles

CHUNK = 64  # numbers that a product adds up at a time; every size is a multiple of it
_MOST_ROWS = 128


def widest(n: int, *sizes: int) -> int:
    """The first of these sizes that divides n."""
    return next(size for size in sizes if n % size == 0)


def pipeline(body, steps: int, *in_specs, stages: int):
    """Calls body(step, *blocks) with blocks that are fetched while others are worked on."""
    call = lambda indices, *blocks: body(indices[0], *blocks)
    return plgpu.emit_pipeline(
        call, grid=(steps,), in_specs=list(in_specs), max_concurrent_steps=min(stages, steps)
    )


def block(shape, index, *, swizzle: int = 128, keep: int = 0):
    """A block of a matrix as an operand of wgmma.

    Args:
        shape: its rows and columns.
        index: of the step, gives which block, in blocks.
        swizzle: bytes.
        keep: steps for which it is still read after its own.
    """
    return plgpu.BlockSpec(shape, index, transforms=tiles(swizzle), delay_release=keep)


def product(x, w, config):
    """The blocks of w `[k q p]` on x `[rows k*p]`: `[rows k*q]` in the dtype of x."""
    (rows, _), (k, q, p) = x.shape, w.shape
    columns = widest(q, 256, 192, 128, 64)
    tokens = _MOST_ROWS if columns <= 128 and rows % _MOST_ROWS == 0 else CHUNK
    return gpu.kernel_call(
        functools.partial(_product_kernel, p=p, config=config),
        name="monarch_matmul_blocks",
        config=config,
        out_type=jax.ShapeDtypeStruct((rows, k * q), x.dtype),
        grid=(rows // tokens, k, q // columns),
        grid_names=("tokens", "block", "columns"),
        scratch_types=[plgpu.SMEM((tokens, columns), x.dtype, transforms=tiles())],
    )(x, w.reshape(k * q, p))


def _product_kernel(x_ref, w_ref, y_ref, y_s, *, p: int, config):
    tokens, columns = y_s.shape
    t, i, j = (jax.lax.axis_index(name) for name in ("tokens", "block", "columns"))
    here = i * jax.lax.axis_size("columns") + j
    steps = p // CHUNK
    keep = int(steps > 1)

    def add_up(acc):
        def step(_, x_s, w_s):
            multiply(acc, x_s, w_s, config, turn_b=True)
            plgpu.wgmma_wait(keep)

        pipeline(
            step,
            steps,
            block((tokens, CHUNK), lambda c: (t, i * steps + c), keep=keep),
            block((columns, CHUNK), lambda c: (here, c), keep=keep),
            stages=config.stages,
        )(x_ref, w_ref)
        return acc[...]

    y = pl.run_scoped(add_up, plgpu.ACC((tokens, columns), jnp.float32))
    y_s[...] = y.astype(y_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
        y_s, y_ref.at[pl.ds(t * tokens, tokens), pl.ds(here * columns, columns)]
    )
    plgpu.wait_smem_to_gmem(0)


def gradient(dz, x, k: int, config):
    """dz^T x of every block, added up over rows: `[k q p]` float32.

    Args:
        dz: `[rows k*q]`.
        x: `[rows k*p]`.
        k: blocks.
        config: of the form.
    """
    rows, q, p = dz.shape[0], dz.shape[1] // k, x.shape[1] // k
    columns = widest(p, 192, 128, 64)
    tiles_of = k * (q // CHUNK) * (p // columns)
    parts = parts_of(rows // CHUNK, tiles_of)
    found = gpu.kernel_call(
        functools.partial(_gradient_kernel, config=config),
        name="monarch_matmul_gradient",
        config=config,
        out_type=jax.ShapeDtypeStruct((parts, k * q, p), jnp.float32),
        grid=(parts, k, q // CHUNK, p // columns),
        grid_names=("part", "block", "rows", "columns"),
        scratch_types=[plgpu.SMEM((CHUNK, columns), jnp.float32)],
    )(dz, x)
    return jnp.sum(found, axis=0).reshape(k, q, p)


def parts_of(chunks: int, tiles_of: int, processors: int = 132) -> int:
    """In how many parts tokens are added up, so that every processor has work: at most 16."""
    most = min(16, chunks, max(1, 2 * processors // tiles_of))
    return max(n for n in range(1, most + 1) if chunks % n == 0)


def _gradient_kernel(dz_ref, x_ref, dw_ref, dw_s, *, config):
    columns = dw_s.shape[1]
    part, i, row, j = (jax.lax.axis_index(n) for n in ("part", "block", "rows", "columns"))
    rows = i * jax.lax.axis_size("rows") + row  # in blocks of dw
    steps = dz_ref.shape[0] // CHUNK // dw_ref.shape[0]
    keep = int(steps > 1)

    def add_up(acc):
        def step(_, dz_s, x_s):
            multiply(acc, dz_s, x_s, config, turn_a=True)
            plgpu.wgmma_wait(keep)

        first, across = part * steps, i * jax.lax.axis_size("columns") + j
        pipeline(
            step,
            steps,
            block((CHUNK, CHUNK), lambda c: (first + c, rows), keep=keep),
            block((CHUNK, columns), lambda c: (first + c, across), keep=keep),
            stages=config.stages,
        )(dz_ref, x_ref)
        return acc[...]

    dw_s[...] = pl.run_scoped(add_up, plgpu.ACC((CHUNK, columns), jnp.float32))
    plgpu.commit_smem()
    place = pl.ds(rows * CHUNK, CHUNK), pl.ds(j * columns, columns)
    plgpu.copy_smem_to_gmem(dw_s, dw_ref.at[(part, *place)])
    plgpu.wait_smem_to_gmem(0)
