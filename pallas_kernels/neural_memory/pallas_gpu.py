"""neural_memory as Mosaic GPU kernels for Hopper: memories of one layer and of two.

A block of threads has a row and a head and goes through its tokens, 64 at a time; the hidden units
of a memory of two layers are shared by the blocks of a cluster. README.md ("On a GPU") has what
moves, what is kept and what is refused.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.core import windows
from pallas_kernels.core.gpu import GpuConfig, refuses_device, refuses_dtypes
from pallas_kernels.neural_memory import gpu_backward, gpu_forward, gpu_windows
from pallas_kernels.neural_memory.gpu_call import Call
from pallas_kernels.neural_memory.gpu_chunk import Form
from pallas_kernels.neural_memory.gpu_layouts import cut, fill, filled
from pallas_kernels.neural_memory.gpu_tiles import SIZE

_MOST_BLOCKS = 8  # of a cluster that any Hopper starts


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasGpuConfig(GpuConfig):
    """How the work is cut.

    Attributes:
        windows: chunks of documents per row that there is room for, where rows are not one document
            each; rows of more take xla. 0 = a quarter more than one document has.
    """

    windows: int = 0

    def __post_init__(self):
        if self.windows < 0:
            raise ValueError(f"windows is {self.windows}; it must be at least 1, or 0 for a choice")


def refuses(shapes, device_kind) -> str | None:
    """Refuses wide heads, more than two layers, and with jax 0.10 two in float32."""
    (q, _, v, *_), (opening, _), *_ = shapes
    if reason := refuses_device(device_kind) or refuses_dtypes(shapes):
        return reason
    if opening.w_hidden is not None:
        layers = 2 + opening.w_hidden.shape[1]
        return f"the memory has {layers} layers (w_hidden); the kernel serves one (linear) and two"
    width, most = max(q.shape[3], v.shape[3]), SIZE * _MOST_BLOCKS
    if width > SIZE:
        return f"heads are {width} wide; the kernel serves up to {SIZE}"
    if opening.w_in is not None:
        hidden = opening.w_in.shape[1]
        if hidden > most:
            return f"the memory has {hidden} hidden units; the kernel serves up to {most}"
        wide = any(x.dtype != jnp.bfloat16 for x in shapes[0][:3])
        if wide and jax.__version_info__ < (0, 11):
            return f"two layers in float32 take jax 0.11; jax {jax.__version__} spills registers"
    return None


def refuses_options(shapes, device_kind, *, how, fresh, still) -> str | None:
    """Refuses long chunks, and single tokens of streams."""
    del device_kind, still
    if how.chunk > SIZE:
        return f"chunk is {how.chunk}; the kernel serves up to {SIZE}"
    if not fresh and shapes[0][0].shape[1] == 1:
        return "one token of a stream is one row of a tile of 64, which xla's step does"
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
        config: PallasGpuConfig or None.
    """
    del still
    _, now, momentum, count, last_id = state
    (q, k, v), shares = tokens[:3], tokens[3:]
    (b, t, h, _), width, dtype = q.shape, v.shape[3], v.dtype
    hidden = 0 if now.w_in is None else now.w_in.shape[2]
    blocks = 1 << (-(-hidden // SIZE) - 1).bit_length() if hidden else 1
    narrow = all(x.dtype == jnp.bfloat16 for x in (q, k, v))
    if not narrow:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    config = PallasGpuConfig.of(config, dict(b=b, t=t, h=h))
    call = Call(
        form=Form(how, width, blocks),
        config=config,
        b=b,
        h=h,
        n=-(-t // how.chunk),
        narrow=narrow,
        mlp=hidden > 0,
        gain=now.gamma is not None,
    )
    if segment_ids is not None or not fresh:
        call = call._replace(n=config.windows or windows.room_for(t, how.chunk))
        tokens = (q, k, v, *shares)
        y, state = gpu_windows.run(call, opening, state, tokens, segment_ids, fresh=fresh)
        return y.astype(dtype), state
    laid_out = tuple(filled(x, blocks * SIZE) for x in (now, momentum))
    y, last = _memory(call, laid_out, _blocks(call, q, k, v), _gates(call, shares))
    y = y.reshape(b, call.n, SIZE, h, SIZE)[:, :, : how.chunk, :, :width]
    y = y.reshape(b, -1, h, width)[:, :t].astype(dtype)
    return y, (*(cut(x, now) for x in last), count + t, last_id)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _memory(call: Call, carry, tokens, gates):
    """y `[b t h 64]` and the last (start, now, momentum)."""
    y, last, _ = gpu_forward.forward(call, carry, tokens, gates, keep=False)
    return y, last


def _forward(call, carry, tokens, gates):
    y, last, kept = gpu_forward.forward(call, carry, tokens, gates, keep=True)
    return (y, last), (kept, tokens, gates)


def _backward(call, residuals, cotangents):
    kept, tokens, gates = residuals
    dy, dlast = cotangents
    found = gpu_backward.backward(call, kept, tokens, gates, dy, dlast)
    return found.dcarry, found.dtokens, jnp.pad(found.dgates, [(0, 0)] * 3 + [(0, 1), (0, 0)])


_memory.defvjp(_forward, _backward)


# --- Layouts ------------------------------------------------------------------------------------


def _blocks(call: Call, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`[b t h x]` as blocks of 64 tokens, filled up, in a row: `[b n*64 h 64]`."""

    def one(x):
        chunk = call.form.how.chunk
        x = fill(x, call.n * chunk, call.h, SIZE)
        x = fill(x.reshape(call.b, call.n, chunk, call.h, SIZE), SIZE, call.h, SIZE)
        return x.reshape(call.b, call.n * SIZE, call.h, SIZE)

    return tuple(map(one, arrays))


def _gates(call: Call, shares) -> jax.Array:
    """alpha, eta, theta and 1 for each token, as `[b h n 4 64]`."""
    one = jnp.ones(shares[0].shape, jnp.float32)
    rows = jnp.stack([*(x.astype(jnp.float32) for x in shares), one], axis=1)
    chunk = call.form.how.chunk
    rows = fill(rows, call.n * chunk, call.h).reshape(call.b, 4, call.n, chunk, call.h)
    return jnp.transpose(fill(rows, SIZE, call.h), (0, 4, 2, 1, 3))
