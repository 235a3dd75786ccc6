"""The first kernel of gla: pairs of tokens of every chunk, and q and k with decays in them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu
from pallas_kernels.core import gpu_chunks as parts
from pallas_kernels.core.gpu_chunks import BLOCK, CHUNK, How, Turned, bfloat16, down
from pallas_kernels.gla import gpu_parts as decays
from pallas_kernels.gla.gpu_parts import SEEN, SEES


class Made(NamedTuple):
    """What the kernel gives, bfloat16.

    Attributes:
        pairs: A scaled, `[b h n c c]`.
        q: scaled, decayed from the chunk's start, 0 where the state before is not seen `[b t h k]`.
        k: decayed to the chunk's end, 0 where the state after does not see it `[b t h k]`.
    """

    pairs: Any
    q: Any
    k: Any


def make(q, k, decay: tuple, marks, how: How) -> Made:
    """Makes them for all chunks at once.

    Args:
        q, k: bfloat16 `[b t h k]`.
        decay: one or two parts of the log decays, bfloat16 `[b t h k]`.
        marks: float32 `[b n 4 c]`.
        how: what is fixed.
    """
    (b, t, h, width), tokens = q.shape, [q, k, *decay]
    blocks = width // BLOCK
    like = lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def body(*refs, tokens_s, marks_s, factor, out, loaded, told):
        arrays, (marks, pairs_out, *results) = refs[: len(tokens)], refs[len(tokens) :]
        row, head, chunk = (lax.axis_index(x) for x in ("rows", "heads", "chunks"))
        of = lambda ref, at: parts.tokens_at(ref, row, chunk, head, at * BLOCK, BLOCK)
        plgpu.copy_gmem_to_smem(marks.at[row, chunk], marks_s, told)
        for n in range(blocks):
            for i, ref in enumerate(arrays):
                plgpu.copy_gmem_to_smem(of(ref, n), tokens_s.at[n, i], loaded.at[n])
        plgpu.barrier_wait(told)

        def columns(at, so_far):
            pairs, own = so_far
            plgpu.barrier_wait(loaded.at[at])
            q_s, k_s, *decay_s = (tokens_s.at[at, i] for i in range(len(arrays)))
            zero = lambda: decays.zero_of(marks_s)
            token = lambda ref: ref[...].astype(jnp.float32)

            def level(n, pairs):
                faded = jnp.exp(decays.summed(how, decays.within(n, zero()), decay_s))
                query = decays.second(n, zero())
                factor[...] = bfloat16(faded * jnp.where(query, token(q_s), token(k_s)))
                plgpu.commit_smem()
                found = parts.product(how, factor, Turned(factor))
                return pairs + jnp.where(decays.across(n, zero()), found, 0.0)

            pairs = lax.fori_loop(0, decays.LEVELS, level, pairs)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last columns are out
            from_start = jnp.exp(decays.summed(how, decays.upto(), decay_s))
            out[0] = bfloat16(how.scale * down(marks_s[SEES]) * from_start * token(q_s))
            to_end = jnp.exp(decays.summed(how, decays.beyond(), decay_s))
            out[1] = bfloat16(down(marks_s[SEEN]) * to_end * token(k_s))
            plgpu.commit_smem()
            for i, ref in enumerate(results):
                plgpu.copy_smem_to_gmem(out.at[i], of(ref, at))
            return pairs, own + jnp.sum(token(q_s) * token(k_s), axis=1)

        pairs, own = lax.fori_loop(
            0, blocks, columns, (parts.nothing(how), jnp.sum(parts.nothing(how), axis=1))
        )
        pairs = jnp.where(parts.iota(0) == parts.iota(1), down(own), pairs)
        one = decays.one_document(marks_s)
        factor[...] = bfloat16(jnp.where(one, how.scale * pairs, 0.0))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(factor, pairs_out.at[row, head, chunk])
        plgpu.wait_smem_to_gmem(0)

    found = gpu.kernel_call(
        body,
        name="gla_pairs",
        config=how.config,
        out_type=[like((b, h, t // CHUNK, CHUNK, CHUNK)), like(q.shape), like(k.shape)],
        grid=(b, h, t // CHUNK),
        grid_names=("rows", "heads", "chunks"),
        scratch_types=dict(
            tokens_s=parts.tile(blocks, len(tokens), CHUNK, BLOCK),
            marks_s=parts.numbers(rows=decays.MARKS),
            factor=parts.tile(CHUNK, CHUNK),
            out=parts.tile(2, CHUNK, BLOCK),
            loaded=plgpu.Barrier(num_arrivals=len(tokens), num_barriers=blocks),
            told=plgpu.Barrier(),
        ),
    )(*tokens, marks)
    return Made(*found)
