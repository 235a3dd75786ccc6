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


def chunked(name: str, chunk: int, *, tags=("test",), draw=draw, bias=True, **options) -> ArgSpec:
    """A call of the chunked form with two query heads for each of two key-value heads."""
    causal = options.get("causal", True)
    return ArgSpec(
        name=name,
        sizes=dict(b=4, h=4, g=2, k=6, v=5, p=2 * chunk - 1),
        draw=draw,
        given=("bias",) * bias,
        options=dict(chunk=chunk, **options),
        settle=settle if causal else None,
        tags=frozenset(tags),
    )


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
    chunked("chunks", 20),
    chunked("laplace", 7, score="laplace"),
    chunked("long_chunks", 150, score="relu2", bias=False),
    chunked("sharp_chunks", 20, draw=draw_extreme, tags=("extreme",)),
    chunked("two_sided", 20, causal=False, scale=0.3),
    chunked("two_sided_laplace", 33, causal=False, score="laplace"),
    *(
        ArgSpec(
            name=name,
            sizes=dict(b=b, t=t, h=1, g=1, k=k, v=v, p=2 * chunk - 1),
            draw=draw,
            given=("bias",),
            options=dict(chunk=chunk, **options),
            tags=frozenset({"bench"}),
        )
        for name, b, t, k, v, chunk, options in (
            ("mega_small", 4, 1024, 32, 128, 128, dict()),
            ("mega_enwik8", 1, 4096, 128, 1024, 2048, dict()),
            ("mega_image", 4, 1024, 96, 320, 128, dict(score="laplace", causal=False)),
        )
    ),
    *(
        ArgSpec(
            name=name,
            sizes=dict(b=b, t=t, h=h, g=h, k=k, v=k),
            draw=draw,
            options=dict(window=window),
            tags=frozenset(tags),
        )
        for name, b, t, h, k, window, tags in (
            ("small", 4, 512, 4, 32, 64, {"bench"}),
            ("based_360m", 1, 2048, 16, 64, 129, {"bench"}),
            ("based_1b_window", 2, 2048, 16, 112, 129, {"tpu", "primary"}),
        )
    ),
)


def named(name: str) -> ArgSpec:
    """The one of this name."""
    return next(spec for spec in SPECS if spec.name == name)
