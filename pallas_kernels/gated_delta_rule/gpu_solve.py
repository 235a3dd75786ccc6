"""The first kernel of the gated delta rule: T = (I + L)^-1 of every chunk, all chunks at once."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu
from pallas_kernels.core import gpu_chunks as parts
from pallas_kernels.core.gpu_chunks import CHUNK, How, Turned, down
from pallas_kernels.gated_delta_rule.gpu_parts import BETA, GATES


def solve(k: jax.Array, gates: jax.Array, how: How) -> jax.Array:
    """T of every chunk, bfloat16 `[b h n c c]`.

    Args:
        k: bfloat16 `[b t h k]`.
        gates: float32 `[b h n 6 c]`.
        how: what is fixed.
    """
    b, h, n = gates.shape[:3]

    def body(k, gates, solved, k_s, numbers, found, factor, barrier):
        row, head, chunk = (lax.axis_index(x) for x in ("rows", "heads", "chunks"))
        source = parts.tokens_at(k, row, chunk, head, 0, k.shape[-1])
        plgpu.copy_gmem_to_smem(source, k_s, barrier)
        plgpu.copy_gmem_to_smem(gates.at[row, head, chunk], numbers, barrier)
        plgpu.barrier_wait(barrier)
        alike = parts.product(how, k_s, Turned(k_s))
        lower = down(numbers[BETA]) * alike * parts.faded(numbers, strictly=True)
        found[0] = parts.bfloat16(inverse(how, lower, found, factor))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(found.at[0], solved.at[row, head, chunk])
        plgpu.wait_smem_to_gmem(0)

    return gpu.kernel_call(
        body,
        name="gated_delta_rule_solve",
        config=how.config,
        out_type=jax.ShapeDtypeStruct((b, h, n, CHUNK, CHUNK), jnp.bfloat16),
        grid=(b, h, n),
        grid_names=("rows", "heads", "chunks"),
        scratch_types=[
            parts.tile(CHUNK, k.shape[-1]),
            parts.numbers(rows=GATES),
            parts.tile(2, CHUNK, CHUNK),
            parts.tile(2, CHUNK, CHUNK),
            plgpu.Barrier(num_arrivals=2),
        ],
    )(k, gates)


def inverse(how: How, lower: jax.Array, found_s: Any, factor_s: Any) -> jax.Array:
    """(I + L)^-1 `[64 64]` in float32, L being strictly lower.

    Squares along the diagonal are merged, from size 1 up: below the first half of a square of twice
    the size stands -T_2 L_21 T_1. The product of powers (I - L)(I + L^2)... would be shorter, and
    wrong (core/triangular.py). Factors are two bfloat16 parts each: T is rounded to one at the end.

    Args:
        how: what is fixed.
        lower: L.
        found_s, factor_s: shared memory for two parts of factors, `[2 64 64]`.
    """
    i, j = parts.iota(0), parts.iota(1)
    between = lambda size: (i // (2 * size) == j // (2 * size)) & (i // size > j // size)
    found = jnp.where(i == j, 1.0, jnp.where(between(1), -lower, 0.0))
    size = 2
    while size < CHUNK:
        found_s[0], found_s[1] = parts.split(found)
        factor_s[0], factor_s[1] = parts.split(jnp.where(between(size), lower, 0.0))
        plgpu.commit_smem()
        corner = _product(how, found_s, factor_s)
        factor_s[0], factor_s[1] = parts.split(corner)
        plgpu.commit_smem()
        found = found - _product(how, factor_s, found_s)
        size *= 2
    return found


def _product(how: How, a: Any, b: Any) -> jax.Array:
    """Of factors of two parts, without the product of both second parts."""

    def body(add):
        for m, n in ((0, 1), (1, 0), (0, 0)):
            add(0, a.at[m], b.at[n])

    return parts.accumulate(how, [(CHUNK, CHUNK)], body)[0]
