"""The calls that chunk_attention is tested and measured with."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.testing import ArgSpec


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal values."""
    del name
    return rng.normal(size=shape)


def draw_extreme(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Scores up to +-40: a softmax that takes one key; keys repeat, so that ties occur too."""
    x = rng.normal(size=shape)
    if name == "k":
        x = np.repeat(x[:, : (shape[1] + 1) // 2], 2, axis=1)[:, : shape[1]]
    return x * (1 if name == "v" else 3)


def settle(state, rng: np.random.Generator):
    """A ring that a stream can leave behind: counts below, at and far above its slots.

    What lies in it came in as an input, so it is exact in every dtype.
    """
    del rng
    exact = lambda x: x.astype(jnp.bfloat16).astype(x.dtype)
    slots = state.k.shape[2]
    counts = np.array([slots // 2, slots, 5 * slots + 3, 1], np.int32)
    return state._replace(k=exact(state.k), v=exact(state.v), count=counts[: len(state.count)])


SPECS = (
    ArgSpec(
        name="grouped",
        sizes=dict(b=4, h=4, g=2, k=6, v=5),
        draw=draw,
        options=dict(window=20),
        settle=settle,
    ),
    ArgSpec(
        name="alone",
        sizes=dict(b=4, h=2, g=2, k=4, v=3),
        draw=draw,
        options=dict(window=1, scale=0.3),
    ),
    ArgSpec(
        name="wide",
        sizes=dict(b=4, h=2, g=1, k=4, v=4),
        draw=draw_extreme,
        options=dict(window=150),
        settle=settle,
        tags=frozenset({"extreme"}),
    ),
    *(
        ArgSpec(
            name=name,
            sizes=dict(b=b, t=t, h=h, g=h, k=k, v=k),
            draw=draw,
            options=dict(window=window),
            tags=frozenset({"bench"}),
        )
        for name, b, t, h, k, window in (
            ("small", 4, 512, 4, 32, 64),
            ("based_360m", 1, 2048, 16, 64, 129),
        )
    ),
)


def named(name: str) -> ArgSpec:
    """The one of this name."""
    return next(spec for spec in SPECS if spec.name == name)
