"""The kernels of two factors: what stands between them stays in shared memory, forward.

Z turned round is an order of the first factor's outputs: rows of w1 are permuted before the call
(`permuted`), so that block i gives for each l a piece of q / l neighbours in Z'. To take l's
columns out of dy, or to put Y's in their order, is a product with a permutation matrix, which the
matrix unit does exactly: groups of 64 columns hold n = 64 / l of each l.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu
from pallas_kernels.core.gpu_parts import multiply, tiles
from pallas_kernels.monarch_matmul.gpu_blocks import CHUNK, block, parts_of, pipeline

_TOKENS = 64
_GROUP = 64  # columns of y that are turned at once
_OUT = 32  # outputs of each block of w2 that are worked on at once
_STAGES = 3  # chunks of x and w1 that are fetched or worked on at the same time
_NARROW = 32  # bytes of a swizzle: pieces are multiples of 16 numbers
_GRADIENTS = 64  # of w2: rows and columns of a tile


def permuted(w1, n_blocks: int):
    """Outputs of each block in the order of Z': `[k q p]` with q as (l, q/l)."""
    k, q, p = w1.shape
    return jnp.swapaxes(w1.reshape(k, q // n_blocks, n_blocks, p), 1, 2).reshape(k, q, p)


def back_permuted(w1, n_blocks: int):
    """`permuted` undone."""
    k, q, p = w1.shape
    return jnp.swapaxes(w1.reshape(k, n_blocks, q // n_blocks, p), 1, 2).reshape(k, q, p)


def shared(k: int, q: int, p: int) -> int:
    """Bytes of shared memory that the forward kernel takes; the others take less.

    Beside Z', y and the permutation, the operands of the first factor or those of the second: they
    lie there one after the other.
    """
    first = 2 * min(_STAGES, p // CHUNK) * CHUNK * (_TOKENS + q)
    second = 2 * 2 * _OUT * k * q
    kept = 2 * _TOKENS * k * q + 2 * _TOKENS * 4 * _OUT + 2 * _GROUP**2
    return kept + max(first, second) + 1024


def _turn(n_blocks: int, dtype):
    """`[64 64]`: row (l, n) has a one in column n * n_blocks + l."""
    n = _GROUP // n_blocks
    rows = np.arange(_GROUP)
    columns = rows % n * n_blocks + rows // n
    return jnp.asarray(np.arange(_GROUP) == columns[:, None], dtype)


# --- Forward ------------------------------------------------------------------------------------


def forward(x, w1, w2, config, *, save: bool = False):
    """y `[rows l*s]`, and Z' `[rows l*r]` if it is to be kept.

    Args:
        x: `[rows k*p]`.
        w1: `[k q p]`, permuted.
        w2: `[l s r]`, both in the dtype of x.
        config: of the form.
        save: whether there is a backward pass.
    """
    rows, (k, q, p), (l, s, r) = x.shape[0], w1.shape, w2.shape
    n, narrow = _GROUP // l, tiles(_NARROW)
    out = [jax.ShapeDtypeStruct((rows, l * s), x.dtype)]
    if save:
        out.append(jax.ShapeDtypeStruct((rows, l * r), x.dtype))
    back = jnp.swapaxes(_turn(l, x.dtype).reshape(l, n, _GROUP), 1, 2)  # [l 64 n]
    found = gpu.kernel_call(
        functools.partial(_forward_kernel, w1=w1.shape, w2=w2.shape, save=save, config=config),
        name="monarch_matmul_forward",
        config=config,
        out_type=out,
        grid=(rows // _TOKENS,),
        grid_names=("tokens",),
        scratch_types=[
            plgpu.SMEM((_TOKENS, l * r), x.dtype, transforms=narrow),
            plgpu.SMEM((_TOKENS, l * _OUT), x.dtype, transforms=tiles()),
            plgpu.SMEM((l, _GROUP, n), x.dtype, transforms=narrow),
            plgpu.Barrier(),
        ],
    )(x, w1.reshape(k * q, p), w2.reshape(l * s, r), back)
    return found if save else (found[0], None)


def _forward_kernel(x_ref, w1_ref, w2_ref, back_ref, y_ref, *refs, w1, w2, save: bool, config):
    z_ref = refs[0] if save else None
    z_s, y_s, back_s, barrier = refs[int(save) :]
    (k, q, p), (n_blocks, s, r), dtype = w1, w2, x_ref.dtype
    t = jax.lax.axis_index("tokens")
    rows, piece, n = pl.ds(t * _TOKENS, _TOKENS), q // n_blocks, _GROUP // n_blocks
    product = functools.partial(multiply, config=config)
    plgpu.copy_gmem_to_smem(back_ref, back_s, barrier)

    steps = p // CHUNK
    keep = int(steps > 1)

    def first(i, acc):
        def step(_, x_s, w_s):
            product(acc, x_s, w_s, turn_b=True)
            plgpu.wgmma_wait(keep)

        pipeline(
            step,
            steps,
            block((_TOKENS, CHUNK), lambda c: (t, i * steps + c), keep=keep),
            block((q, CHUNK), lambda c: (i, c), keep=keep),
            stages=_STAGES,
        )(x_ref, w1_ref)
        return acc[...]

    for i in range(k):
        z = pl.run_scoped(functools.partial(first, i), plgpu.ACC((_TOKENS, q), jnp.float32))
        z = z.astype(dtype)
        for l in range(n_blocks):
            z_s[:, l * r + i * piece : l * r + (i + 1) * piece] = z[:, l * piece : (l + 1) * piece]
    plgpu.commit_smem()
    if z_ref is not None:
        plgpu.copy_smem_to_gmem(z_s, z_ref.at[rows])
    plgpu.barrier_wait(barrier)

    def second(c, *w_s):
        def outputs(*accs):
            for l, acc in enumerate(accs):
                product(acc, z_s.at[:, pl.ds(l * r, r)], w_s[l], turn_b=True)
            return [acc[...].astype(dtype) for acc in accs]

        accs = [plgpu.ACC((_TOKENS, _OUT), jnp.float32)] * n_blocks
        y = pl.run_scoped(outputs, *accs)

        def in_order(*accs):
            for g, acc in enumerate(accs):
                for l in range(n_blocks):
                    product(acc, y[l][:, g * n : (g + 1) * n], back_s.at[l], turn_b=True)
            return [acc[...].astype(dtype) for acc in accs]

        accs = [plgpu.ACC((_TOKENS, _GROUP), jnp.float32)] * (_OUT // n)
        y = pl.run_scoped(in_order, *accs)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for g, columns in enumerate(y):
            y_s[:, g * _GROUP : (g + 1) * _GROUP] = columns
        plgpu.commit_smem()
        wide = n_blocks * _OUT
        plgpu.copy_smem_to_gmem(y_s, y_ref.at[rows, pl.ds(c * wide, wide)])

    each = s // _OUT
    of_l = lambda l: block((_OUT, r), lambda c: (l * each + c, 0), swizzle=_NARROW)
    specs = [of_l(l) for l in range(n_blocks)]
    pipeline(second, each, *specs, stages=2)(*[w2_ref] * n_blocks)
    plgpu.wait_smem_to_gmem(0)


# --- Backward -----------------------------------------------------------------------------------


def backward(dy, w1, w2, config):
    """dx `[rows k*p]`, and dz `[rows k*q]` in the order of permuted w1.

    Args:
        dy: `[rows l*s]`.
        w1: `[k q p]`, permuted.
        w2: `[l s r]`, both in the dtype of dy.
        config: of the form.
    """
    rows, (k, q, p), (l, s, r) = dy.shape[0], w1.shape, w2.shape
    narrow = tiles(_NARROW)
    return gpu.kernel_call(
        functools.partial(_backward_kernel, w1=w1.shape, w2=w2.shape, config=config),
        name="monarch_matmul_backward",
        config=config,
        out_type=[
            jax.ShapeDtypeStruct((rows, k * p), dy.dtype),
            jax.ShapeDtypeStruct((rows, k * q), dy.dtype),
        ],
        grid=(rows // _TOKENS, k),
        grid_names=("tokens", "block"),
        scratch_types=[
            plgpu.SMEM((_TOKENS, q), dy.dtype, transforms=narrow),
            plgpu.SMEM((_TOKENS, _GROUP), dy.dtype, transforms=tiles()),
            plgpu.SMEM((_GROUP, _GROUP), dy.dtype, transforms=narrow),
            plgpu.Barrier(),
        ],
    )(dy, w1.reshape(k * q, p), w2.reshape(l * s, r), _turn(l, dy.dtype))


def _of_each(group, turn_s, dtype, config):
    """64 columns of dy `[64 64]` as (l, n): those of each l together."""

    def turned(acc):
        multiply(acc, group, turn_s, config, turn_b=True)
        return acc[...].astype(dtype)

    return pl.run_scoped(turned, plgpu.ACC((_TOKENS, _GROUP), jnp.float32))


def _backward_kernel(
    dy_ref, w1_ref, w2_ref, turn_ref, dx_ref, dz_ref, dz_s, dx_s, turn_s, barrier,
    *, w1, w2, config,
):  # fmt: skip
    (_, q, p), (n_blocks, s, _), dtype = w1, w2, dy_ref.dtype
    t, i = jax.lax.axis_index("tokens"), jax.lax.axis_index("block")
    rows, piece, n = pl.ds(t * _TOKENS, _TOKENS), q // n_blocks, _GROUP // n_blocks
    product = functools.partial(multiply, config=config)
    plgpu.copy_gmem_to_smem(turn_ref, turn_s, barrier)
    plgpu.barrier_wait(barrier)

    def second(*accs):
        def step(_, dy_s, *w_s):
            for g in range(n_blocks):
                columns = dy_s.at[:, pl.ds(g * _GROUP, _GROUP)]
                dy = _of_each(columns, turn_s, dtype, config)
                for l, acc in enumerate(accs):
                    of_l = dy[:, l * n : (l + 1) * n]
                    product(acc, of_l, w_s[l].at[pl.ds(g * n, n)])
            plgpu.wgmma_wait(0)

        each = s // CHUNK
        of_l = lambda l: block((CHUNK, piece), lambda c: (l * each + c, i), swizzle=_NARROW)
        whole = block((_TOKENS, n_blocks * _GROUP), lambda c: (t, c), swizzle=_NARROW)
        specs = [of_l(l) for l in range(n_blocks)]
        pipeline(step, each, whole, *specs, stages=2)(dy_ref, *[w2_ref] * n_blocks)
        return [acc[...].astype(dtype) for acc in accs]

    accs = [plgpu.ACC((_TOKENS, piece), jnp.float32)] * n_blocks
    for l, dz in enumerate(pl.run_scoped(second, *accs)):
        dz_s[:, l * piece : (l + 1) * piece] = dz
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(dz_s, dz_ref.at[rows, pl.ds(i * q, q)])

    steps = p // CHUNK

    def first(c, w_s):
        def columns(acc):
            product(acc, dz_s, w_s)
            return acc[...].astype(dtype)

        dx = pl.run_scoped(columns, plgpu.ACC((_TOKENS, CHUNK), jnp.float32))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        dx_s[...] = dx
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dx_s, dx_ref.at[rows, pl.ds(i * p + c * CHUNK, CHUNK)])

    pipeline(first, steps, block((q, CHUNK), lambda c: (i, c), swizzle=_NARROW), stages=2)(w1_ref)
    plgpu.wait_smem_to_gmem(0)


def gradient(dy, z, n_blocks: int, config):
    """dw2 `[l s r]` float32.

    Args:
        dy: `[rows l*s]`.
        z: Z' `[rows l*r]`.
        n_blocks: l.
        config: of the form.
    """
    rows, s, r = dy.shape[0], dy.shape[1] // n_blocks, z.shape[1] // n_blocks
    side = _GRADIENTS
    parts = parts_of(rows // CHUNK, (s // side) * (r // side))
    found = gpu.kernel_call(
        functools.partial(_gradient_kernel, n_blocks=n_blocks, config=config),
        name="monarch_matmul_second_gradient",
        config=config,
        out_type=jax.ShapeDtypeStruct((parts, n_blocks * s, r), jnp.float32),
        grid=(parts, s // side, r // side),
        grid_names=("part", "rows", "columns"),
        scratch_types=[
            plgpu.SMEM((n_blocks, CHUNK, side), dy.dtype, transforms=tiles(_NARROW)),
            plgpu.SMEM((side, side), jnp.float32),
            plgpu.SMEM((_GROUP, _GROUP), dy.dtype, transforms=tiles(_NARROW)),
            plgpu.Barrier(),
        ],
    )(dy, z, _turn(n_blocks, dy.dtype))
    return jnp.sum(found, axis=0).reshape(n_blocks, s, r)


def _gradient_kernel(
    dy_ref, z_ref, turn_ref, dw_ref, dy_l, dw_s, turn_s, barrier, *, n_blocks: int, config
):
    part, row, column = (jax.lax.axis_index(name) for name in ("part", "rows", "columns"))
    side, dtype, n = _GRADIENTS, dy_ref.dtype, _GROUP // n_blocks
    steps = dy_ref.shape[0] // CHUNK // dw_ref.shape[0]
    columns, down = z_ref.shape[1] // n_blocks // side, dw_ref.shape[1] // n_blocks // side
    plgpu.copy_gmem_to_smem(turn_ref, turn_s, barrier)
    plgpu.barrier_wait(barrier)

    def add_up(*accs):
        def step(_, dy_s, *z_s):
            for g in range(n_blocks):
                group = dy_s.at[:, pl.ds(g * _GROUP, _GROUP)]
                dy = _of_each(group, turn_s, dtype, config)
                for l in range(n_blocks):
                    dy_l[l, :, g * n : (g + 1) * n] = dy[:, l * n : (l + 1) * n]
            plgpu.commit_smem()
            for l, acc in enumerate(accs):
                multiply(acc, dy_l.at[l], z_s[l], config, turn_a=True)
            plgpu.wgmma_wait(0)

        at = part * steps
        of_l = lambda l: block(
            (CHUNK, side), lambda c: (at + c, l * columns + column), swizzle=_NARROW
        )
        whole = block((CHUNK, n_blocks * _GROUP), lambda c: (at + c, row), swizzle=_NARROW)
        specs = [of_l(l) for l in range(n_blocks)]
        pipeline(step, steps, whole, *specs, stages=2)(dy_ref, *[z_ref] * n_blocks)
        return [acc[...] for acc in accs]

    accs = [plgpu.ACC((side, side), jnp.float32)] * n_blocks
    for l, dw in enumerate(pl.run_scoped(add_up, *accs)):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        dw_s[...] = dw
        plgpu.commit_smem()
        place = pl.ds((l * down + row) * side, side), pl.ds(column * side, side)
        plgpu.copy_smem_to_gmem(dw_s, dw_ref.at[(part, *place)])
    plgpu.wait_smem_to_gmem(0)
