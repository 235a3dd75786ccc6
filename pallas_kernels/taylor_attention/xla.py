"""taylor_attention for any device that XLA compiles for: three forms, chosen by length.

Quadratic: all pairs of tokens at once, no features; cheaper for short sequences. Chunked: pairs
inside a chunk, and a state of feature sums between chunks. Features exist for one chunk at a time.
Step: one token, which goes into the state before it reads it: one pass over the state.
Nothing that is of the size of pairs or features is kept for the backward pass: the quadratic form
computes its weights again; the chunked form walks forward once more for the gradient of q (which
needs the states) and backward for those of k and v (which need the states' gradients).

The sum of weights is one more column of v, which is all ones: `v1` below is `[v, 1]`, `o1` the
undivided sums, and a state `[b h f v+1]`. README.md has the maths and what was measured.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch
from pallas_kernels.core.config import Config
from pallas_kernels.core.numerics import einsum, state_dtype
from pallas_kernels.core.segments import boundaries
from pallas_kernels.taylor_attention.features import feature_count, features

FORMS = ("chunked", "quadratic", "step")
# Pairs or features of this many numbers stay near a CPU core while they are worked on.
_NEAR = 2**19


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig(Config):
    """How the work is cut.

    Attributes:
        form: "chunked" (time linear in length), "quadratic", or "step" (a single token).
        chunk: tokens per chunk, at most; the other forms have none.
        rows: sequences of the batch worked on at a time; None = all.
    """

    form: str = "chunked"
    chunk: int = 64
    rows: int | None = None

    def __post_init__(self):
        if self.form not in FORMS or self.chunk < 1:
            raise ValueError(
                f"taylor_attention: form is {self.form!r} and chunk {self.chunk}; form must be one "
                f"of {', '.join(FORMS)} and chunk at least 1"
            )

    @classmethod
    def heuristic(cls, sizes: Mapping[str, int], device_kind: str | None = None) -> "XlaConfig":
        """The form that was measured to be the faster one; on a CPU as many rows as stay near."""
        t, f = sizes["t"], feature_count(sizes["k"])
        form = "step" if t == 1 else "quadratic" if t <= 150 + 2 * f else "chunked"
        rows = None
        if device_kind == "cpu" and form != "step":
            per_row = sizes["h"] * (t * t if form == "quadratic" else 2 * f * cls.chunk)
            fit = max(1, _NEAR // per_row)
            rows = max(r for r in range(1, fit + 1) if sizes["b"] % r == 0)
        return cls(form=form, rows=rows, device_kind=device_kind)


class _How(NamedTuple):
    """Static settings: see `taylor_attention` and XlaConfig."""

    scale: float
    normalize: bool
    eps: float
    chunk: int
    rows: int


class _Masks(NamedTuple):
    """Who sees whom among the tokens of a chunk; None = no restriction.

    Attributes:
        pairs: `[b 1 c c]` or `[c c]`, true where a token (first) sees another one or itself.
        head: `[b c]`, true for tokens that see the state before the chunk.
        tail: `[b c]`, true for tokens that go into the state after it.
        kept: `[b]`, true where the state before goes into the state after.
        valid: `[b c]`, true where there is a token.
    """

    pairs: jax.Array
    head: jax.Array | None
    tail: jax.Array | None
    kept: jax.Array | None
    valid: jax.Array | None


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(q, k, v, kv, z, last_id, segment_ids, *, scale, normalize, eps, config):
    """See `taylor_attention`; kv `[b h f v]` and z `[b h f]` or None. Returns y, kv, z, last_id."""
    (b, t, h, width), v_width = q.shape, v.shape[-1]
    sizes = dict(b=b, t=t, h=h, k=width, v=v_width)
    config = XlaConfig.of(config, sizes, dispatch.device_kind(config))
    reset = document = valid = None
    if segment_ids is not None:
        reset, valid, last_id = boundaries(segment_ids, last_id)
        document = jnp.cumsum(reset, axis=1, dtype=jnp.int32)  # 0 = the one of the state
    if config.form == "step":
        if t != 1:
            raise ValueError(f"taylor_attention: form 'step' takes one token; there are {t}")
        how = _How(scale, normalize, eps, chunk=1, rows=b)
        return *_step(q, k, v, kv, z, reset, valid, how), last_id
    state = None if kv is None else jnp.concatenate([kv, z[..., None]], axis=-1)
    n_chunks = 1 if config.form == "quadratic" else -(-t // config.chunk)
    how = _How(scale, normalize, eps, chunk=-(-t // n_chunks), rows=config.rows or b)
    if config.form == "quadratic":
        y, state = _quadratic(q, k, v, state, (document, valid), how)
    else:
        padding = -t % how.chunk
        if padding:
            valid = jnp.ones((b, t), bool) if valid is None else valid
            q, k, v, valid = (_pad(x, padding) for x in (q, k, v, valid))
            document = None if document is None else _pad(document, padding, mode="edge")
        if state is None:
            state = jnp.zeros((b, h, feature_count(width), v_width + 1), state_dtype(q, k, v))
        y, state = _chunked(q, k, v, state, (document, valid), how)
    return y[:, :t], state[..., :-1], state[..., -1], last_id


def _pad(x, padding: int, **how: Any):
    """More tokens behind those of `[b t ...]`."""
    return jnp.pad(x, [(0, padding * (i == 1)) for i in range(x.ndim)], **how)


def _by_rows(function, rows: int, batched):
    """Applies a function of `[b ...]` arrays to as many rows at a time, one block after another."""
    b = jax.tree.leaves(batched)[0].shape[0]
    if rows >= b:
        return function(*batched)
    if b % rows:
        raise ValueError(f"taylor_attention: config.rows is {rows}, no divisor of a batch of {b}")
    cut = lambda x: x.reshape(b // rows, rows, *x.shape[1:])
    join = lambda x: x.reshape(b, *x.shape[2:])
    blocks = jax.lax.map(lambda block: function(*block), jax.tree.map(cut, batched))
    return jax.tree.map(join, blocks)


# --- one token ------------------------------------------------------------------------------------


def _step(q, k, v, kv, z, reset, valid, how: _How):
    """y `[b 1 h v]` and the state after: kv `[b h f v]`, z `[b h f]`."""
    q_, k_, v1 = (x[:, :, 0] for x in _prepared(q, k, v, valid, how))  # [b h k], [b h v+1]
    phi_q, phi_k = features(q_), features(k_)
    new_kv = phi_k[..., None] * v1[:, :, None, :-1]
    new_z = phi_k * v1[..., -1:]  # 0 at padding
    if kv is not None:
        kept = (kv, z) if reset is None else (_fresh(kv, reset), _fresh(z, reset))
        new_kv, new_z = kept[0] + new_kv, kept[1] + new_z
    o = einsum("bhf,bhfv->bhv", phi_q, new_kv)
    total = jnp.sum(phi_q * new_z, axis=-1, keepdims=True)
    o1 = jnp.concatenate([o, total], axis=-1)[:, None]
    return _divide(o1, valid, how).astype(v.dtype), new_kv, new_z


def _fresh(x, reset):
    """A state with the rows set to 0 whose token `[b 1]` begins another document."""
    return jnp.where(reset.reshape(-1, *(1,) * (x.ndim - 1)), 0, x)


# --- the quadratic form ---------------------------------------------------------------------------


def _quadratic(q, k, v, state, places, how: _How):
    """y `[b t h v]` and the state after, for which alone features are made."""
    masks, dtype = _masks_of(0, places, how.chunk), state_dtype(q, k, v)
    o1 = _all_pairs(q, k, v, places, how)

    @jax.checkpoint  # features are made again
    def read(q, state):
        return _tokens_first(_read(_prepare(q, masks.valid, dtype, how.scale), state, masks))

    @jax.checkpoint
    def written(k, v, state):
        k, v1 = _prepare(k, masks.valid, dtype), _with_ones(v, masks.valid, dtype)
        return _written(k, v1, state, masks)

    if state is not None:
        o1 = o1 + read(q, state)
    return _divide(o1, masks.valid, how).astype(v.dtype), written(k, v, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _all_pairs(q, k, v, places, how: _How):
    """Undivided sums over the pairs of these tokens, `[b t h v+1]`."""
    return _all_pairs_forward(q, k, v, places, how)[0]


def _all_pairs_forward(q, k, v, places, how: _How):
    def block(q, k, v, places):
        masks = _masks_of(0, places, how.chunk)
        q, k, v1 = _prepared(q, k, v, masks.valid, how)
        return _tokens_first(_products(_weights(_scores(q, k), masks), v1))

    return _by_rows(block, how.rows, (q, k, v, places)), (q, k, v, places)


def _all_pairs_backward(how: _How, residuals, do1):
    def block(q, k, v, places, do1):
        masks = _masks_of(0, places, how.chunk)
        q_, k_, v1 = _prepared(q, k, v, masks.valid, how)
        do1 = _tokens_first(do1)
        s = _scores(q_, k_)
        ds = _scores_gradient(s, v1, do1, masks)
        dq = how.scale * _products(ds, k_)
        dk = _products_transposed(ds, q_)
        dv = _products_transposed(_weights(s, masks), do1)[..., :-1]
        out = lambda dx, x: _keep(_tokens_first(dx), masks.valid).astype(x.dtype)
        return out(dq, q), out(dk, k), out(dv, v)

    return *_by_rows(block, how.rows, (*residuals, do1)), (None, None)


_all_pairs.defvjp(_all_pairs_forward, _all_pairs_backward)


# --- the chunked form -----------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _chunked(q, k, v, state, places, how: _How):
    """y `[b t h v]` and the state after; t is a multiple of the chunk."""
    return _chunked_forward(q, k, v, state, places, how)[0]


def _chunked_forward(q, k, v, state, places, how: _How):
    block = functools.partial(_forward, how=how)
    y, z, last = _by_rows(block, how.rows, (q, k, v, state, places))
    return (y, last), (q, k, v, state, places, y, z)


def _chunked_backward(how: _How, residuals, cotangents):
    block = functools.partial(_backward, how=how)
    return *_by_rows(block, how.rows, (*residuals, *cotangents)), (None, None)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _forward(q, k, v, state, places, *, how: _How):
    """y `[b t h v]`, the sums of weights `[b t h]` and the state after."""
    dtype = state.dtype

    def one_chunk(carry, i):
        state, y, z = carry
        masks = _masks_of(i, places, how.chunk)
        q_c, k_c, v_c = _cut(i, how.chunk, q, k, v)
        q_c, k_c, v1 = _prepared(q_c, k_c, v_c, masks.valid, how)
        o1 = _products(_weights(_scores(q_c, k_c), masks), v1) + _read(q_c, state, masks)
        o1 = _tokens_first(o1)
        y = _write(y, _divide(o1, masks.valid, how), i)
        return (_written(k_c, v1, state, masks), y, _write(z, o1[..., -1], i)), None

    start = (state, jnp.zeros_like(v), jnp.zeros(q.shape[:3], dtype))
    (last, y, z), _ = jax.lax.scan(one_chunk, start, _numbers(q, how))
    return y, z, last


def _backward(q, k, v, state, places, y, z, dy, dlast, *, how: _How):
    """Gradients of q, k, v and of the state before: two walks, neither keeps a state per chunk."""

    def chunk_of(i):
        masks = _masks_of(i, places, how.chunk)
        q_c, k_c, v_c, dy_c, y_c, z_c = _cut(i, how.chunk, q, k, v, dy, y, z)
        q_c, k_c, v1 = _prepared(q_c, k_c, v_c, masks.valid, how)
        do1 = _sums_gradient(dy_c, y_c, z_c, masks.valid, how)
        s = _scores(q_c, k_c)
        return masks, q_c, k_c, v1, do1, s, _scores_gradient(s, v1, do1, masks)

    def forward(carry, i):
        state, dq = carry
        masks, q_c, k_c, v1, do1, _, ds = chunk_of(i)
        _, pull = jax.vjp(features, q_c)
        (dq_c,) = pull(einsum("bhcv,bhfv->bhcf", _seen(do1, masks.head), state))
        dq_c = how.scale * (dq_c + _products(ds, k_c))
        return (_written(k_c, v1, state, masks), _write(dq, _tokens_first(dq_c), i)), None

    def backward(carry, i):
        dstate, dk, dv = carry
        masks, q_c, k_c, v1, do1, s, ds = chunk_of(i)
        phi_k, pull = jax.vjp(features, k_c)
        (dk_c,) = pull(einsum("bhcv,bhfv->bhcf", _seen(v1, masks.tail), dstate))
        dk_c = dk_c + _products_transposed(ds, q_c)
        dv_c = _seen(einsum("bhcf,bhfv->bhcv", phi_k, dstate), masks.tail)
        dv_c = (dv_c + _products_transposed(_weights(s, masks), do1))[..., :-1]
        dk = _write(dk, _keep(_tokens_first(dk_c), masks.valid), i)
        dv = _write(dv, _keep(_tokens_first(dv_c), masks.valid), i)
        brought = einsum("bhcf,bhcv->bhfv", features(q_c), _seen(do1, masks.head))
        return (_kept(dstate, masks) + brought, dk, dv), None

    (_, dq), _ = jax.lax.scan(forward, (state, jnp.zeros_like(q)), _numbers(q, how))
    start = (dlast, jnp.zeros_like(k), jnp.zeros_like(v))
    (dstate, dk, dv), _ = jax.lax.scan(backward, start, _numbers(q, how), reverse=True)
    return dq, dk, dv, dstate


def _numbers(q, how: _How):
    return jnp.arange(q.shape[1] // how.chunk)


def _sums_gradient(dy, y, z, valid, how: _How):
    """Of the undivided sums `[b h c v+1]`, from the gradient of y `[b c h v]`."""
    dtype = z.dtype
    do = _prepare(dy, valid, dtype)
    if not how.normalize:
        return jnp.concatenate([do, jnp.zeros_like(do[..., :1])], axis=-1)
    do = do / _tokens_first(_divisor(z, valid, how))[..., None]
    by_total = -jnp.sum(do * _prepare(y, valid, dtype), axis=-1, keepdims=True)
    return jnp.concatenate([do, by_total], axis=-1)


# --- pieces ---------------------------------------------------------------------------------------


def _scores(q, k):
    return einsum("bhck,bhjk->bhcj", q, k)


def _weights(s, masks: _Masks):
    return jnp.where(masks.pairs, 1 + s + 0.5 * s * s, 0)


def _scores_gradient(s, v1, do1, masks: _Masks):
    dw = einsum("bhcv,bhjv->bhcj", do1, v1)
    return jnp.where(masks.pairs, dw * (1 + s), 0)


def _products(w, x):
    return einsum("bhcj,bhjv->bhcv", w, x)


def _products_transposed(w, x):
    return einsum("bhcj,bhcv->bhjv", w, x)


def _read(q, state, masks: _Masks):
    """What the state before gives to each token, `[b h c v+1]`."""
    return _seen(einsum("bhcf,bhfv->bhcv", features(q), state), masks.head)


def _written(k, v1, state, masks: _Masks):
    """The state after these tokens."""
    new = einsum("bhcf,bhcv->bhfv", features(k), _seen(v1, masks.tail))
    return new if state is None else _kept(state, masks) + new


def _kept(state, masks: _Masks):
    return state if masks.kept is None else jnp.where(masks.kept[:, None, None, None], state, 0)


def _divide(o1, valid, how: _How):
    """y `[b c h v]` from sums `[b c h v+1]`."""
    if not how.normalize:
        return _keep(o1[..., :-1], valid)
    return _keep(o1[..., :-1] / _divisor(o1[..., -1], valid, how)[..., None], valid)


def _divisor(z, valid, how: _How):
    """`[b c h]`; 1 at padding, where there may be nothing to divide by."""
    return z + how.eps if valid is None else jnp.where(valid[..., None], z + how.eps, 1)


def _masks(c: int, document, valid, before, after) -> _Masks:
    """Of c tokens whose documents have numbers `[b c]`, those before and after them `[b]`."""
    causal = jnp.tril(jnp.ones((c, c), bool))
    if document is None:
        return _Masks(causal, None, valid, None, valid)
    same = document[:, :, None] == document[:, None, :]
    return _Masks(
        pairs=(causal & same)[:, None],
        head=document == jnp.broadcast_to(before, document.shape[:1])[:, None],
        tail=valid & (document == after[:, None]),
        kept=after == before,
        valid=valid,
    )


def _masks_of(i, places, chunk: int) -> _Masks:
    """Of chunk i, from the documents' numbers and the padding of all tokens."""
    document, valid = places
    document_c, valid_c = _cut(i, chunk, document, valid)
    if document is None:
        return _masks(chunk, None, valid_c, None, None)
    earlier = jax.lax.dynamic_index_in_dim(
        document, jnp.maximum(i * chunk - 1, 0), 1, keepdims=False
    )
    before = jnp.where(i == 0, 0, earlier)
    return _masks(chunk, document_c, valid_c, before, document_c[:, -1])


def _prepared(q, k, v, valid, how: _How):
    """q (scaled) and k `[b h c k]`, v and a column of ones `[b h c v+1]`; 0 at padding."""
    dtype = state_dtype(q, k, v)
    q, k = _prepare(q, valid, dtype, how.scale), _prepare(k, valid, dtype)
    return q, k, _with_ones(v, valid, dtype)


def _prepare(x, valid, dtype, scale: float = 1.0):
    """`[b h c ...]` from `[b c h ...]`."""
    x = jnp.swapaxes(_keep(x, valid).astype(dtype), 1, 2)
    return x if scale == 1.0 else scale * x


def _with_ones(v, valid, dtype):
    ones = jnp.ones((*v.shape[:-1], 1), v.dtype)
    return _prepare(jnp.concatenate([v, ones], axis=-1), valid, dtype)


def _tokens_first(x):
    """`[b c h ...]` from `[b h c ...]`."""
    return jnp.swapaxes(x, 1, 2)


def _cut(i, chunk: int, *arrays: Any) -> list:
    """Chunk i of `[b t ...]` arrays."""
    return [
        None if x is None else jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)
        for x in arrays
    ]


def _write(out, x_c, i):
    """Puts chunk i `[b c ...]` into its place of `[b t ...]`."""
    return jax.lax.dynamic_update_slice_in_dim(out, x_c.astype(out.dtype), i * x_c.shape[1], axis=1)


def _keep(x, valid):
    """Sets padding of `[b c h ...]` to 0, whatever stands there (a nan times 0 would stay)."""
    if valid is None:
        return x
    return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, 0)


def _seen(x, mask):
    """Sets `[b h c ...]` to 0 where a `[b c]` mask (or None) is false."""
    return x if mask is None else jnp.where(mask[:, None, :, None], x, 0)
