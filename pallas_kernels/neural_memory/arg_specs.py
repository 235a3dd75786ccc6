"""The calls that neural_memory is tested and measured with."""

import jax
import numpy as np

from pallas_kernels.core.testing import ArgSpec

_CHUNK = 16


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """As in a layer: keys and queries of length 1, short steps, weights of unit gain.

    Forgetting is slow: a network that was forgotten answers next to nothing, of which its norm
    makes something of size 1, whatever the rounding left.
    """
    x = rng.normal(size=shape)
    if name in ("q", "k"):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)
    if name in ("alpha", "eta", "theta"):
        share = 1 / (1 + np.exp(-x))
        return share * {"alpha": 0.01, "eta": 0.9, "theta": 0.1 / _CHUNK}[name]
    if name in ("gamma", "s_gamma"):
        return 0.1 * x
    if name.startswith("s_"):
        return 0.03 * x
    return 1.5 * x / np.sqrt(shape[-1]) if name.startswith("w_") else x


def draw_edges(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Shares of exactly 0 and 1 and steps of 0 among the others; some keys are 0."""
    x = draw(name, shape, rng)
    which = rng.uniform(size=shape[: 3 if name == "k" else None])
    if name in ("alpha", "eta"):
        return np.where(which < 0.1, 0.0, np.where(which > 0.9, 1.0, x))
    if name == "theta":
        return np.where(which < 0.2, 0.0, x)
    return x * (which[..., None] > 0.1) if name == "k" else x


def settle(state, rng: np.random.Generator):
    """A state that a stream can leave behind: nothing read, full chunks, chunks still open.

    Its weights have unit gain, and where a chunk is full, so is where the next one starts from.
    """
    del rng

    def scaled(tree, by):
        return jax.tree.map(lambda x: (by * x / np.sqrt(x.shape[-1])).astype(x.dtype), tree)

    counts = np.array([5, 0, 2 * _CHUNK, 3 * _CHUNK - 1], np.int32)
    return state._replace(
        start=scaled(state.start, 1.5),
        now=scaled(state.now, 1.5),
        momentum=scaled(state.momentum, 0.03),
        count=counts[: len(state.count)],
    )


def _spec(name, sizes, given=(), draw=draw, tags=("test",), **options):
    return ArgSpec(
        name=name,
        sizes=sizes,
        draw=draw,
        given=given,
        options=dict(chunk=_CHUNK, **options),
        tags=frozenset(tags),
        settle=settle,
    )


_MLP = ("w_in", "gamma")
SPECS = (
    _spec("linear", dict(b=4, h=2, k=5, v=4, n=5)),
    _spec(
        "whole",
        dict(b=4, h=2, k=6, v=6, m=8, n=8),
        (*_MLP, "s_out", "s_in", "s_gamma"),
        limit="clip",
    ),
    _spec("clip", dict(b=4, h=1, k=4, v=4, m=6, n=6), _MLP, limit="clip", activation="silu"),
    _spec("normalise", dict(b=4, h=1, k=4, v=3, m=6, n=6), ("w_in",), limit="normalise"),
    _spec("deep", dict(b=4, h=1, k=4, v=3, m=5, n=5, l=2), ("w_in", "w_hidden"), limit="clip"),
    _spec("edges", dict(b=4, h=2, k=4, v=4, n=4), (), draw_edges, ("extreme",), limit="normalise"),
    *(
        ArgSpec(
            name=name,
            sizes=dict(b=b, t=t, h=h, k=k, v=k, m=m, n=m),
            draw=draw,
            given=_MLP,
            options=dict(chunk=chunk),
            tags=frozenset({"bench"}),
        )
        for name, b, t, h, k, m, chunk in (
            ("issue", 1, 1024, 1, 64, 256, 64),
            ("small", 64, 64, 1, 64, 128, 16),
            ("titans_340m", 1, 2048, 16, 64, 256, 64),
        )
    ),
    # What the TPU kernels are compiled at; sizes of configs/model/titans_*.yaml.
    *(
        ArgSpec(
            name=name,
            sizes=dict(b=1, t=t, h=h, k=64, v=64, n=64) | (dict(m=256, n=256) if mlp else {}),
            draw=draw,
            given=_MLP if mlp else (),
            options=dict(chunk=64, limit="clip"),
            tags=frozenset({"tpu", *more}),
        )
        for name, t, h, mlp, more in (
            ("titans_760m_8k", 8192, 24, True, {"primary"}),
            ("titans_760m", 2048, 24, True, ()),
            ("titans_340m_8k", 8192, 16, True, ()),
            ("titans_340m_2k", 2048, 16, True, ()),
            ("titans_340m_8k_f32", 8192, 16, True, ()),
            ("titans_340m_2k_f32", 2048, 16, True, ()),
            ("titans_340m_linear", 2048, 16, False, ()),
        )
    ),
)


def named(name: str) -> ArgSpec:
    """The one of this name."""
    return next(spec for spec in SPECS if spec.name == name)
