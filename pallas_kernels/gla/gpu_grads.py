"""The last kernel of gla's backward pass: gradients of q, k and g, all chunks at once.

A block of threads has up to 128 columns of the keys, of a chunk of a head, and goes over the
values.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu
from pallas_kernels.core import gpu_chunks as parts
from pallas_kernels.core.gpu_chunks import BLOCK, CHUNK, How, Turned, bfloat16, down
from pallas_kernels.core.tpu_parts import Refs
from pallas_kernels.gla import gpu_parts as decays
from pallas_kernels.gla.gpu_parts import SEEN, SEES
from pallas_kernels.simple_gla import gpu_values
from pallas_kernels.simple_gla.gpu_values import Values


class Gradients(NamedTuple):
    """What the kernel gives, `[b t h k]`.

    Attributes:
        dq, dk: bfloat16.
        dg: float32.
    """

    dq: jax.Array
    dk: jax.Array
    dg: jax.Array


def gradients(q, k, decay: tuple, v, dy, starts, dends, through, marks, how: How) -> Gradients:
    """Gradients of q, k and g.

    Args:
        q, k: bfloat16 `[b t h k]`.
        decay: one or two parts of the log decays, bfloat16 `[b t h k]`.
        v, dy: bfloat16 `[b t h v]`.
        starts, dends: states before chunks, gradients of those after, bfloat16 `[b h n k v]`.
        through: decays all through chunks, float32 `[b h n k]`.
        marks: float32 `[b n 4 c]`.
        how: what is fixed.
    """
    (b, t, h, width), tokens = q.shape, [q, k, *decay]
    halves = gpu_values.halves_of(width)
    like = lambda dtype: jax.ShapeDtypeStruct(q.shape, dtype)
    found = gpu.kernel_call(
        functools.partial(_body, len(tokens), halves, how),
        name="gla_gradients",
        config=how.config,
        out_type=[like(jnp.bfloat16), like(jnp.bfloat16), like(jnp.float32)],
        grid=(b * h, t // CHUNK, width // (halves * BLOCK)),
        grid_names=("heads", "chunks", "columns"),
        num_threads=halves,
        thread_name="half",
        scratch_types=dict(
            **gpu_values.scratch(halves),
            tokens=parts.tile(halves, len(tokens), CHUNK, BLOCK),
            factors=parts.tile(halves, 2, CHUNK, CHUNK),
            marks=parts.numbers(rows=decays.MARKS),
            through=plgpu.SMEM((halves, BLOCK), jnp.float32),
            first=plgpu.Barrier(num_arrivals=1 + halves * (1 + len(tokens))),
        ),
    )(*tokens, dy, v, starts, dends, through, marks)
    return Gradients(*found)


def _body(count: int, halves: int, how: How, *given, **scratch):
    """Each half has 64 columns of the keys."""
    refs = Refs(given)
    arrays, of_values = refs.several(count), tuple(refs.several(4))
    through, marks, dq, dk, dg = refs.several(5)
    h, half = arrays[0].shape[2], lax.axis_index("half")
    index, chunk, place = (lax.axis_index(x) for x in ("heads", "chunks", "columns"))
    row, head = index // h, index % h
    at = (row, chunk, head, 1, halves * place)
    values = Values(how, of_values, scratch, at, half, halves)
    of_keys = lambda ref, n: parts.tokens_at(ref, row, chunk, head, values.columns(n), BLOCK)
    through_s, marks_s = scratch["through"], scratch["marks"]

    @pl.when(half == 0)
    def _():
        load = lambda source, to: plgpu.copy_gmem_to_smem(source, to, scratch["first"])
        values.begin()
        for n in range(halves):
            for i, ref in enumerate(arrays):
                load(of_keys(ref, n), scratch["tokens"].at[n, i])
            load(through.at[row, head, chunk, pl.ds(values.columns(n), BLOCK)], through_s.at[n])
        load(marks.at[row, chunk], marks_s)

    by_pairs, of_query, of_end, by_state = values.sums(0, lambda step: None)
    plgpu.barrier_wait(scratch["first"])
    zero = lambda: decays.zero_of(marks_s)
    own_s = lambda name: scratch[name].at[half]
    token = lambda i: own_s("tokens")[i].astype(jnp.float32)
    decay = lambda: [own_s("tokens").at[i] for i in range(2, count)]
    beside, end_s = (scratch["factors"].at[half, i] for i in range(2))
    # Both halves are done with values.
    all_s, level_s = (scratch["values"].at[i, half] for i in range(2))

    by_pairs = jnp.where(decays.one_document(marks_s), how.scale * by_pairs, 0.0)
    all_s[...] = bfloat16(by_pairs)
    own = down(jnp.sum(jnp.where(parts.iota(0) == parts.iota(1), by_pairs, 0.0), axis=1))
    through_s[half] = by_state * through_s[half]
    plgpu.commit_smem()
    from_start = jnp.exp(decays.summed(how, decays.upto(), decay()))
    dq_sum = how.scale * down(marks_s[SEES]) * from_start * of_query
    to_end = jnp.exp(decays.summed(how, decays.beyond(), decay()))
    dk_sum = down(marks_s[SEEN]) * to_end * of_end
    end_s[...] = bfloat16(token(1) * dk_sum)
    # What pairs give by their queries less what they give by their keys; sums from a token on.
    passed = token(0) * dq_sum
    dq_sum = dq_sum + own * token(1)
    # Between levels dk lies where states lay, with 16 bits: for the third sum registers do not do.
    meanwhile = [scratch["states"].at[i, 0, half] for i in range(2)]

    def put(dk_sum):
        for ref, part in zip(meanwhile, parts.split(dk_sum), strict=True):
            ref[...] = part

    def take():
        return sum(ref[...].astype(jnp.float32) for ref in meanwhile)

    put(dk_sum + own * token(0))

    def level(n, so_far):
        dq_sum, passed = so_far
        query = lambda: decays.second(n, zero())
        level_s[...] = jnp.where(decays.across(n, zero()), all_s[...], jnp.bfloat16(0))
        plgpu.commit_smem()
        # Rounded: half of the registers.
        faded = bfloat16(jnp.exp(decays.summed(how, decays.within(n, zero()), decay())))
        beside[...] = faded * jnp.where(query(), own_s("tokens")[0], own_s("tokens")[1])
        plgpu.commit_smem()

        def of_both(add):
            add(0, level_s, beside)
            add(0, Turned(level_s), beside)

        found = parts.accumulate(how, [(CHUNK, BLOCK)], of_both)[0]
        of_tokens = faded.astype(jnp.float32) * found
        dq_sum = dq_sum + jnp.where(query(), of_tokens, 0.0)
        put(take() + jnp.where(query(), 0.0, of_tokens))
        # By rounded factors on both sides, so that pairs on one side of a token cancel.
        by_pairs = found * beside[...].astype(jnp.float32)
        return dq_sum, passed + jnp.where(query(), by_pairs, -by_pairs)

    dq_sum, passed = lax.fori_loop(0, decays.LEVELS, level, (dq_sum, passed))
    beside[...], level_s[...] = parts.split(passed)
    plgpu.commit_smem()
    dg_sum = decays.summed(how, decays.upto(turned=True), [beside, level_s])
    dg_sum = dg_sum + decays.summed(how, decays.beyond(turned=True), [end_s])
    # Found anew: the first column, found before the loops, would be spilled.
    column = (halves * (place + zero()) + half) * BLOCK
    there = lambda ref: parts.tokens_at(ref, row, chunk, head, column, BLOCK)
    there(dg)[...] = dg_sum + parts.across(through_s[half])
    for x, x_s, ref in zip((dq_sum, take()), (beside, level_s), (dq, dk), strict=True):
        x_s[...] = bfloat16(x)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_s, there(ref))
    plgpu.wait_smem_to_gmem(0)
