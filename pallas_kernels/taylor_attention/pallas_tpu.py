"""taylor_attention as Mosaic TPU kernels: features and states stay on the chip.

Kept between forward and backward: q, k, v, y, 1 / (z + eps), and the state before each block of
(about 2,048) tokens. README.md has grid, blocks and bytes.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.core import dispatch, tpu
from pallas_kernels.core.segments import boundaries
from pallas_kernels.taylor_attention import xla
from pallas_kernels.taylor_attention.tpu_backward import backward
from pallas_kernels.taylor_attention.tpu_features import orders, rows_of
from pallas_kernels.taylor_attention.tpu_forward import How, forward, product_dtype, state_rows
from pallas_kernels.taylor_attention.tpu_places import pack

# Of the scoped limit: what blocks and scratch may take; the rest is the compiler's.
_SHARE = 0.6
_MOST = 0.8  # of the whole vector memory: what the limit is raised to
_ROWS = 16  # of a bfloat16 register


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTpuConfig(tpu.TpuConfig):
    """How the work is cut.

    Attributes:
        chunk: tokens whose pairs are formed; a multiple of 128 (any number when interpreted).
        block: tokens in the vector memory at a time, and between two saved states; a multiple of
            the chunk.
        heads: heads worked on side by side; a divisor of them all.
    """

    chunk: int = 128
    block: int = 128
    heads: int = 1

    def __post_init__(self):
        ragged = self.chunk % tpu.LANES and not self.interpret
        if min(self.chunk, self.heads) < 1 or ragged:
            raise ValueError(
                f"taylor_attention: chunk is {self.chunk} and heads {self.heads}; chunk must be a "
                "multiple of 128 and both at least 1"
            )
        if self.block < 1 or self.block % self.chunk:
            raise ValueError(
                f"taylor_attention: block is {self.block}; it must be a multiple of the chunk, "
                f"{self.chunk}"
            )

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasTpuConfig":
        """Blocks as long as the vector memory allows; of short sequences, several heads."""
        kind, itemsize = tpu.generation(device_kind), sizes.get("itemsize", 4)
        need = lambda block: _bytes(sizes["k"], sizes["v"], block, itemsize)
        lengths = [cls.chunk * 2**n for n in range(5)]
        room = _SHARE * kind.scoped_vmem
        fit = [n for n in lengths if need(n) <= room]
        longest = max(fit, default=cls.chunk)
        n_blocks = -(-sizes["t"] // longest)  # of one length, with the least padding
        block = tpu.round_up(-(-sizes["t"] // n_blocks), cls.chunk)
        most = min(longest // block, int(room / need(block)), 4)
        heads = [n for n in range(1, most + 1) if sizes["h"] % n == 0]
        return cls(
            block=block,
            heads=max(heads, default=1),
            vmem_limit_bytes=None if fit else int(need(block) / _SHARE),
            device_kind=device_kind,
        )


def _bytes(k: int, v: int, block: int, itemsize: int) -> int:
    """Of the vector memory that a head takes backward: arrays twice, scratch once, states."""
    k, v = tpu.round_up(k, _ROWS), tpu.round_up(v, _ROWS)
    rows = state_rows(v)
    arrays = 2 * ((4 * k + 4 * v) * itemsize + 4 * tpu.SUBLANES)
    scratch = 4 * (2 * k + v) + 2 * rows * itemsize
    states = 10 * 4 * tpu.round_up(rows_of(k), tpu.LANES) * tpu.round_up(rows, tpu.LANES)
    return block * (arrays + scratch) + states


def refuses(shapes, device_kind) -> str | None:
    """Refuses dtypes, and states that the vector memory does not hold."""
    q, k, v, *_ = shapes
    if reason := tpu.refuses_dtypes(shapes):
        return reason
    itemsize = jnp.dtype(product_dtype(q, k, v)).itemsize
    need = _bytes(q.shape[3], v.shape[3], PallasTpuConfig.chunk, itemsize)
    if need > _SHARE * _MOST * tpu.generation(device_kind).vmem:
        return f"a head's states and tokens take {need / tpu.MIB:.0f} MiB of vector memory"
    return None


def run(q, k, v, kv, z, last_id, segment_ids, *, scale, normalize, eps, config):
    """See `taylor_attention`; kv `[b h f v]` and z `[b h f]` or None. Returns y, kv, z, last_id.

    A single token goes to xla's step: it is one pass over the state, and a kernel has no other.
    """
    if q.shape[1] == 1:
        step, options = xla.XlaConfig(form="step"), dict(scale=scale, normalize=normalize, eps=eps)
        return xla.run(q, k, v, kv, z, last_id, segment_ids, config=step, **options)
    (b, t, h, width), v_width = q.shape, v.shape[-1]
    itemsize = jnp.dtype(product_dtype(q, k, v)).itemsize
    sizes = dict(b=b, t=t, h=h, k=width, v=v_width, itemsize=itemsize)
    config = PallasTpuConfig.of(config, sizes, dispatch.device_kind(config))
    if h % config.heads:
        raise ValueError(
            f"taylor_attention: config.heads is {config.heads}, no divisor of {h} heads"
        )
    places, padded = None, tpu.round_up(t, config.block)
    if segment_ids is not None:
        reset, valid, last_id = boundaries(segment_ids, last_id)
        document = jnp.cumsum(reset, axis=1, dtype=jnp.int32)  # 0 = the one of the state
        places = pack(document, valid, config.chunk, padded)
    elif padded > t:
        document = jnp.zeros((b, t), jnp.int32)
        places = pack(document, jnp.ones((b, t), bool), config.chunk, padded)
    how = How(scale, normalize, eps, config)
    return *_attention(q, k, v, kv, z, places, how), last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, kv, z, places, how: How):
    """y `[b t h v]` and the state after, kv `[b h f v]` and z `[b h f]`."""
    widths = _Widths.of(q, v)
    arrays = [_tokens_last(x, how) for x in (q, k, v)]
    y, last, _, _ = forward(arrays, widths.to_rows(kv, z), places, how, save=False)
    return _tokens_first(y, v), *widths.from_rows(last)


def _attention_forward(q, k, v, kv, z, places, how: How):
    q, k, v, kv, z, places = jax.tree.map(lambda x: x.value, (q, k, v, kv, z, places))
    widths = _Widths.of(q, v)
    state = widths.to_rows(kv, z)
    arrays = [_tokens_last(x, how) for x in (q, k, v)]
    y, last, saved, inverse = forward(arrays, state, places, how, save=True)
    if saved is None and state is not None:
        saved = state[:, :, None]
    kept = (y, inverse) if how.normalize else (None, None)
    given = None if kv is None else ()
    return (_tokens_first(y, v), *widths.from_rows(last)), (q, k, v, saved, places, *kept, given)


def _attention_backward(how: How, residuals, cotangents):
    q, k, v, saved, places, y, inverse, given = residuals
    widths = _Widths.of(q, v)
    arrays = [_tokens_last(x, how) for x in (q, k, v)]
    dlast = None  # where nobody asked for the state, there is no gradient to make and read
    if not all(isinstance(x, SymbolicZero) for x in cotangents[1:]):
        dlast = widths.to_rows(*map(_array, cotangents[1:]))
    dy = _tokens_last(_array(cotangents[0]), how)
    dq, dk, dv, dinitial = backward(
        arrays, saved, places, y, inverse, dy, dlast, how, has_state=given is not None
    )
    dstate = (None, None) if given is None else widths.from_rows(dinitial)
    gradients = (_tokens_first(*pair) for pair in ((dq, q), (dk, k), (dv, v)))
    return *gradients, *dstate, None


_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)


def _array(x):
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x


def _tokens_last(x, how: How):
    """`[b h k t]` from `[b t h k]`: k up to a multiple of 16, t to one of the block."""
    x = jnp.moveaxis(x, 1, -1)
    x = tpu.pad_to(x, 3, tpu.round_up(x.shape[3], how.config.block))
    return tpu.pad_to(x, 2, tpu.round_up(x.shape[2], _ROWS))


def _tokens_first(x, like):
    """`[b t h k]` in the shape of another one, from `[b h k t]`."""
    return jnp.moveaxis(x[:, :, : like.shape[3], : like.shape[1]], -1, 1)


class _Widths(NamedTuple):
    """Of keys and values, and as they are padded; and what a state of the kernels looks like."""

    k: int
    v: int
    padded_k: int
    padded_v: int
    rows: int

    @classmethod
    def of(cls, q, v):
        k, width = q.shape[3], v.shape[3]
        padded = tpu.round_up(width, _ROWS)
        return cls(k, width, tpu.round_up(k, _ROWS), padded, state_rows(padded))

    def to_rows(self, kv, z):
        """The kernels' state `[b h v1 f]` from kv `[b h f v]` and z `[b h f]`; None for None."""
        if kv is None:
            return None
        places, _ = orders(self.k, self.padded_k)
        columns = jnp.concatenate([tpu.pad_to(kv, 3, self.padded_v), z[..., None]], axis=3)
        columns = tpu.pad_to(columns, 3, self.rows)
        columns = tpu.pad_to(columns, 2, columns.shape[2] + 1)  # zeros for rows without a feature
        return jnp.swapaxes(columns[:, :, places], 2, 3)

    def from_rows(self, state):
        """kv and z from the kernels' state."""
        _, back = orders(self.k, self.padded_k)
        columns = jnp.swapaxes(state, 2, 3)[:, :, back]
        return columns[..., : self.v], columns[..., self.padded_v]
