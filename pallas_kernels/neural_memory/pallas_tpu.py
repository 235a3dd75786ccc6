"""neural_memory as a Mosaic TPU kernel, for memories of one and two layers.

The grid is (row, a few heads, block of tokens); weights and momentum of those heads stay on chip
from block to block. README.md ("On a TPU") has what moves, what is kept and what is refused.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch, parts, tpu
from pallas_kernels.neural_memory import tpu_backward, tpu_forward, tpu_sizes
from pallas_kernels.neural_memory.memory import Weights
from pallas_kernels.neural_memory.tpu_blocks import Cuts, Layout


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
        """Sizes: those of `tpu_sizes.sizes_of`."""
        return cls(span=tpu_sizes.span_for(sizes, device_kind), device_kind=device_kind)


def refuses(shapes, device_kind) -> str | None:
    """Refuses memories of three layers and more, and what does not fit on the chip."""
    (q, _, v, *_), (opening, _), *_ = shapes
    if reason := tpu.refuses_dtypes(shapes):
        return reason
    if opening.w_hidden is not None:
        layers = 2 + opening.w_hidden.shape[1]
        return f"the memory has {layers} layers (w_hidden); the kernel serves one and two"
    sizes = _sizes(q, v, opening, tpu_sizes.ROWS, aligned=False)
    need = max(tpu_sizes.need_forward(sizes), tpu_sizes.need_backward(sizes, 1))
    room = tpu_sizes.most_room(device_kind)
    if need > room:
        return (
            f"weights, momenta and gradients of {sizes['heads']} heads take {need >> 20} MiB of "
            f"vector memory, and {room >> 20} MiB are to be had"
        )
    return None


def run(tokens, opening, state, segment_ids, *, how, fresh, still, config):
    """See `neural_memory`; the state in float32. Returns y and the state's fields.

    Args:
        tokens: q, k, v, alpha, eta, theta.
        opening: weights and momentum `[h ...]` that documents begin with.
        state: weights at the chunk's start, now, and the momentum, `[b h ...]`; count, last_id.
        segment_ids: int32 `[b t]` or None.
        how: static settings.
        fresh: whether the state is an opening one, nothing read.
        still: whether its momentum is 0 besides.
        config: PallasTpuConfig or None.
    """
    *carry, count, last_id = state
    q, _, v, *_ = tokens
    b, t, h, _ = v.shape
    block = tpu.round_up(how.chunk, tpu_sizes.ROWS)
    aligned = fresh and segment_ids is None and block == how.chunk
    sizes = _sizes(q, v, opening[0], how.chunk, aligned=aligned)
    kind = dispatch.device_kind(config)
    config = PallasTpuConfig.of(config, sizes, kind)
    blocks = -(-t // block)
    span = -(-blocks // -(-blocks // config.span))
    needs = tpu_sizes.need_forward(sizes), tpu_sizes.need_backward(sizes, span)
    limits = [config.vmem_limit_bytes or tpu_sizes.limit_for(need, kind) for need in needs]
    heads, in_all = tpu_sizes.heads_per_step(h, q.shape[3], v.shape[3])
    form = Layout(
        how=how,
        configs=tuple(dataclasses.replace(config, vmem_limit_bytes=x) for x in limits),
        narrow=all(x.dtype == jnp.bfloat16 for x in tokens[:3]),
        aligned=aligned,
        b=b,
        t=t,
        h=in_all,
        block=block,
        blocks=tpu.round_up(blocks, span),
        span=span,
        heads=heads,
    )
    cuts = None
    if aligned:
        _, now, momentum = carry
        carry, opening, count = (now, None if still else momentum), None, count + t
    else:
        place, valid, count, last_id = parts.places(segment_ids, count, last_id, t)
        cuts = _cuts(form, place, valid)
        opening = tuple(_laid_out(x, in_all) for x in opening)
    carry = tuple(x and _laid_out(x, in_all) for x in carry)
    y, last = _memory(form, opening, carry, tokens, cuts)
    return y, (*(_given_back(x, h) for x in last), count, last_id)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _memory(form: Layout, opening, carry, tokens, cuts):
    """y `[b t h v]` and the last (start, now, momentum)."""
    q, k, v, gates = _operands(form, tokens)
    y, last, _ = tpu_forward.forward(form, opening, carry, q, k, v, gates, cuts, keep=False)
    return _split(form, y, tokens[2]), last


def _forward(form, *given):
    opening, carry, tokens, cuts = jax.tree.map(lambda x: x.value, given)
    q, k, v, gates = _operands(form, tokens)
    y, last, kept = tpu_forward.forward(form, opening, carry, q, k, v, gates, cuts, keep=True)
    return (_split(form, y, tokens[2]), last), (opening, carry, kept, tokens, cuts)


def _backward(form, residuals, cotangents):
    opening, carry, kept, tokens, cuts = residuals
    dy, dlast = cotangents
    nothing = lambda x: isinstance(x, jax.custom_derivatives.SymbolicZero)
    # Whoever uses the state alone, or not at all, hands zeros that need not be read.
    dy = jnp.zeros(dy.shape, dy.dtype) if nothing(dy) else dy
    if all(map(nothing, jax.tree.leaves(dlast, is_leaf=nothing))):
        dlast = None
    else:
        dlast = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype) if nothing(x) else x, dlast, is_leaf=nothing
        )
    q, k, v, gates = _operands(form, tokens)
    dopening, dcarry, dtokens, dgates = tpu_backward.backward(
        form, opening, carry, kept, q, k, v, gates, cuts, _merged(form, dy), dlast
    )
    dopening = jax.tree.map(lambda x: jnp.sum(x, axis=0), dopening)
    dcarry = tuple(d if x else None for d, x in zip(dcarry, carry, strict=True))
    dtokens = [_split(form, dx, x) for dx, x in zip(dtokens, tokens[:3], strict=True)]
    return dopening, dcarry, (*dtokens, *_shares(dgates, tokens[3:])), None


_memory.defvjp(_forward, _backward, symbolic_zeros=True)


# --- Layouts ------------------------------------------------------------------------------------


def _sizes(q, v, weights: Weights, chunk: int, *, aligned: bool) -> dict[str, int]:
    return tpu_sizes.sizes_of(
        h=v.shape[2],
        k=q.shape[3],
        v=v.shape[3],
        n=weights.w_out.shape[-1],
        chunk=chunk,
        itemsize=v.dtype.itemsize,
        layers=1 if weights.w_in is None else 2,
        aligned=aligned,
    )


def _laid_out(weights: Weights, h: int) -> Weights:
    """Weights `[... h x y]` as the kernels take them: w_in turned, gamma as a row."""
    w_in = None if weights.w_in is None else jnp.swapaxes(weights.w_in, -1, -2)
    gamma = None if weights.gamma is None else weights.gamma[..., None, :]
    found = Weights(weights.w_out, w_in, None, gamma)
    return jax.tree.map(lambda x: tpu.pad_to(x, x.ndim - 3, h), found)


def _given_back(weights: Weights, h: int) -> Weights:
    weights = jax.tree.map(lambda x: x[:, :h], weights)
    w_in = None if weights.w_in is None else jnp.swapaxes(weights.w_in, -1, -2)
    gamma = None if weights.gamma is None else weights.gamma[..., 0, :]
    return Weights(weights.w_out, w_in, None, gamma)


def _operands(form: Layout, tokens) -> tuple[jax.Array, ...]:
    """q, k, v `[b t h*x]` and alpha, eta, theta as `[b h n 3 c]`."""
    gates = jnp.stack(tokens[3:], axis=1)  # as they are: XLA turns them, the kernel widens them
    gates = tpu.pad_to(tpu.pad_to(gates, 3, form.h), 2, form.blocks * form.block)
    gates = gates.reshape(form.b, 3, form.blocks, form.block, form.h)
    return *(_merged(form, x) for x in tokens[:3]), jnp.transpose(gates, (0, 4, 2, 1, 3))


def _shares(gates: jax.Array, like) -> list[jax.Array]:
    """The gradients by alpha, eta and theta, as these are."""
    _, t, h = like[0].shape
    b, _, n, _, c = gates.shape
    rows = jnp.transpose(gates, (0, 3, 2, 4, 1)).reshape(b, 3, n * c, -1)[:, :, :t, :h]
    return [rows[:, i].astype(x.dtype) for i, x in enumerate(like)]


def _merged(form: Layout, x: jax.Array) -> jax.Array:
    """`[b t h x]` as `[b t h*x]`."""
    x = tpu.pad_to(x, 2, form.h)
    return x.reshape(*x.shape[:2], -1)


def _split(form: Layout, x: jax.Array, like: jax.Array) -> jax.Array:
    """`[b t h*x]` as `like`, `[b t h x]`."""
    b, t, h, width = like.shape
    return x.reshape(b, t, form.h, width)[:, :, :h]


def _cuts(form: Layout, place: jax.Array, valid: jax.Array | None) -> Cuts:
    part = parts.cut(place, valid, form.block, form.how.chunk).part
    assert part is not None
    marks = ((part, -1), (place == 0, 0), (place % form.how.chunk == 0, 0))
    whole = form.blocks * form.block
    rows = [tpu.pad_to(x.astype(jnp.float32), 1, whole, value) for x, value in marks]
    tokens = jnp.stack(rows, axis=1).reshape(form.b, 3, form.blocks, form.block)
    tokens = jnp.swapaxes(tokens, 1, 2)
    return Cuts(tokens, jnp.max(tokens[:, None, :, 0], axis=-1).astype(jnp.int32) + 1)
