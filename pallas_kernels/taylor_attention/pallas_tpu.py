"""taylor_attention as Mosaic TPU kernels: features and states stay on the chip.

Kept between forward and backward: q, k, v, y, 1 / (z + eps), and the state before each block of
(about 2,048) tokens. README.md has grid, blocks and bytes.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.core import dispatch, tpu
from pallas_kernels.core.segments import boundaries
from pallas_kernels.core.tpu_places import pack
from pallas_kernels.core.tpu_tokens import ROWS, product_dtype, tokens_first, tokens_last
from pallas_kernels.taylor_attention.tpu_backward import backward
from pallas_kernels.taylor_attention.tpu_features import rows_of
from pallas_kernels.taylor_attention.tpu_forward import How, forward
from pallas_kernels.taylor_attention.tpu_layout import Widths, state_rows

# Of the scoped limit: what blocks and scratch may take; the rest is the compiler's.
_SHARE = 0.6
_MOST = 0.8  # of the whole vector memory: what the limit is raised to


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
    k, v = tpu.round_up(k, ROWS), tpu.round_up(v, ROWS)
    rows = state_rows(v)
    arrays = 2 * ((4 * k + 4 * v) * itemsize + 4 * tpu.SUBLANES)
    scratch = 4 * (2 * k + v) + 2 * rows * itemsize
    states = 10 * 4 * tpu.round_up(rows_of(k), tpu.LANES) * tpu.round_up(rows, tpu.LANES)
    return block * (arrays + scratch) + states


def refuses(shapes, device_kind) -> str | None:
    """Refuses dtypes, single tokens, and states that the vector memory does not hold."""
    q, k, v, *_ = shapes
    if reason := tpu.refuses_dtypes(shapes):
        return reason
    if q.shape[1] == 1:
        return "one token is one pass over the state, which xla's step does"
    itemsize = jnp.dtype(product_dtype(q, k, v)).itemsize
    need = _bytes(q.shape[3], v.shape[3], PallasTpuConfig.chunk, itemsize)
    if need > _SHARE * _MOST * tpu.generation(device_kind).vmem:
        return f"a head's states and tokens take {need / tpu.MIB:.0f} MiB of vector memory"
    return None


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
    return *_attention(q, k, v, kv, z, places, how), last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, kv, z, places, how: How):
    """y `[b t h v]` and the state after, kv `[b h f v]` and z `[b h f]`."""
    widths = Widths.of(q, v)
    arrays = [tokens_last(x, how.config.block) for x in (q, k, v)]
    y, last, _, _ = forward(arrays, widths.to_rows(kv, z), places, how, save=False)
    return tokens_first(y, v), *widths.from_rows(last)


def _attention_forward(q, k, v, kv, z, places, how: How):
    q, k, v, kv, z, places = jax.tree.map(lambda x: x.value, (q, k, v, kv, z, places))
    widths = Widths.of(q, v)
    state = widths.to_rows(kv, z)
    arrays = [tokens_last(x, how.config.block) for x in (q, k, v)]
    y, last, saved, inverse = forward(arrays, state, places, how, save=True)
    if saved is None and state is not None:
        saved = state[:, :, None]
    kept = (y, inverse) if how.normalize else (None, None)
    given = None if kv is None else ()
    return (tokens_first(y, v), *widths.from_rows(last)), (q, k, v, saved, places, *kept, given)


def _attention_backward(how: How, residuals, cotangents):
    q, k, v, saved, places, y, inverse, given = residuals
    widths = Widths.of(q, v)
    arrays = [tokens_last(x, how.config.block) for x in (q, k, v)]
    dlast = None  # where nobody asked for the state, there is no gradient to make and read
    if not all(isinstance(x, SymbolicZero) for x in cotangents[1:]):
        dlast = widths.to_rows(*map(_array, cotangents[1:]), gradient=True)
    dy = tokens_last(_array(cotangents[0]), how.config.block)
    dq, dk, dv, dinitial = backward(
        arrays, saved, places, y, inverse, dy, dlast, how, has_state=given is not None
    )
    dstate = (None, None) if given is None else widths.from_rows(dinitial, gradient=True)
    gradients = (tokens_first(*pair) for pair in ((dq, q), (dk, k), (dv, v)))
    return *gradients, *dstate, None


_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)


def _array(x):
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x
