"""gla as Mosaic TPU kernels: states stay on the chip.

Kept between forward and backward: q, k, v, g, and the state before each block of (about 1,024)
tokens. README.md has grid, blocks and bytes.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.core import dispatch, tpu, tpu_parts
from pallas_kernels.core.tpu_tokens import ROWS, places, product_dtype, tokens_first, tokens_last
from pallas_kernels.gla.tpu_backward import backward
from pallas_kernels.gla.tpu_forward import How, forward
from pallas_kernels.gla.tpu_levels import sizes as halves

_SHARE = 0.7  # of the scoped limit: what blocks and scratch take; the rest is the compiler's
_SAVED = 0.15  # of the forward pass: what saved states may add before the limit is raised
_BLOCKS = (128, 256, 512, 1024, 2048)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTpuConfig(tpu.TpuConfig):
    """How the work is cut.

    Attributes:
        chunk: tokens whose pairs are formed, a power of two; 128 or more (any when interpreted).
        block: tokens in the vector memory at a time, and between two saved states; a multiple of
            the chunk.
    """

    chunk: int = 128
    block: int = 128

    def __post_init__(self):
        ragged = self.chunk % tpu.LANES and not self.interpret
        if self.chunk < 1 or self.chunk & (self.chunk - 1) or ragged:
            raise ValueError(
                f"gla: chunk is {self.chunk}; it must be a power of two, and at least {tpu.LANES}"
            )
        if self.block < 1 or self.block % self.chunk:
            raise ValueError(
                f"gla: block is {self.block}; it must be a multiple of the chunk of {self.chunk}"
            )

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasTpuConfig":
        """Blocks as long as the vector memory allows.

        Where large states leave room for short blocks only, the limit is raised: a state would be
        saved so often that it adds more than a seventh to what the tokens cost.
        """
        room = _SHARE * tpu.generation(device_kind).scoped_vmem
        longest = max((n for n in _BLOCKS if _bytes(sizes, n) <= room), default=0)
        enough = [n for n in _BLOCKS if _saved(sizes, n) <= _SAVED] or [_BLOCKS[-1]]
        if longest < min(enough[0], tpu.round_up(sizes["t"], cls.chunk)):
            most = tpu_parts.most_room(device_kind, _SHARE)
            fit = [n for n in _BLOCKS if _bytes(sizes, n) <= most and n <= enough[0]]
            longest = max(fit, default=cls.chunk)
        n_blocks = -(-sizes["t"] // longest)  # of one length
        block = tpu.round_up(-(-sizes["t"] // n_blocks), cls.chunk)
        limit = tpu_parts.limit_for(_bytes(sizes, block), device_kind, _SHARE)
        return cls(block=block, vmem_limit_bytes=limit, device_kind=device_kind)


def _bytes(sizes: Mapping[str, int], block: int) -> int:
    """Of the vector memory that the backward kernel takes: arrays twice, scratch once, states."""
    chunk = PallasTpuConfig.chunk
    k, v = (tpu.round_up(sizes[x], ROWS) for x in "kv")
    operand = sizes["itemsize"]
    token = (4 * k + 3 * v) * operand + 2 * k * sizes["gates"] + 4 * tpu.SUBLANES
    state = 4 * k * tpu.round_up(v, tpu.LANES)
    n_states = block // chunk + 1 + 2 * 3  # of the chunks, the gradient, those that come and go
    levels = len(halves(chunk))
    held = k * ((levels + 2) * operand + 4 * (2 * levels + 6)) + chunk * (operand + 8)
    return 2 * block * token + n_states * state + chunk * held


def _saved(sizes: Mapping[str, int], block: int) -> float:
    """Bytes of the saved states, by those that the forward pass moves otherwise."""
    k, v = (tpu.round_up(sizes[x], ROWS) for x in "kv")
    token = (2 * k + 2 * v) * sizes["itemsize"] + k * sizes["gates"]
    return 4 * k * v / (block * token)


def _sizes(q, k, v, g) -> dict[str, int]:
    itemsize = jnp.dtype(product_dtype(q, k, v)).itemsize
    sizes = dict(t=q.shape[1], k=q.shape[3], v=v.shape[3])
    return dict(**sizes, itemsize=itemsize, gates=g.dtype.itemsize)


def refuses(shapes, device_kind) -> str | None:
    """Refuses memories, dtypes, and states that the vector memory does not hold."""
    q, k, v, g, _, _, _, block_memory = shapes
    if block_memory is not None:
        return "block_memory is given; the kernel serves one memory"
    if reason := tpu.refuses_dtypes(shapes):
        return reason
    need = _bytes(_sizes(q, k, v, g), PallasTpuConfig.chunk)
    if need > tpu_parts.most_room(device_kind, _SHARE):
        return f"states and tokens take {need / tpu.MIB:.0f} MiB of vector memory"
    return None


def run(q, k, v, g, s, last_id, segment_ids, block_memory, *, scale, fresh, config):
    """See `gla`; s `[b h k v]` float32. Returns y, s, last_id."""
    del block_memory
    config = PallasTpuConfig.of(config, _sizes(q, k, v, g), dispatch.device_kind(config))
    at, _, last_id = places(q.shape[1], segment_ids, last_id, config)
    how = How(float(scale), config)
    y, s = _gla(q, k, v, g, None if fresh else s, at, how)
    return y, s, last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _gla(q, k, v, g, s, places, how: How):
    """y `[b t h v]` and the state after `[b h k v]`; the one before is that, or None for zeros."""
    return _run(q, k, v, g, s, places, how, save=False)[0]


def _run(q, k, v, g, s, places, how: How, *, save: bool):
    arrays = [tokens_last(x, how.config.block) for x in (q, k, v, g)]
    state = None if s is None else _padded(s)
    several = how.config.block < arrays[0].shape[3]
    found = forward(arrays, state, places, how, save=save and several)
    saved = found.get("saved", None if state is None else state[:, :, None])
    return (tokens_first(found["y"], v), found["last"][:, :, : q.shape[3], : v.shape[3]]), saved


def _forward(q, k, v, g, s, places, how: How):
    q, k, v, g, s, places = jax.tree.map(lambda x: x.value, (q, k, v, g, s, places))
    results, saved = _run(q, k, v, g, s, places, how, save=True)
    return results, (q, k, v, g, saved, places, None if s is None else ())


def _backward(how: How, residuals, cotangents):
    *given, saved, places, state = residuals
    dy, dlast = cotangents
    # Where nobody asked for the state, there is no gradient to make and read.
    dlast = None if isinstance(dlast, SymbolicZero) else _padded(dlast)
    dy = jnp.zeros(dy.shape, dy.dtype) if isinstance(dy, SymbolicZero) else dy
    arrays = [tokens_last(x, how.config.block) for x in given]
    dy = tokens_last(dy, how.config.block)
    found = backward(arrays, saved, places, dy, dlast, how, fresh=state is None)
    gradients = (tokens_first(found[f"d{n}"], x) for n, x in zip("qkvg", given, strict=True))
    ds = found.get("dinitial")
    if ds is not None:
        ds = ds[:, :, : given[0].shape[3], : given[2].shape[3]]
    return *gradients, ds, None


_gla.defvjp(_forward, _backward, symbolic_zeros=True)


def _padded(s):
    """`[b h k v]`, both up to multiples of 16."""
    for axis in (2, 3):
        s = tpu.pad_to(s, axis, tpu.round_up(s.shape[axis], ROWS))
    return s
