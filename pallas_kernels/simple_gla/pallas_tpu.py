"""simple_gla as Mosaic TPU kernels: states stay on the chip.

Kept between forward and backward: q, k, v, g, and the state before each block of (about 2,048)
tokens. README.md has grid, blocks and bytes.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.core import dispatch, tpu
from pallas_kernels.core.tpu_tokens import (
    LOWEST,
    ROWS,
    places,
    product_dtype,
    tokens_first,
    tokens_last,
)
from pallas_kernels.simple_gla.tpu_backward import backward
from pallas_kernels.simple_gla.tpu_forward import How, forward

# Of the scoped limit: what blocks and scratch may take; the rest is the compiler's.
_SHARE = 0.7
_MOST = 0.8  # of the whole vector memory: what the limit is raised to
_SHORT = 1024  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTpuConfig(tpu.TpuConfig):
    """How the work is cut.

    Attributes:
        chunk: tokens whose pairs are formed; a multiple of 128 (any number when interpreted).
        block: tokens in the vector memory at a time, and between two saved states; a multiple of
            the chunk.
    """

    chunk: int = 128
    block: int = 128

    def __post_init__(self):
        ragged = self.chunk % tpu.LANES and not self.interpret
        if self.chunk < 1 or ragged or self.block < 1 or self.block % self.chunk:
            raise ValueError(
                f"simple_gla: chunk is {self.chunk} and block {self.block}; chunk must be a "
                "multiple of 128, and block one of the chunk"
            )

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasTpuConfig":
        """Blocks as long as the vector memory allows.

        Where large states leave room for short blocks only, the limit is raised: a state would be
        saved so often that it costs more than the tokens.
        """
        kind = tpu.generation(device_kind)
        room = lambda memory: _SHARE * memory
        fit = [n for n in (128, 256, 512, 1024, 2048) if _bytes(sizes, n) <= room(kind.scoped_vmem)]
        if max(fit, default=0) < _SHORT:
            most = room(_MOST * kind.vmem)
            fit = [n for n in (128, 256, 512, _SHORT) if _bytes(sizes, n) <= most]
        n_blocks = -(-sizes["t"] // max(fit, default=cls.chunk))  # of one length
        block = tpu.round_up(-(-sizes["t"] // n_blocks), cls.chunk)
        need = _bytes(sizes, block)
        raised = None if need <= room(kind.scoped_vmem) else int(need / _SHARE)
        return cls(block=block, vmem_limit_bytes=raised, device_kind=device_kind)


def _bytes(sizes: Mapping[str, int], block: int) -> int:
    """Of the vector memory that the backward kernel takes: arrays twice, scratch once, states."""
    k, v = (tpu.round_up(sizes[x], ROWS) for x in "kv")
    arrays = 2 * ((4 * k + 3 * v) * sizes["itemsize"] + 4 * 2 * tpu.SUBLANES)
    state = 4 * v * tpu.round_up(k, tpu.LANES)
    states = sizes["shared"] + block // PallasTpuConfig.chunk + 1 + 2 * 3 + 2
    return block * (arrays + 4 * (2 * k + v + PallasTpuConfig.chunk)) + states * state


def _sizes(q, k, v) -> dict[str, int]:
    (_, t, groups, width), (h, v_width) = q.shape, v.shape[2:]
    itemsize = jnp.dtype(product_dtype(q, k, v)).itemsize
    return dict(t=t, k=width, v=v_width, shared=h // groups, itemsize=itemsize)


def refuses(shapes, device_kind) -> str | None:
    """Refuses memories, dtypes, and states that the vector memory does not hold."""
    q, k, v, _, _, _, _, block_memory = shapes
    if block_memory is not None:
        return "block_memory is given; the kernel serves one memory"
    if reason := tpu.refuses_dtypes(shapes):
        return reason
    need = _bytes(_sizes(q, k, v), PallasTpuConfig.chunk)
    if need > _SHARE * _MOST * tpu.generation(device_kind).vmem:
        return f"states and tokens take {need / tpu.MIB:.0f} MiB of vector memory"
    return None


def run(q, k, v, g, s, last_id, segment_ids, block_memory, *, scale, fresh, config):
    """See `simple_gla`; s `[b h k v]` float32. Returns y, s, last_id."""
    del block_memory
    config = PallasTpuConfig.of(config, _sizes(q, k, v), dispatch.device_kind(config))
    at, valid, last_id = places(q.shape[1], segment_ids, last_id, config)
    if valid is not None:
        g = jnp.where(valid[..., None], g, 0)
    y, s = _simple_gla(q, k, v, g, None if fresh else s, at, How(float(scale), config))
    return y, s, last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _simple_gla(q, k, v, g, s, places, how: How):
    """y `[b t h v]` and the state after `[b h k v]`; the one before is that, or None for zeros."""
    return _run(q, k, v, g, s, places, how, save=False)[0]


def _run(q, k, v, g, s, places, how: How, *, save: bool):
    arrays = [tokens_last(x, how.config.block) for x in (q, k, v)]
    state = None if s is None else _padded(s)
    several = how.config.block < arrays[0].shape[3]
    y, last, saved = forward(arrays, _by_head(g, how), state, places, how, save=save and several)
    if saved is None and state is not None:
        saved = state[:, :, None]
    s = jnp.swapaxes(last, 2, 3)[:, :, : q.shape[3], : v.shape[3]]
    return (tokens_first(y, v), s), saved


def _forward(q, k, v, g, s, places, how: How):
    q, k, v, g, s, places = jax.tree.map(lambda x: x.value, (q, k, v, g, s, places))
    results, saved = _run(q, k, v, g, s, places, how, save=True)
    return results, (q, k, v, g, saved, places, None if s is None else ())


def _backward(how: How, residuals, cotangents):
    q, k, v, g, saved, places, given = residuals
    dy, dlast = cotangents
    # Where nobody asked for the state, there is no gradient to make and read.
    dlast = None if isinstance(dlast, SymbolicZero) else _padded(dlast)
    dy = jnp.zeros(dy.shape, dy.dtype) if isinstance(dy, SymbolicZero) else dy
    arrays = [tokens_last(x, how.config.block) for x in (q, k, v)]
    gates, dy = _by_head(g, how), tokens_last(dy, how.config.block)
    dq, dk, dv, dg, ds = backward(arrays, gates, saved, places, dy, dlast, how, fresh=given is None)
    gradients = (tokens_first(*pair) for pair in ((dq, q), (dk, k), (dv, v)))
    dg = jnp.swapaxes(dg[:, :, 0, : g.shape[1]], 1, 2).astype(g.dtype)
    if ds is not None:
        ds = jnp.swapaxes(ds, 2, 3)[:, :, : q.shape[3], : v.shape[3]]
    return *gradients, dg, ds, None


_simple_gla.defvjp(_forward, _backward, symbolic_zeros=True)


def _by_head(g, how: How):
    """`[b h 1 t]` float32, finite, from log decays `[b t h]`."""
    g = jnp.maximum(jnp.swapaxes(g.astype(jnp.float32), 1, 2), LOWEST)
    return tpu.pad_to(g, 2, tpu.round_up(g.shape[2], how.config.block))[:, :, None]


def _padded(s):
    """`[b h v k]` from `[b h k v]`, both up to multiples of 16."""
    s = jnp.swapaxes(s, 2, 3)
    s = tpu.pad_to(s, 2, tpu.round_up(s.shape[2], ROWS))
    return tpu.pad_to(s, 3, tpu.round_up(s.shape[3], ROWS))
