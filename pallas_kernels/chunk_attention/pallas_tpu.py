"""chunk_attention's sliding window by JAX's splash attention, which skips blocks out of sight.

What is ours: documents and state become segment ids, the keys of the ring stand before those of the
call. Chunks fall to xla: they have a bias, or scores that are no softmax.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from pallas_kernels.chunk_attention.places import PADDING_KEY, after, in_order, places
from pallas_kernels.core import dispatch, tpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTpuConfig(tpu.TpuConfig):
    """How the work is cut; the limit on vector memory is splash attention's own.

    Attributes:
        block: queries, and keys, of a block; a multiple of 128.
    """

    block: int = tpu.LANES

    def __post_init__(self):
        if self.block < 1 or self.block % tpu.LANES:
            raise ValueError(
                f"chunk_attention: block is {self.block}; it must be a multiple of 128"
            )

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasTpuConfig":
        """Blocks as long as the window, so that two of keys are in sight, within 128 .. 512."""
        block = min(512, *(tpu.round_up(sizes[x], tpu.LANES) for x in ("window", "t")))
        return cls(block=block, device_kind=device_kind)


class How(NamedTuple):
    """What is static of a call.

    Attributes:
        window: keys that a query sees.
        ahead: keys that stand before the first query's own.
        config: see PallasTpuConfig.
    """

    window: int
    ahead: int
    config: PallasTpuConfig


def refuses(shapes, device_kind) -> str | None:
    """The reason against a call; see `chunk_attention`."""
    del device_kind
    return tpu.refuses_dtypes(shapes)


def refuses_options(shapes, device_kind, *, form) -> str | None:
    """The reason against these options."""
    del device_kind
    if form.chunk is not None:
        return "splash attention knows windows; chunks with bias and other scores are xla's"
    if form.slots == 1 or shapes[0].shape[1] == 1:
        return "one key per query is its value; one query meets the ring as it lies"
    return None


def run(q, k, v, bias, ring_k, ring_v, count, last_id, segment_ids, *, form, config):
    """See `chunk_attention`; the ring `[b g l k]`, `[b g l v]` in float32."""
    del bias
    b, t, h, _ = q.shape
    sizes = dict(b=b, t=t, h=h, window=form.slots)
    config = PallasTpuConfig.of(config, sizes, dispatch.device_kind(config))
    place = places(segment_ids, last_id, count, b, t)
    if place.valid is not None:  # a nan at padding times a weight of 0 would stay
        q, k, v = (jnp.where(place.valid[:, :, None, None], x, 0) for x in (q, k, v))
    keys, values, documents, ahead = k, v, None, 0
    if not form.fresh:
        ahead = form.slots - 1
        keys, documents = in_order(ring_k, k, count, place)
        values, _ = in_order(ring_v, v, count, place)
    elif place.valid is not None:
        documents = jnp.where(place.valid, place.queries, PADDING_KEY)
    how = How(form.slots, ahead, config)
    scaled = (q * form.scale).astype(q.dtype)
    ids = None if documents is None else (place.queries, documents)
    y = _attention(scaled, keys.astype(q.dtype), values.astype(q.dtype), ids, how)
    if place.valid is not None:
        y = jnp.where(place.valid[:, :, None, None], y, 0)
    return y, after(ring_k, k, place), after(ring_v, v, place), place.total, place.last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, ids, how: How):
    """y `[b t h v]`.

    Its passes run where products of float32 are in full precision: splash attention leaves that to
    the setting in force when it is traced, and its backward pass is traced later.

    Args:
        q: `[b t h k]`, scaled.
        k, v: `[b s g k]`, `[b s g v]`.
        ids: int32 `[b t]` and `[b s]`: equal ones see each other; None = all.
        how: see How.
    """
    with _full_precision(q):
        return _splash(q, k, v, ids, how)


def _attention_forward(q, k, v, ids, how):
    with _full_precision(q):
        return jax.vjp(lambda q, k, v: _splash(q, k, v, ids, how), q, k, v)


def _attention_backward(how, pull, dy):
    del how
    with _full_precision(dy):
        return *pull(dy), None


_attention.defvjp(_attention_forward, _attention_backward)


def _full_precision(x) -> contextlib.AbstractContextManager:
    wide = x.dtype == jnp.float32
    return jax.default_matmul_precision("highest") if wide else contextlib.nullcontext()


def _splash(q, k, v, ids, how: How):
    (b, t, h, _), (s, g), block = q.shape, k.shape[1:3], how.config.block
    t_padded, s_padded = tpu.round_up(t, block), tpu.round_up(s, block)
    window = (how.window - 1, 0)
    mask = splash.LocalMask((t_padded, s_padded), window, offset=how.ahead)
    segments: Any = None
    if ids is not None:
        queries = tpu.pad_to(ids[0], 1, t_padded, PADDING_KEY)
        segments = splash.SegmentIds(queries, tpu.pad_to(ids[1], 1, s_padded, PADDING_KEY))
    heads = lambda x, n: tpu.pad_to(jnp.moveaxis(x, 1, 2), 2, n)
    q, k, v = heads(q, t_padded), heads(k, s_padded), heads(v, s_padded)
    make = splash.make_splash_mha if g == h else splash.make_splash_mqa
    kernel = make(
        splash.MultiHeadMask([mask] * (h if g == h else h // g)),
        block_sizes=splash.BlockSizes(*(block,) * 6, block_q_dq=block, block_kv_dq=block),
        head_shards=1,
        q_seq_shards=1,
        interpret=tpu.interpreter(how.config.interpret),
    )
    if g != h:  # the queries that share a head, one such group after the other
        q = q.reshape(b, g, h // g, t_padded, -1)
        kernel = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    y = jax.vmap(kernel, in_axes=(0, 0, 0, 0 if segments is not None else None))(q, k, v, segments)
    return jnp.moveaxis(y.reshape(b, h, t_padded, -1)[:, :, :t], 2, 1)
