"""gated_delta_rule for any device that XLA compiles for: matrix products inside chunks.

Some chunks at a time (a span) are worked on together, so that products are many and what they need
stays near: wy.py. The forward pass keeps the state at the start of each span and nothing else; the
backward pass computes the rest again. README.md has the maths, and what was tried and measured.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.core import chunks, dispatch
from pallas_kernels.core.chunks import Plan, keep
from pallas_kernels.core.config import Config
from pallas_kernels.core.triangular import ROWS
from pallas_kernels.gated_delta_rule import wy

# Arrays of so many numbers are worked on at a time: some twenty of them stay in a CPU's cache; an
# accelerator wants work for all of its cores.
_AT_A_TIME = {"cpu": 2**16}
_ELSEWHERE = 2**26
# Up to this many numbers per head a state is read faster than the pairs of a longer chunk.
_SMALL_STATE = 2**14


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig(Config):
    """How the work is cut.

    Attributes:
        chunk: tokens per chunk, 16 times a power of two or at most 16; at most a block of memories.
        span: chunks worked on at a time. One state per span (and memory) is kept for the backward
            pass.
    """

    chunk: int = 64
    span: int = 8

    def __post_init__(self):
        blocks, rest = divmod(self.chunk, ROWS)
        if self.chunk < 1 or (self.chunk > ROWS and (rest or blocks & (blocks - 1))):
            raise ValueError(
                f"chunk is {self.chunk}; it must be 1 to {ROWS}, or {ROWS} times a power of two"
            )
        if self.span < 1:
            raise ValueError(f"span is {self.span}; it must be at least 1")

    @classmethod
    def heuristic(cls, sizes: Mapping[str, int], device_kind: str | None = None) -> "XlaConfig":
        """64 tokens, on a CPU 32 where the state is small; as many chunks as fit."""
        small = device_kind == "cpu" and sizes["k"] * sizes["v"] <= _SMALL_STATE
        chunk = 32 if small else 64
        per_chunk = sizes["b"] * sizes["h"] * chunk * max(sizes["k"], sizes["v"], chunk)
        near = _AT_A_TIME.get(device_kind or "", _ELSEWHERE)
        return cls(chunk=chunk, span=max(4, near // per_chunk), device_kind=device_kind)


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(q, k, v, g, beta, s, last_id, segment_ids, block_memory, *, scale, config, fresh):
    """See `gated_delta_rule`; s in the dtype to compute in. Returns y, s, last_id."""
    del fresh
    b, t, h, width = q.shape
    sizes = dict(b=b, h=h, k=width, v=v.shape[-1])
    config = XlaConfig.of(config, sizes, dispatch.device_kind(config))
    whole = t if t <= ROWS else ROWS << (-(-t // ROWS) - 1).bit_length()  # a chunk that holds t
    chunk = chunks.fitting(min(config.chunk, whole), t, block_memory)
    n = -(-t // chunk)
    span = -(-n // -(-n // config.span))  # spans of equal length: the last one is not half empty
    plan, last_id = chunks.plan(t, chunk, segment_ids, last_id, block_memory, fill=span)
    fill = -t % (chunk * span)
    inputs = tuple(
        jnp.pad(x, [(0, fill * (i == 1)) for i in range(x.ndim)]) for x in (q, k, v, g, beta)
    )
    y, s = _rule(inputs, s, plan, (chunk, span, scale))
    return y[:, :t], s, last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rule(inputs, s, plan: Plan, how):
    """y `[b t h v]` and the last states; t is a multiple of the span."""
    return _rule_forward(inputs, s, plan, how)[0]


def _rule_forward(inputs, s, plan, how):
    _, span, _ = how

    def one_span(carry, x):
        s, y = carry
        i, plan = x
        tokens = _tokens(inputs, i, plan, how, s.dtype)
        y_i, after = wy.forward(tokens, s, plan)
        return (after, _write(y, y_i, i)), s

    xs = _by_span(plan, inputs[0].shape[1], how)
    (s, y), starts = jax.lax.scan(one_span, (s, jnp.zeros_like(inputs[2])), xs)
    return (y, s), (inputs, starts, plan)


def _rule_backward(how, residuals, cotangents):
    inputs, starts, plan = residuals
    dy, ds = cotangents
    scale = how[-1]

    def one_span(carry, x):
        ds, out = carry
        (i, plan), s = x
        tokens = _tokens(inputs, i, plan, how, ds.dtype)
        dy_i = _cut(dy, i, plan, how, ds.dtype)
        dtokens, ds = wy.backward(tokens, s, plan, dy_i, ds)
        dtokens = dtokens._replace(q=scale * dtokens.q)
        out = tuple(
            _write(x, _where_valid(dx, plan), i) for x, dx in zip(out, dtokens, strict=True)
        )
        return (ds, out), None

    xs = (_by_span(plan, inputs[0].shape[1], how), starts)
    zeros = tuple(map(jnp.zeros_like, inputs))
    (ds, dinputs), _ = jax.lax.scan(one_span, (ds, zeros), xs, reverse=True)
    return dinputs, ds, None


_rule.defvjp(_rule_forward, _rule_backward)


def _by_span(plan: Plan, t: int, how):
    """The numbers of the spans, and the plan of each: `[n ...]` as `[spans n/spans ...]`."""
    chunk, span, _ = how
    spans = t // (chunk * span)
    return jnp.arange(spans), jax.tree.map(lambda x: x.reshape(spans, span, *x.shape[1:]), plan)


def _tokens(inputs, i, plan: Plan, how, dtype) -> wy.Tokens:
    q, k, v, g, beta = (_cut(x, i, plan, how, dtype) for x in inputs)
    return wy.Tokens(how[-1] * q, k, v, g, beta)


def _cut(x, i, plan: Plan, how, dtype):
    """Span i of `[b t h ...]` as `[n b h c ...]`."""
    chunk, span, _ = how
    x = jax.lax.dynamic_slice_in_dim(x, i * chunk * span, chunk * span, axis=1)
    return chunks.cut(x, chunk, plan, dtype)


def _write(out, x, i):
    """Puts a span `[n b h c ...]` into its place of `[b t h ...]`."""
    length = x.shape[0] * x.shape[3]
    x = chunks.join(x, length).astype(out.dtype)
    return jax.lax.dynamic_update_slice_in_dim(out, x, i * length, axis=1)


def _where_valid(x, plan: Plan):
    """Gradients `[n b h c ...]`, 0 where there is no token."""
    if plan.valid is None:
        return x
    valid = plan.valid[:, :, None]
    return keep(x, valid.reshape(valid.shape + (1,) * (x.ndim - 4)))
