"""taylor_attention as Mosaic TPU kernels: features and states stay on the chip.

Kept between forward and backward: q, k, v, y, 1 / (z + eps), and the state before each block of
(about 2,048) tokens. README.md has grid, blocks and bytes.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch, tpu
from pallas_kernels.core.segments import boundaries
from pallas_kernels.taylor_attention.tpu_backward import backward
from pallas_kernels.taylor_attention.tpu_features import orders, rows_of
from pallas_kernels.taylor_attention.tpu_forward import How, forward, product_dtype, state_rows
from pallas_kernels.taylor_attention.tpu_places import pack

# Of the scoped limit: what blocks and scratch may take; the rest is the compiler's.
_SHARE = 0.6


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
        room = _SHARE * tpu.generation(device_kind).scoped_vmem
        k, v = (tpu.round_up(sizes[x], 16) for x in "kv")
        fits = lambda n: _bytes(k, v, n, sizes.get("itemsize", 4)) <= room
        lengths = [cls.chunk * 2**n for n in range(5)]
        longest = max((n for n in lengths if fits(n)), default=cls.chunk)
        n_blocks = -(-sizes["t"] // longest)  # of one length, with the least padding
        block = tpu.round_up(-(-sizes["t"] // n_blocks), cls.chunk)
        heads = [n for n in range(1, 5) if sizes["h"] % n == 0 and n * block <= longest]
        return cls(block=block, heads=max(heads), device_kind=device_kind)


def _bytes(k: int, v: int, block: int, itemsize: int) -> int:
    """Of the vector memory that a head takes backward: arrays twice, scratch once, states."""
    arrays = 2 * ((4 * k + 4 * v) * itemsize + 4 * tpu.SUBLANES) + 4 * (k + v + tpu.SUBLANES)
    states = 10 * 4 * tpu.round_up(rows_of(k), tpu.LANES) * tpu.round_up(v + 16, tpu.LANES)
    return block * arrays + states


def refuses(shapes, device_kind) -> str | None:
    """The reason against a call; see `taylor_attention`."""
    del device_kind
    return tpu.refuses_dtypes(shapes)


def run(q, k, v, kv, z, last_id, segment_ids, *, scale, normalize, eps, config):
    """See `taylor_attention`; kv `[b h f v]` and z `[b h f]` or None. Returns y, kv, z, last_id."""
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
    y, kv, z = _attention(
        _tokens_last(q, 16, padded),
        _tokens_last(k, 16, padded),
        _tokens_last(v, 16, padded),
        kv,
        z,
        places,
        width,
        v_width,
        how,
    )
    return jnp.moveaxis(y[:, :, :v_width, :t], -1, 1), kv, z, last_id


def _tokens_last(x, multiple: int, t: int):
    """`[b h k t]` from `[b t h k]`, k and t padded."""
    x = tpu.pad_to(jnp.moveaxis(x, 1, -1), 3, t)
    return tpu.pad_to(x, 2, tpu.round_up(x.shape[2], multiple))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(q, k, v, kv, z, places, width: int, v_width: int, how: How):
    """y `[b h v t]` and the state after in the order of features.py, kv `[b h f v]`, z `[b h f]`.

    width and v_width are those of keys and values before they were padded.
    """
    state = _to_rows(kv, z, width, q.shape[2], v.shape[2], product_dtype(q, k, v))
    y, last, _, _ = forward(q, k, v, state, places, how, save=False)
    return y, *_from_rows(last, width, v_width, q.shape[2], v.shape[2])


def _attention_forward(q, k, v, kv, z, places, width: int, v_width: int, how: How):
    state = _to_rows(kv, z, width, q.shape[2], v.shape[2], product_dtype(q, k, v))
    y, last, saved, inverse = forward(q, k, v, state, places, how, save=True)
    if saved is None and state is not None:
        saved = state[:, :, None]
    kept_y = y if how.normalize else None
    after = _from_rows(last, width, v_width, q.shape[2], v.shape[2])
    return (y, *after), (q, k, v, saved, places, kept_y, inverse, None if kv is None else ())


def _attention_backward(width: int, v_width: int, how: How, residuals, cotangents):
    q, k, v, saved, places, y, inverse, given = residuals
    dy, dkv, dz = cotangents
    dlast = _to_rows(dkv, dz, width, q.shape[2], v.shape[2], product_dtype(q, k, v))
    dq, dk, dv, dinitial = backward(q, k, v, saved, places, y, inverse, dy, dlast, how)
    dstate = (None, None)
    if given is not None:
        dstate = _from_rows(dinitial, width, v_width, q.shape[2], v.shape[2])
    return dq, dk, dv, *dstate, None


_attention.defvjp(_attention_forward, _attention_backward)


def _to_rows(kv, z, width: int, k: int, v: int, dtype):
    """The kernels' state `[b h v1 f]`, or None; k and v are the padded widths."""
    if kv is None:
        return None
    places, _ = orders(width, k)
    columns = jnp.concatenate([tpu.pad_to(kv, 3, v), z[..., None]], axis=3)
    columns = tpu.pad_to(columns, 3, state_rows(v, dtype))
    columns = tpu.pad_to(columns, 2, columns.shape[2] + 1)  # zeros for rows without a feature
    return jnp.swapaxes(columns[:, :, places], 2, 3)


def _from_rows(state, width: int, v_width: int, k: int, v: int):
    """kv `[b h f v]` and z `[b h f]` from the kernels' state."""
    _, back = orders(width, k)
    columns = jnp.swapaxes(state, 2, 3)[:, :, back]
    return columns[..., :v_width], columns[..., v]
