"""neural_memory as a Mosaic TPU kernel, for memories of one and two layers.

The grid is (row, a few heads, block of tokens); the weights and the momentum of those heads stay on
chip from block to block. README.md has what moves and what is kept.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.core import dispatch, parts, tpu
from pallas_kernels.neural_memory import tpu_backward, tpu_forward
from pallas_kernels.neural_memory.memory import Weights
from pallas_kernels.neural_memory.tpu_blocks import Cuts, Layout

_ROWS = 16  # of a bfloat16 register: blocks are multiples
_LEAST_CHUNK = 8
_MOST_HEADS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTpuConfig(tpu.TpuConfig):
    """How the work is cut.

    Attributes:
        span: blocks (of a chunk each) per state that is kept for the backward pass, which holds
            what each of them begins with on chip.
    """

    span: int = 8

    def __post_init__(self):
        if self.span < 1:
            raise ValueError(f"span is {self.span}; it must be at least 1")

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasTpuConfig":
        """As many blocks as fit, 16 at most."""
        return cls(span=max(1, 8), device_kind=device_kind)


def refuses(shapes, device_kind) -> str | None:
    """Memories of three layers and more, short chunks, and what does not fit on the chip."""
    tokens, (opening, _), *_ = shapes
    if opening.w_hidden is not None:
        return (
            f"w_hidden is given: the kernel serves memories of one and two layers, and this has "
            f"{2 + opening.w_hidden.shape[1]}"
        )
    reason = tpu.refuses_dtypes(shapes)
    if reason:
        return reason
    return None


def run(tokens, opening, state, segment_ids, *, how, fresh, config):
    """See `neural_memory`; the state in float32. Returns y and the state's fields.

    Args:
        tokens: q, k, v, alpha, eta, theta.
        opening: weights and momentum `[h ...]` that documents begin with.
        state: weights at the chunk's start, now, and the momentum, `[b h ...]`; count, last_id.
        segment_ids: int32 `[b t]` or None.
        how: static settings.
        fresh: whether the state is an opening one, nothing read.
        config: PallasTpuConfig or None.
    """
    *carry, count, last_id = state
    q, k, v, *shares = tokens
    b, t, h, width = v.shape
    block = tpu.round_up(how.chunk, _ROWS)
    heads, all_heads = _heads(h, q.shape[3], width)
    aligned = fresh and segment_ids is None and block == how.chunk
    sizes = dict(
        b=b,
        t=t,
        h=heads,
        k=q.shape[3],
        v=width,
        n=opening[0].w_out.shape[-1],
        c=block,
        layers=1 + (opening[0].w_in is not None),
        aligned=aligned,
        itemsize=v.dtype.itemsize,
    )
    config = PallasTpuConfig.of(config, sizes, dispatch.device_kind(config))
    blocks = -(-t // block)
    span = -(-blocks // -(-blocks // config.span))
    form = Layout(
        how=how,
        config=config,
        narrow=v.dtype == jnp.bfloat16,
        aligned=aligned,
        b=b,
        t=t,
        h=all_heads,
        block=block,
        blocks=tpu.round_up(blocks, span),
        span=span,
        heads=heads,
    )
    cuts = None
    if aligned:
        carry = carry[1:]
        count = count + t
    else:
        place, valid, count, last_id = parts.places(segment_ids, count, last_id, t)
        cuts = _cuts(form, place, valid)
    pad_heads = lambda tree, axis: jax.tree.map(lambda x: tpu.pad_to(x, axis, all_heads), tree)
    carry = pad_heads(tuple(map(_laid_out, carry)), 1)
    opening = None if aligned else pad_heads(tuple(map(_laid_out, opening)), 0)
    q, k, v = (_merged(form, x) for x in (q, k, v))
    y, last = _memory(form, opening, carry, q, k, v, _gates(form, shares), cuts)
    y = y.reshape(b, -1, all_heads, width)[:, :t, :h]
    last = jax.tree.map(lambda x: x[:, :h], last)
    return y, (*map(_given_back, last), count, last_id)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _memory(form: Layout, opening, carry, q, k, v, gates, cuts):
    return _forward(form, opening, carry, q, k, v, gates, cuts)[0]


def _forward(form, opening, carry, q, k, v, gates, cuts):
    y, last, kept = tpu_forward.forward(form, opening, carry, q, k, v, gates, cuts, None)
    return (y, last), (opening, kept, q, k, v, gates, cuts)


def _backward(form, residuals, cotangents):
    dopening, dcarry, dtokens, dgates = tpu_backward.backward(form, *residuals, *cotangents, None)
    if dopening is not None:
        dopening = jax.tree.map(lambda x: jnp.sum(x, axis=0), dopening)
    return dopening, dcarry, *dtokens, dgates, None


_memory.defvjp(_forward, _backward)


# --- Layouts ------------------------------------------------------------------------------------


def _heads(h: int, k: int, v: int) -> tuple[int, int]:
    """Heads per step, so that their columns fill registers or are all there are; and heads in all,
    some of them empty where the first does not divide h."""
    heads = 1
    while (heads * k) % tpu.LANES or (heads * v) % tpu.LANES:
        heads *= 2
    return (h, h) if heads >= h else (heads, tpu.round_up(h, heads))


def _laid_out(weights: Weights) -> Weights:
    """Matrices as the kernels take them: w_in turned, gamma as a row."""
    w_in = None if weights.w_in is None else jnp.swapaxes(weights.w_in, -1, -2)
    gamma = None if weights.gamma is None else weights.gamma[..., None, :]
    return Weights(weights.w_out, w_in, None, gamma)


def _given_back(weights: Weights) -> Weights:
    w_in = None if weights.w_in is None else jnp.swapaxes(weights.w_in, -1, -2)
    gamma = None if weights.gamma is None else weights.gamma[..., 0, :]
    return Weights(weights.w_out, w_in, None, gamma)


def _merged(form: Layout, x: jax.Array) -> jax.Array:
    """`[b t h x]` as `[b t h*x]`, of whole spans and steps."""
    x = tpu.pad_to(tpu.pad_to(x, 2, form.h), 1, form.blocks * form.block)
    return x.reshape(*x.shape[:2], -1)


def _gates(form: Layout, shares) -> jax.Array:
    """alpha, eta, theta `[b t h]` as `[b h n 3 c]`."""
    x = jnp.stack([x.astype(jnp.float32) for x in shares], axis=1)
    x = tpu.pad_to(tpu.pad_to(x, 3, form.h), 2, form.blocks * form.block)
    x = x.reshape(form.b, 3, form.blocks, form.block, form.h)
    return jnp.transpose(x, (0, 4, 2, 1, 3))


def _cuts(form: Layout, place: jax.Array, valid: jax.Array | None) -> Cuts:
    part = parts.cut(place, valid, form.block, form.how.chunk).part
    begins = (place == 0, place % form.how.chunk == 0)
    begins = [tpu.pad_to(x.astype(jnp.float32), 1, part.shape[1]) for x in begins]
    tokens = jnp.stack([part.astype(jnp.float32), *begins], axis=1)
    tokens = jnp.stack(
        [
            tpu.pad_to(x, 1, form.blocks * form.block, value)
            for x, value in zip(jnp.unstack(tokens, axis=1), (-1, 0, 0), strict=True)
        ],
        axis=1,
    ).reshape(form.b, 3, form.blocks, form.block)
    tokens = jnp.swapaxes(tokens, 1, 2)
    count = jnp.max(tokens[:, :, 0], axis=-1).astype(jnp.int32) + 1
    return Cuts(tokens, count[:, None, :])
